"""Doing the steps of a chain, each in a process of its own, none of them twice.

What a step costs in memory, and whether it crashes, is its own affair; what it has made counts by what is on
the disk. A journal beside the results says which steps came to their end, under a fingerprint of everything
that decides them: the command, the version, the files it reads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import FrameType

from qwenq.events import Listener, Notice, Start, silent
from qwenq.models.manifest import PARTIAL
from qwenq.results import RESULTS_FILE
from qwenq.run.chain import Chain, Step
from qwenq.storage import guard_storage, locked

JOURNAL = "journal.jsonl"
LOCK = "run.lock"
"""Not the steps' own, which they hold in the same folder."""
STEP_OF = "QWENQ_STEP_OF"
"""Environment variable of a step: the process that it belongs to, see ``cli.app``."""


def is_done(chain: Chain, step: Step) -> bool:
    """Whether what the step makes is there, and the journal says that it is of this very step."""
    if step.always or not step.makes.exists():
        return False
    if step.whole:
        return True
    end = _journal(chain.work).get(step.name)
    return end is not None and end.fingerprint == step.fingerprint() and end.rows <= _rows(chain.work)


def run_chain(chain: Chain, listener: Listener = silent) -> int:
    """Do what is not done; the first step that fails ends it.

    Returns:
        The exit code of the last step: 0, or that of the one that failed.

    Raises:
        UsageError: another `qwenq run` works in this run folder.
        StorageError: the disk refused.
    """
    with locked(chain.work, LOCK):
        return _run_steps(chain, listener)


def _run_steps(chain: Chain, listener: Listener) -> int:
    fresh = len(chain.steps) == 1
    for number, step in enumerate(chain.steps, 1):
        if is_done(chain, step):
            _tidy(step)
            _lead_to(step)
            continue
        listener(Start(step.name, len(chain.steps), "steps", number - 1))
        if step.always and not fresh:
            listener(Notice("it judges earlier results; after a change of the code, use an empty folder"))
        fresh = True
        started = time.monotonic()
        code, stopped = _execute(step)
        if code != 0:
            listener(Notice(f"{step.name} ended with exit code {code}; the same command goes on from here"))
            return code
        _lead_to(step)
        _note(chain.work, step, time.monotonic() - started)
        if stopped:  # it came when the step had done its work, and is still meant
            signal.raise_signal(signal.SIGTERM)
    return 0


def _lead_to(step: Step) -> None:
    """Point the step's alias at what it has made, in one move; what is no link is somebody's, and stays."""
    if step.alias is None or not step.makes.exists():
        return
    alias, target = step.alias, os.path.relpath(step.makes, step.alias.parent)
    if alias.is_symlink() and str(alias.readlink()) == target:
        return
    if alias.exists() and not alias.is_symlink():
        return
    fresh = alias.with_name(f".{alias.name}.{os.getpid()}")
    with guard_storage(alias):
        fresh.unlink(missing_ok=True)  # of a process of that number that was killed here
        fresh.symlink_to(target, target_is_directory=True)
        fresh.replace(alias)


def _tidy(step: Step) -> None:
    """A kill may have come between a model's name and the end of its work folder, and nobody looks again."""
    leftover = step.makes.with_name(f"{step.makes.name}{PARTIAL}")
    if step.whole and leftover.is_dir():
        from qwenq.gptq.layer_store import discard_leftover

        discard_leftover(leftover)


def _execute(step: Step) -> tuple[int, bool]:
    """Run a step; Ctrl-C and SIGTERM reach it, and it may save what it has. It dies with this process.

    Returns:
        Its exit code, and whether SIGTERM came.
    """
    command = [sys.executable, "-m", step.module, *step.arguments]
    running: list[subprocess.Popen[bytes]] = []
    told: list[int] = []

    def tell(number: int, _: FrameType | None) -> None:
        told.append(number)
        for child in running:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, tell)  # first, or one that comes now would reach nobody
    try:
        with subprocess.Popen(command, env={**os.environ, STEP_OF: str(os.getpid())}) as child:
            running.append(child)
            if told:
                child.send_signal(signal.SIGTERM)
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.wait()  # a terminal has told it, too
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code, bool(told)


@dataclass(frozen=True)
class _End:
    """Of a step: under which fingerprint, and how large the file of rows was then, which only grows."""

    fingerprint: str
    rows: int


def _rows(work: Path) -> int:
    """Bytes of the run's rows: fewer than a step has left there are another file's, begun anew since."""
    path = work / RESULTS_FILE
    return path.stat().st_size if path.exists() else 0


def _journal(work: Path) -> dict[str, _End]:
    """Step → its last good end; a line that a kill tore is no end."""
    try:
        lines = (work / JOURNAL).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    ends: dict[str, _End] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            ends[entry["step"]] = _End(entry["fingerprint"], int(entry.get("rows", 0)))
        except (ValueError, TypeError, KeyError):
            continue
    return ends


def _note(work: Path, step: Step, seconds: float) -> None:
    """A finished step, flushed to the disk."""
    entry = {
        "step": step.name,
        "fingerprint": step.fingerprint(),
        "rows": _rows(work),
        "command": [step.module, *step.arguments],
        "seconds": round(seconds, 1),
        "date": date.today().isoformat(),
    }
    path = work / JOURNAL
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    with guard_storage(path, len(line)):
        work.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            torn = file.read(1) not in {b"", b"\n"}  # a kill left a line without its end
            file.write((b"\n" if torn else b"") + line.encode(errors="replace"))  # a folder may be any bytes
            file.flush()
            os.fsync(file.fileno())
