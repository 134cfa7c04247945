"""No process of qwenq outlives the one that started it, though kill -9 lets nobody clean up."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from qwenq.errors import QwenqError
from qwenq.evals.sandbox import run as sandboxes


def left_by(script: str, begun: Callable[[list[str]], bool], settle: float = 0) -> list[str]:
    """Start a script, kill it some seconds after the commands below it show that it has begun.

    Returns:
        What is left of these commands.
    """
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        below: list[psutil.Process] = []
        until = time.monotonic() + 120
        while not begun([shown(child) for child in below]):
            assert parent.poll() is None and time.monotonic() < until, [shown(child) for child in below]
            time.sleep(0.02)
            below = psutil.Process(parent.pid).children(recursive=True)
        time.sleep(settle)
        parent.kill()
    _, alive = psutil.wait_procs(below, timeout=20)
    return [shown(child) for child in alive]


def shown(child: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(child.cmdline())
    return ""


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_child_dies_with_its_parent(system: str, tmp_path: Path) -> None:
    child = (
        f"import pathlib, sys, time; sys.platform = {system!r}; from qwenq.stopping import die_with_parent\n"
    )
    child += f"die_with_parent(); pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(300)"
    script = (
        "import subprocess, sys, time; from qwenq.stopping import with_parent\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env=with_parent()); time.sleep(300)"
    )
    assert left_by(script, lambda _: (tmp_path / "begun").exists()) == []


@pytest.mark.parametrize("way", ["_bubblewrap", "_namespaces"])
def test_programs_die_with_the_evaluation(way: str) -> None:
    try:
        sandboxes._try(getattr(sandboxes, way)())
    except QwenqError as error:
        pytest.skip(error.what)
    script = (
        "from qwenq.evals.sandbox import run\n"
        "program = run.Program('x', 'import time; time.sleep(300)', ('double',), 'double(1)')\n"
        f"run.run_programs([program], sandbox=run.{way}(), jobs=1, timeout=60)\n"
    )
    inside = "qwenq.evals.sandbox.inside"
    assert left_by(script, lambda below: sum(inside in command for command in below) >= 4, settle=2) == []
