"""`qwenq profile --endpoint` on a real server: llama-cpp-python's, with the bundled model's GGUF.

Needs $QWENQ_LLAMA_PYTHON: a Python that has ``llama-cpp-python[server]``. Skipped without it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from listening import notices_to
from llama_server import llama_server

from qwenq.profiling.served import METRICS, Load, find_target, profile_served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_real_server_is_measured(tmp_path: Path) -> None:
    """It streams no usage, counts prompts, and does not know ``ignore_eos``."""
    said: list[str] = []
    with llama_server() as url:
        target = find_target(url, "smollm2", None, notices_to(said))
        rows = profile_served(
            target, Load((1, 2), 32, 8), tmp_path, notices_to(said), environment={}, budget=20
        )
    assert {row.metric for row in rows} == set(METRICS)
    assert all(row.status == "ok" for row in rows)
    assert all(row.value == 0 for row in rows if row.metric == "failed.served")
    assert {row.details["prompt_tokens"] for row in rows} == {32}
    assert any("the server streams no usage" in text for text in said)
