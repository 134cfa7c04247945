"""Disks that are full, read-only, or refuse: a clear message, and finished layers stay."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from quantize_shell import QuantizeShell


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A real file system of that size."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.mounts
@pytest.mark.parametrize("kilobytes", [40, 120])
def test_a_disk_that_is_full_half_way_keeps_finished_layers(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path, kilobytes: int
) -> None:
    """40 KB: while layers are written; 120 KB: when the checkpoint is."""
    with small_disk(tmp_path, kilobytes) as disk:
        ran = quantize.refused("--calibration", calibration, "--out", disk / "q")
        assert ran.code == 1
        assert re.search(r"the disk is full|not enough space", ran.err)
        assert "free" in ran.err
        assert not (disk / "q").exists()
        kept = len(list((disk / "q.partial" / "layers").glob("*.json")))
        assert kept == 3 if kilobytes > 100 else 1 <= kept < 3
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        again = quantize("--calibration", calibration, "--out", disk / "q")
        assert again.code == 0, again.err
        assert f"resuming: {kept} of 3 layers" in again.out


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails, as on a disk that refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_refuses_the_final_file_keeps_finished_layers(
    quantize: QuantizeShell, calibration: Path
) -> None:
    with largest_file(60_000):
        ran = quantize.refused("--calibration", calibration, "--out", "q")
    assert ran.code == 1
    assert "grew larger" in ran.err
    assert not Path("q").exists()
    again = quantize("--calibration", calibration, "--out", "q")
    assert again.code == 0, again.err
    assert "resuming: 3 of 3 layers" in again.out


@pytest.mark.mounts
def test_an_output_on_a_read_only_disk(quantize: QuantizeShell, calibration: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, 400) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ran = quantize.refused("--calibration", calibration, "--out", disk / "deep" / "q")
        assert ran.code == 1
        assert "may not be written" in ran.err or "read-only" in ran.err
        assert "  layer " not in ran.out  # known before any work


@pytest.mark.plain_user
def test_an_output_where_one_may_not_write(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    ran = quantize.refused("--calibration", calibration, "--out", tmp_path / "locked" / "q")
    assert ran.code == 1
    assert "may not be written" in ran.err


def test_an_output_below_a_file(quantize: QuantizeShell, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = quantize.refused("--calibration", calibration, "--out", tmp_path / "file" / "q")
    assert ran.code == 1
