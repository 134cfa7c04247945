"""`qwenq eval --endpoint` and `qwenq profile --endpoint` on vLLM's server, with the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from listening import notices_to
from vllm_client import Record, has_product, vllm_server

from qwenq.profiling.served import METRICS, Load, find_target, profile_served

pytestmark = [pytest.mark.interop, pytest.mark.timeout(900)]
LETTERS = ["--tasks", "mmlu", "--sample", "--limit", "8", "--protocol", "base"]


@pytest.fixture(scope="module")
def served(int4: Path) -> Iterator[str]:
    if not has_product():
        pytest.skip("vLLM's product of Int4 weights needs AVX-512")
    with vllm_server(int4, "--dtype", "bfloat16") as url:
        yield url


def evaluated(out: Path, *options: str | Path) -> dict[str, Any]:
    """The log probabilities of the letters, by item."""
    command = [sys.executable, "-m", "qwenq", "eval", *options, *LETTERS, "--out", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (out / "records").glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return {record["id"]: record["logprobs"] for record in records}


def test_letters_are_those_of_our_engine(tmp_path: Path, int4: Path, served: str, record: Record) -> None:
    there = evaluated(tmp_path / "there", "--endpoint", served, "--model", "quantised")
    here = evaluated(tmp_path / "here", int4, "--dtype", "bfloat16")
    assert there.keys() == here.keys()
    gaps = [abs(a - b) for item in here for a, b in zip(there[item], here[item], strict=True)]
    same = sum(_best(there[item]) == _best(here[item]) for item in here)
    record.letters(len(here), same, max(gaps), "bfloat16")
    assert max(gaps) < 0.5
    for item, scores in here.items():
        first, second = sorted(scores)[-1], sorted(scores)[-2]
        assert _best(there[item]) == _best(scores) or first - second < max(gaps) * 2, item


def _best(scores: list[float]) -> int:
    return scores.index(max(scores))


def test_it_is_measured_as_it_serves(tmp_path: Path, served: str) -> None:
    said: list[str] = []
    target = find_target(served, "quantised", None, notices_to(said))
    rows = profile_served(target, Load((1, 2), 32, 8), tmp_path, notices_to(said), environment={}, budget=20)
    assert {row.metric for row in rows} == set(METRICS)
    assert all(row.status == "ok" for row in rows), said
    assert all(row.value == 0 for row in rows if row.metric == "failed.served")
    assert {row.details["prompt_tokens"] for row in rows} == {32}
