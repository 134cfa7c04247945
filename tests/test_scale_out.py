"""`qwenq quantize` on several processes: the integers of one, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from teams import Ended, Launcher, launcher, torchrun
from tiny_families import write_calibration, write_family

LAYERS = 3
SAMPLES, SEQ_LEN = 7, 700  # two sequences a batch: four batches, the last one shorter


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with launcher(tmp_path_factory.mktemp("team"), ["torch.distributed"]) as ready:
        model = write_family(ready.folder / "tiny", num_hidden_layers=LAYERS, max_position_embeddings=1024)
        write_calibration(model, ready.folder / "cal.safetensors", samples=SAMPLES, seq_len=SEQ_LEN)
        yield ready


def quantize(launch: Launcher, world: int, out: Path, *options: str) -> Ended:
    return launch(world, "quantize", "tiny", "--calibration", "cal.safetensors", "--out", out, *options)


@pytest.fixture(scope="module")
def alone(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("alone") / "out"
    ended = quantize(launch, 1, out)
    assert ended.statuses == [0], ended.shown
    return hashes(out)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the card, which names the folder, and the manifest; of that, what modules cost."""
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name not in ("qwenq.json", "README.md")
    }
    return found | {"modules": json.dumps(json.loads((folder / "qwenq.json").read_text())["modules"])}


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bits(
    launch: Launcher, alone: dict[str, str], tmp_path: Path, world: int
) -> None:
    ended = quantize(launch, world, tmp_path / "out")
    assert ended.statuses == [0] * world, ended.shown
    assert hashes(tmp_path / "out") == alone
    assert ended.shown[0].count("layer ") >= LAYERS
    assert ended.shown[1:] == [""] * (world - 1), "only the leader talks"


def test_bits_chosen_for_a_size_are_the_same_on_every_rank(launch: Launcher, tmp_path: Path) -> None:
    """Only the leader measures and chooses."""
    for world in (1, 2):
        ended = quantize(launch, world, tmp_path / f"out{world}", "--budget", "6.5")
        assert ended.statuses == [0] * world, ended.shown
        assert "groups of linear layers have 8 bits" in ended.shown[0]
    assert '"bits": 8' in (tmp_path / "out2" / "config.json").read_text()
    assert hashes(tmp_path / "out2") == hashes(tmp_path / "out1")


def test_a_run_goes_on_with_another_number_of_processes(
    launch: Launcher, alone: dict[str, str], tmp_path: Path
) -> None:
    """Two processes, the leader killed after its second layer; then three; then it is whole."""
    at = {0: {"signal": signal.SIGKILL, "print": "layer 2 of 3"}}
    argv = ["quantize", "tiny", "--calibration", "cal.safetensors", "--out", tmp_path / "out"]
    ended = launch(2, *argv, at=at)
    assert ended.statuses[0] == -signal.SIGKILL
    assert ended.statuses[1] == 1
    assert "disappeared" in ended.shown[1]
    assert "Traceback" not in ended.shown[1]
    ended = launch(3, *argv)
    assert ended.statuses == [0, 0, 0], ended.shown
    assert "resuming: 2 of 3 layers" in ended.shown[0]
    assert hashes(tmp_path / "out") == alone


@pytest.mark.parametrize("rank", [0, 1])
def test_all_stop_behind_the_same_layer_whoever_got_sigterm(
    launch: Launcher, alone: dict[str, str], tmp_path: Path, rank: int
) -> None:
    at = {"signal": signal.SIGTERM, "call": "qwenq.gptq.pipeline:_Layer.solve", "number": 6}  # in layer 2
    argv = ["quantize", "tiny", "--calibration", "cal.safetensors", "--out", tmp_path / "out"]
    ended = launch(2, *argv, at={rank: at})
    assert ended.statuses == [143, 143], ended.shown
    assert "finished layers are kept: the same command goes on where it stopped" in ended.shown[0]
    assert "Traceback" not in "".join(ended.shown)
    ended = launch(1, *argv)
    assert ended.statuses == [0], ended.shown
    assert "resuming: 2 of 3 layers" in ended.shown[0]
    assert hashes(tmp_path / "out") == alone


def test_an_error_on_one_rank_ends_all_and_is_said_once(launch: Launcher, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "something").write_text("of mine")
    ended = quantize(launch, 3, tmp_path / "out")
    assert ended.statuses == [2, 2, 2], ended.shown
    assert "holds something else" in ended.shown[0]
    assert ended.shown[1:] == ["", ""]


def test_an_error_that_all_have_is_said_once(launch: Launcher, tmp_path: Path) -> None:
    ended = quantize(launch, 2, tmp_path / "out", "--device", "cuda:1")
    assert ended.statuses == [2, 2]
    assert "cuda:1 with 2 processes" in ended.shown[0]
    assert ended.shown[1] == ""


def test_a_command_that_shares_nothing_is_refused(launch: Launcher) -> None:
    ended = launch(2, "plan", "qwen2.5-7b")
    assert ended.statuses == [2, 2]
    assert "runs as one process" in ended.shown[0]


def test_more_processes_than_batches_are_refused(launch: Launcher, tmp_path: Path) -> None:
    ended = quantize(launch, 5, tmp_path / "out")
    assert set(ended.statuses) == {2}, ended.shown
    said = [shown for shown in ended.shown if "5 processes, but the calibration text is 4 batches" in shown]
    assert len(said) == 1


def test_a_model_that_is_another_one_elsewhere_is_refused(launch: Launcher, tmp_path: Path) -> None:
    """As on two machines without a shared disk: rank 1 has another folder under the same name."""
    elsewhere = tmp_path / "elsewhere"
    write_family(elsewhere / "tiny", num_hidden_layers=LAYERS, dtype="bfloat16")
    argv = ["quantize", "tiny", "--calibration", "cal.safetensors", "--out", tmp_path / "out"]
    ended = launch(2, *argv, folders={1: elsewhere})
    assert ended.statuses == [1, 1], ended.shown
    assert "rank 1: the model here is not the one that rank 0 has" in ended.shown[1]
    assert "Traceback" not in ended.shown[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("processes", "agents"), [(2, 1), (3, 1), (2, 2)])
def test_torchrun_itself(
    launch: Launcher, alone: dict[str, str], tmp_path: Path, processes: int, agents: int
) -> None:
    """Two agents are what two machines have: they find each other over the network, here loopback."""
    argv = ["quantize", "tiny", "--calibration", "cal.safetensors", "--device", "cpu"]
    ended = torchrun(launch.folder, processes, *argv, "--out", tmp_path / "out", agents=agents)
    assert [status for status, _ in ended] == [0] * agents, ended
    assert hashes(tmp_path / "out") == alone


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_torchrun_stores_the_layer_in_progress(
    launch: Launcher, alone: dict[str, str], tmp_path: Path
) -> None:
    """The scheduler tells the launcher and the processes alike, and the launcher tells them again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "qwenq", "quantize", "tiny", "--calibration", "cal.safetensors", "--device", "cpu"]
    run = subprocess.Popen(
        [*command, "--out", tmp_path / "out"],
        cwd=launch.folder, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        if "layer 1 of 3" in line:
            os.killpg(run.pid, signal.SIGTERM)
    shown = "".join(said)
    assert run.wait() != 0
    assert "finished layers are kept: the same command goes on where it stopped" in shown
    ended = quantize(launch, 2, tmp_path / "out")
    assert ended.statuses == [0, 0], ended.shown
    assert "of 3 layers are already in" in ended.shown[0]
    assert hashes(tmp_path / "out") == alone
