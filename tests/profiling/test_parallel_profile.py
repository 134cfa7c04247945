"""``torchrun … -m qwenq profile --tp 2``: rows of both kinds of points, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from teams import Launcher, launcher

from qwenq.results import read_rows

ENGINE = ("--engine", "transformers", "--device", "cpu")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launcher(tmp_path_factory.mktemp("parallel"), ["qwenq.profiling.measure"]) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_measure_one_model(launch: Launcher, tiny: Path, tmp_path: Path) -> None:
    lengths = ("--tokens", 8, "--encode", 16, "--precision", "fp32", "--budget", "60s")  # for slow machines
    ended = launch(2, "profile", tiny, *lengths, *ENGINE, "--tp", 2, "--out", tmp_path / "run")
    assert ended.statuses == [0, 0], ended.shown
    assert ended.shown[1] == ""
    rows = {(row.metric, row.point["tokens"]): row for row in read_rows(tmp_path / "run")}
    for metric in (("speed.decode", 8), ("speed.protocol", 8), ("memory.generate", 8), ("speed.prefill", 1)):
        assert rows[metric].status == "ok", rows[metric].reason
        assert rows[metric].point["tp"] == 2
        assert "2 processes" in rows[metric].implementation
    command = rows["speed.decode", 8].details["command"]
    assert command.startswith(f"torchrun --nproc-per-node 2 -m qwenq profile {tiny} "), command
    assert rows["energy.token", 8].reason == "the energy of several devices is not added up"
    again = launch(2, "profile", tiny, *lengths, *ENGINE, "--tp", 2, "--out", tmp_path / "run")
    assert again.statuses == [0, 0]
    assert "2 of 2 points were measured earlier" in again.shown[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--precision", "fp32", *ENGINE), "--tp 1, but torchrun started 2 processes"),
        (("--precision", "fp32", *ENGINE, "--tp", 4), "--tp 4, but torchrun started 2 processes"),
        (("--precision", "fp32", "--device", "cpu", "--tp", 2), "the engine fast runs on one device"),
        (("--precision", "int4", *ENGINE, "--tp", 2), "packed weights cannot be split between processes"),
        (("--precision", "int3", *ENGINE, "--tp", 2), "there is no precision 'int3'"),
    ],
)
def test_misuse_is_said_once(
    launch: Launcher, tiny: Path, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    ended = launch(2, "profile", tiny, *options, "--out", tmp_path / "run")
    assert ended.statuses == [2, 2], ended.shown
    assert said in ended.shown[0]
    assert ended.shown[1] == ""
    assert not (tmp_path / "run").exists()


def test_without_torchrun_it_says_how(launch: Launcher, tiny: Path, tmp_path: Path) -> None:
    ended = launch(1, "profile", tiny, *ENGINE, "--tp", 2, "--out", tmp_path / "run")
    assert ended.statuses == [2]
    assert "torchrun --nproc-per-node 2 -m qwenq profile" in ended.shown[0]
