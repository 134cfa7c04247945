"""A process that starts commands of qwenq and kills them: see `forks`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

HERE = Path(__file__).parent
KILLS = 20
Record = Callable[[str, object], None]


class Starter:
    """Commands in processes of their own that may be killed on their way."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder = folder
        environment = os.environ | {"OMP_NUM_THREADS": "1", "QWENQ_CACHE": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, HERE / "forks.py", *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parents[1],
        )  # fmt: skip

    def __call__(
        self,
        *arguments: object,
        after: float | None = None,
        at: tuple[Path, int] | None = None,
        number: int = signal.SIGKILL,
        patience: float | None = None,
    ) -> tuple[int, float, str]:
        """Run a command, and send it a signal: its status, seconds and words.

        Args:
            after: seconds. How far the command is by then depends on the machine, and on what else it does.
            at: a run folder, and how many rows, records or steps more than now it has by then: that far the
                command is on any machine.
        """
        output = self.folder / "output.txt"
        argv = [str(argument) for argument in arguments]
        request = {"argv": argv, "cwd": str(self.folder), "output": str(output)}
        when = {"kill_after": after, "kill_at": at and (str(at[0]), at[1])}
        line = json.dumps(request | when | {"signal": int(number), "patience": patience})
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds, output.read_text()

    def left(self) -> list[int]:
        """Processes that a command started and that outlived it: none, once those killed with it are gone."""
        until = time.monotonic() + 30
        while found := [child.pid for child in psutil.process_iter() if self._one_of_ours(child)]:
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        return found

    def _one_of_ours(self, child: psutil.Process) -> bool:
        with suppress(psutil.Error):
            same = child.pid != self.process.pid and str(HERE / "forks.py") in child.cmdline()
            return same and child.environ().get("QWENQ_CACHE") == str(self.folder / "cache")
        return False

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
