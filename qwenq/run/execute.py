"""Run the steps of a recipe, each in a child process, and none of them twice.

A step's memory and crashes stay in its process; what counts is what it wrote. A journal beside the results
lists the steps that ended, under a fingerprint of all that decides them: command, version, files read.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
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
    """Return whether what the step makes exists, and by the journal was made by this very step."""
    if step.always or not step.makes.exists():
        return False
    if step.whole:
        return True
    end = _journal(chain.work).get(step.name)
    return end is not None and end.fingerprint == step.fingerprint() and end.rows <= _rows(chain.work)


def run_chain(chain: Chain, listener: Listener = silent) -> int:
    """Run the steps that are not done; stop at the first that fails.

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
            _discard_leftover(step)
            _link(step)
            continue
        listener(Start(step.name, len(chain.steps), "steps", number - 1))
        if step.always and not fresh:
            listener(Notice("it judges earlier results; after a change of the code, use an empty folder"))
        fresh = True
        started = time.monotonic()
        if step.records:
            model, run, command = step.arguments
            with ProcessPoolExecutor(1, get_context("spawn")) as child:  # it loads torch
                child.submit(append_check, Path(model), Path(run), command).result()
            code, stopped = 0, False
        else:
            code, stopped = _execute(step)
        if code != 0:
            listener(Notice(f"{step.name} ended with exit code {code}; the same command continues here"))
            return code
        _link(step)
        _append_to_journal(chain.work, step, time.monotonic() - started)
        if stopped:  # it came when the step had done its work, and still applies
            signal.raise_signal(signal.SIGTERM)
    return 0


def append_check(model: Path, run: Path, command: str) -> None:
    """Append the check that `qwenq quantize` made of a model to the rows of a run, unless they are there.

    Args:
        model: the quantised folder.
        run: the run folder.
        command: that quantised it, for the rows.

    Raises:
        CorruptFileError: the folder has no manifest with a check, or its bytes are others.
    """
    import torch

    from qwenq.evals.recorded import record_check
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import result_model

    record_check(model, result_model(open_checkpoint(model), torch.float32, str(model)), run, command)


def _link(step: Step) -> None:
    """Point the step's alias at what it made, in one move; a file or folder of that name stays."""
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


def _discard_leftover(step: Step) -> None:
    """Remove the work folder of a model that was killed just after the model got its name."""
    leftover = step.makes.with_name(f"{step.makes.name}{PARTIAL}")
    if step.whole and leftover.is_dir():
        from qwenq.gptq.layer_store import discard_leftover

        discard_leftover(leftover)


def _execute(step: Step) -> tuple[int, bool]:
    """Run a step's command; Ctrl-C and SIGTERM reach it, and it may save its work; it dies with this one.

    Returns:
        Its exit code, and whether SIGTERM came.
    """
    command = [sys.executable, "-m", step.module, *step.arguments]
    running: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        for child in running:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)  # first, or one that comes now would reach nobody
    try:
        with subprocess.Popen(command, env={**os.environ, STEP_OF: str(os.getpid())}) as child:
            running.append(child)
            if received:
                child.send_signal(signal.SIGTERM)
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.wait()  # a terminal sends the signal to both
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code, bool(received)


@dataclass(frozen=True)
class _End:
    """Entry of the journal: fingerprint of the step, and size of the file of rows then, which only grows."""

    fingerprint: str
    rows: int


def _rows(work: Path) -> int:
    """Return the bytes of the run's rows; fewer than a step left there: the file was begun anew since."""
    path = work / RESULTS_FILE
    return path.stat().st_size if path.exists() else 0


def _journal(work: Path) -> dict[str, _End]:
    """Return the last entry of each step; a line that a kill cut off is skipped."""
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


def _append_to_journal(work: Path, step: Step, seconds: float) -> None:
    """Append a finished step, flushed to the disk."""
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
