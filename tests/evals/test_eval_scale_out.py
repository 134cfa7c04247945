"""`qwenq eval` on several processes: the answers of one, whatever happens on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evals.benchmark_data import write_gsm8k, write_mmlu
from teams import Ended, Launcher, launcher, torchrun
from tiny_model import write_tiny_model

from qwenq.results import read_rows

LOADED = ["torch.distributed", "qwenq.evals.suite", "qwenq.runtime.engine"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launcher(tmp_path_factory.mktemp("team"), LOADED) as ready:
        write_tiny_model(ready.folder / "Tiny", max_position_embeddings=2048)
        write_gsm8k(write_mmlu(ready.folder / "data"))
        yield ready


def evaluate(launch: Launcher, world: int, out: Path, *options: object) -> Ended:
    common = ["--data", "data", "--protocol", "base", "--dtype", "float32", "--device", "cpu", "--out", out]
    chosen = ["--tasks", "mmlu", "--subjects", "abstract_algebra,astronomy", "--limit", "7"]
    return launch(world, "eval", "Tiny", *common, *(options or chosen), "--json")


def records(out: Path) -> dict[str, dict[str, Any]]:
    (file,) = (out / "records").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len({line["id"] for line in lines}) == len(lines), "an item was recorded twice"
    return {line["id"]: line for line in lines}


@pytest.fixture(scope="module")
def alone(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("alone")
    ended = evaluate(launch, 1, out)
    assert ended.statuses == [0], ended.shown
    return records(out)


def require_same(found: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> None:
    """The same verdicts; numbers but for the last bits, which depend on what shares a batch."""
    assert set(found) == set(wanted)
    for name, record in found.items():
        assert record["correct"] == wanted[name]["correct"]
        assert record["asked"] == wanted[name]["asked"]
        assert record["logprobs"] == pytest.approx(wanted[name]["logprobs"], abs=1e-4)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_rows(
    launch: Launcher, alone: dict[str, dict[str, Any]], tmp_path: Path, world: int
) -> None:
    ended = evaluate(launch, world, tmp_path)
    assert ended.statuses == [0] * world, ended.shown
    require_same(records(tmp_path), alone)
    assert ended.shown[1:] == [""] * (world - 1), "only the leader talks"
    assert '"n": 14' in ended.shown[0]


def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_with_others(
    launch: Launcher, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Rank 1 is killed as it puts records on the disk: those before are known, whoever goes on."""
    argv = ["eval", "Tiny", "--data", "data", "--protocol", "base", "--dtype", "float32", "--device", "cpu"]
    argv += ["--tasks", "mmlu", "--subjects", "abstract_algebra,astronomy", "--limit", "7", "--json"]
    ended = launch(2, *argv, "--out", tmp_path, at={1: {"signal": 9, "fsync": 3}})
    assert ended.statuses == [143, -9], ended.shown
    assert "answers are kept: the same command goes on" in ended.shown[0]
    parts = [file.name for file in (tmp_path / "records").iterdir()]
    assert any(".rank1." in name for name in parts)
    ended = evaluate(launch, 3, tmp_path)
    assert ended.statuses == [0, 0, 0], ended.shown
    known = re.search(r"14 items, (\d+) answered earlier", ended.shown[0])
    assert known is not None, ended.shown
    assert len(parts) <= int(known[1]) <= 14
    require_same(records(tmp_path), alone)


def test_generated_answers_are_shared_among_ranks(launch: Launcher, tmp_path: Path) -> None:
    options = ["--tasks", "gsm8k", "--limit", "4", "--shots", "0"]
    for world in (1, 2):
        ended = evaluate(launch, world, tmp_path / str(world), *options)
        assert ended.statuses == [0] * world, ended.shown
    one, two = (records(tmp_path / name) for name in "12")
    assert {name: record["output"] for name, record in one.items()} == {
        name: record["output"] for name, record in two.items()
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "agents"), [(2, 1), (3, 1), (2, 2)])
def test_eval_under_torchrun_itself(
    launch: Launcher, alone: dict[str, dict[str, Any]], tmp_path: Path, processes: int, agents: int
) -> None:
    argv = ["eval", "Tiny", "--data", "data", "--protocol", "base", "--dtype", "float32", "--device", "cpu"]
    argv += ["--tasks", "mmlu", "--subjects", "abstract_algebra,astronomy", "--limit", "7", "--json"]
    ended = torchrun(launch.folder, processes, *argv, "--out", tmp_path, agents=agents)
    assert [status for status, _ in ended] == [0] * agents, ended
    require_same(records(tmp_path), alone)
    (command,) = {row.details["command"] for row in read_rows(tmp_path)}
    nodes = f" --nnodes {agents}" if agents > 1 else ""
    each = processes // agents
    assert command.startswith(f"torchrun{nodes} --nproc-per-node {each} -m qwenq eval Tiny "), command
