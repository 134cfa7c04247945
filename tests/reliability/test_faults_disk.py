"""Disks that vanish, fill up, or refuse; clocks that jump. A clear message, and what was done stays done."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from quantize_shell import QuantizeShell
from tiny_families import write_calibration, write_family

from qwenq.errors import StorageError
from qwenq.evals.answer_log import AnswerLog, AnswerRecord
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.quantized_folder import LayerStore
from qwenq.results import Model, Row, append_row, read_rows
from qwenq.storage import atomic_write_bytes, locked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("disk") / "tiny")


@pytest.fixture
def quantize(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> QuantizeShell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    return QuantizeShell(monkeypatch, capsys, model)


@pytest.fixture
def calibration(model: Path, tmp_path: Path) -> Path:
    return write_calibration(model, tmp_path / "calibration.safetensors")


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


@contextmanager
def mounted(backing: Path, place: Path) -> Iterator[None]:
    backing.mkdir(exist_ok=True)
    place.mkdir(exist_ok=True)
    mount("--bind", backing, place)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.mounts
def test_an_output_disk_that_vanishes_and_comes_back(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backing, place = tmp_path / "backing", tmp_path / "disk"
    save = LayerStore.save

    def pulled_out(store: LayerStore, index: int, *rest: Any) -> None:
        if index == 1:
            subprocess.run(["umount", "-l", str(place)], check=True)
        save(store, index, *rest)

    with mounted(backing, place), monkeypatch.context() as patch:
        patch.setattr(LayerStore, "save", pulled_out)
        ran = quantize.refused("--calibration", calibration, "--out", place / "q")
    assert ran.code == 1
    assert "is gone" in ran.err
    assert not (place / "q").exists() and not (backing / "q").exists()
    assert not any(file.is_file() for file in place.rglob("*"))  # nothing was left on the disk below it
    with mounted(backing, place):
        again = quantize("--calibration", calibration, "--out", place / "q")
        assert again.code == 0, again.err
        assert "resuming: 1 of 3 layers" in again.out


@pytest.mark.mounts
def test_weights_whose_disk_vanishes(
    quantize: QuantizeShell, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "weights"
    save = LayerStore.save

    def pulled_out(store: LayerStore, index: int, *rest: Any) -> None:
        if index == 1:
            subprocess.run(["umount", "-l", str(place)], check=True)
        save(store, index, *rest)

    with mounted(model, place), monkeypatch.context() as patch:
        patch.setattr(LayerStore, "save", pulled_out)
        ran = quantize.refused("--calibration", calibration, "--out", "q", model=place)
    assert ran.code == 1
    assert "model.safetensors" in ran.err
    assert not Path("q").exists()
    with mounted(model, place):
        again = quantize("--calibration", calibration, "--out", "q", model=place)
        assert again.code == 0, again.err
        assert "resuming: 2 of 3 layers" in again.out


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_a_quota_or_an_error_at_any_flush(
    quantize: QuantizeShell, model: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """One flush of a run after the other is the one that fails; then the disk is well again."""
    flush, calls, out = os.fsync, [0], "q"
    assert open_checkpoint(model).fingerprint  # kept in the cache, whose flushes are nobody's worry
    for failing in (1, 3, 5, 8):
        calls[0] = 0

        def fsync(handle: int, failing: int = failing) -> None:
            calls[0] += 1
            if calls[0] == failing:
                raise OSError(number, os.strerror(number))
            flush(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            ran = quantize.refused("--calibration", calibration, "--out", out)
        assert ran.code == 1
        assert not Path(out).exists()
    assert quantize("--calibration", calibration, "--out", out).code == 0


def full_disk(place: Path) -> None:
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", place)


@pytest.mark.mounts
def test_records_and_rows_on_a_full_disk(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    full_disk(place)
    try:
        kept = fill(place)
        assert 0 < kept < 1000
        subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True)
        with AnswerLog(place, "t", {"k": 1}) as again:
            known = sum(again.find(str(number), "a") is not None for number in range(1000))
            assert known >= kept
            again.append(AnswerRecord("last", None, "a", 1))
        row = Row("kl", Model("M", "f", "int4", "F"), {}, 1.0, "nats/token")
        append_row(place, row)
        assert read_rows(place) == [row]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> int:
    """Records until the disk is full; how many were accepted."""
    number = 0
    with pytest.raises(StorageError, match="disk is full"), AnswerLog(place, "t", {"k": 1}) as records:
        for number in range(1000):
            records.append(AnswerRecord(str(number), None, "a", 1, output="x" * 200))
    row = Row("kl", Model("M", "f", "int4", "F"), {}, 1.0, "nats/token", settings={"long": "x" * 9000})
    with pytest.raises(StorageError, match="disk is full"):
        append_row(place, row)
    return number


@pytest.mark.mounts
def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    full_disk(place)
    try:
        atomic_write_bytes(place / "a", b"old")
        with pytest.raises(StorageError, match="disk is full"):
            atomic_write_bytes(place / "a", b"x" * 100_000)
        assert [(file.name, file.read_bytes()) for file in place.iterdir()] == [("a", b"old")]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_run_folder_is_one_commands_until_it_dies(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            (tmp_path / "ready").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        with pytest.raises(Exception, match="another"), locked(tmp_path):
            pass
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    with locked(tmp_path):  # the kernel let it go with the process; the file is still there
        assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("jump", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps_between_every_two_looks(
    quantize: QuantizeShell, calibration: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Durations are taken from a clock that only goes forward; the date decides nothing."""
    real, looks = time.time, [0]

    def jumping() -> float:
        looks[0] += 1
        return real() + jump * (looks[0] % 2)

    monkeypatch.setattr(time, "time", jumping)
    ran = quantize("--calibration", calibration, "--out", "q", "--json")
    assert ran.code == 0, ran.err
    import json

    seconds = json.loads((Path("q") / "qwenq.json").read_text())["seconds"]
    assert all(0 <= value < 600 for value in seconds.values()), seconds


def test_modification_times_of_another_century_are_only_names(
    quantize: QuantizeShell, model: Path, calibration: Path, tmp_path: Path
) -> None:
    """A folder copied with times of the future, or of 1970, is the same model: it resumes."""
    import shutil

    folder = Path(shutil.copytree(model, tmp_path / "copied"))
    first = quantize("--calibration", calibration, "--out", "a", model=folder)
    assert first.code == 0, first.err
    for moment in (0, 4_000_000_000):
        for file in folder.iterdir():
            os.utime(file, (moment, moment))
        ran = quantize("--calibration", calibration, "--out", f"b{moment}", model=folder)
        assert ran.code == 0, ran.err
        assert Path(f"b{moment}/model.safetensors").read_bytes() == Path("a/model.safetensors").read_bytes()
