"""``qwenq plan`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest


def qwenq(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_json_holds_the_published_figures() -> None:
    result = qwenq("plan", "qwen-7b-chat", "--gpu", "a100-80g", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["parameters"] == 7_721_324_544
    assert plan["precisions"][0]["bytes"] == 15_442_649_088
    assert [item["published_bytes"] for item in plan["precisions"]][1:] == [9_123_864_576, 5_860_564_992]
    assert {row["speed"]["gpu"] for row in plan["deployments"]} == {"a100-80g"}


def test_tables_for_people() -> None:
    result = qwenq("plan", "Qwen/Qwen-1_8B-Chat", "--gpu", "h200,rtx-4090", "--tp", "1,2")
    assert result.returncode == 0, result.stderr
    for expected in (
        "1,836,828,672 parameters",
        "peak from 1 token",
        "H200",
        "RTX 4090",
        "Int8, Int4: 2 GPUs cannot share 43 groups of down_proj evenly",
    ):
        assert expected in result.stdout
    assert "…" not in result.stdout  # nothing is cut off in a pipe


def test_a_mixture_fits_eighty_columns() -> None:
    command = [sys.executable, "-c", _AT_EIGHTY_COLUMNS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    words = " ".join(result.stdout.split())
    for expected in (
        "34,660,610,688 parameters, 3,454,988,928 of them active",
        "8 of 256 experts of 512, a shared one of 512",
        "2.41 GiB of draft layers (mtp) and the vision tower are copied",
        "recurrent states",
        "Int8, Int4: 8 GPUs cannot share 4 groups of an expert's down_proj",
        "Weights that a token reads, GiB: BF16 5.49",
    ):
        assert expected in words


_AT_EIGHTY_COLUMNS = """
from rich.console import Console
from qwenq.planner.estimates import gpu
from qwenq.planner.plan import PlanOptions, find_model, make_plan
from qwenq.planner.tables import plan_tables
options = PlanOptions(gpus=(gpu("h200"),), tensor_parallel=(1, 8))
for part in plan_tables(make_plan(find_model("qwen3.5-35b-a3b"), options)):
    Console(width=80, highlight=False, emoji=False).print(part)
"""


def test_neither_torch_nor_transformers_is_imported() -> None:
    script = (
        "import sys; sys.argv = ['qwenq', 'plan', 'qwen3-8b'];"
        "from qwenq.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_it_answers_at_once() -> None:
    """Processor seconds, not wall time: the machine may be busy."""
    import resource

    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    assert qwenq("plan", "qwen2.5-72b-instruct").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1
    assert time.perf_counter() - wall < 30


def test_an_unsupported_model_is_refused_with_what_is_missing() -> None:
    result = qwenq("plan", "qwen2-audio-7b")
    assert result.returncode == 1
    assert "not supported yet: the audio tower would have to be added" in result.stderr
    assert "did you mean" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen-7b-chta"], "did you mean qwen-7b-chat"),
        ([""], "MODEL is empty"),
        (["qwen3-8b", "--gpu", "h300"], "did you mean h"),
        (["qwen3-8b", "--bits", "3"], "use 4 or 8"),
        (["qwen3-8b", "--bits", "four"], "not a list of whole numbers"),
        (["qwen3-8b", "--tp", ","], "no name given"),
        (["qwen3-8b", "--group-size", "100"], "does not divide"),
        (["qwen3-8b", "--group-size", "64,128"], "use auto, 128, 64, 32 or -1"),
        (["qwen3-8b", "--context", "0"], "at least 1"),
        (["qwen3-8b", "--context", f"1{'0' * 400}"], "--context is at most 1,000,000,000"),
        (["qwen3-8b", "--tp", f"1,1{'0' * 400}"], "--tp is at most 1,000,000,000"),
    ],
)
def test_misuse_ends_with_code_2_and_a_hint(arguments: list[str], message: str) -> None:
    result = qwenq("plan", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
