"""Tests that this process may not run, run where they may: as root of a namespace, or as nobody.

``@pytest.mark.mounts``: needs to mount; where that is refused, `unshare -rm` gives a user who may, if the
kernel lets anybody have one. ``@pytest.mark.plain_user``: has to be refused what root is not; root runs it as
nobody. Where neither can be had the test is skipped, and says why.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

INSIDE = "QWENQ_TEST_ELSEWHERE"
NAMESPACE = ("unshare", "--map-root-user", "--mount")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@cache
def may_mount() -> bool:
    """Whether this process can mount a disk in memory."""
    with tempfile.TemporaryDirectory() as folder:
        if refusal(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder]) is not None:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


def refusal(command: Sequence[str]) -> str | None:
    """Why a command does not work here; None: it does."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"status {done.returncode}") if done.returncode else None


def way_for(item: pytest.Item) -> tuple[str, ...]:
    """How a test has to be started; nothing: as it is."""
    if INSIDE in os.environ:
        return ()
    if item.get_closest_marker("mounts") and not may_mount():
        return NAMESPACE
    if item.get_closest_marker("plain_user") and getattr(os, "geteuid", lambda: 1)() == 0:
        return NOBODY
    return ()


def run_there(item: pytest.Item, way: tuple[str, ...]) -> None:
    """Run one test in a pytest of its own, started so; it passes, fails or is skipped as there."""
    if why := refusal([*way, "true"]):
        pytest.skip(f"{' '.join(way)} is refused: {why}")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        command = [*way, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = subprocess.run(
            [*command, "--basetemp", f"{folder}/tests", item.nodeid],
            cwd=item.config.rootpath, env=kept | {INSIDE: "1", "HOME": folder},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode == 0 and re.search(r"\b1 passed\b", done.stdout):
        return
    if done.returncode == 0:
        pytest.skip(f"skipped under {' '.join(way)}: {done.stdout[-300:]}")
    pytest.fail(f"under {' '.join(way)}:\n{done.stdout}{done.stderr}", pytrace=False)
