"""Starts `qwenq` commands in processes of their own and kills them after a while, from outside.

One JSON object per line on stdin, as for `zygote`, with ``signal`` and when to send it: ``kill_after``
seconds, or ``kill_at`` [folder, so many lines more in its *.jsonl]; null: never. One line on stdout for each:
the exit status and the seconds that it ran. Processes that the command starts are forked as well
(`forked_popen`). ``patience`` is how many seconds `profile` repeats one thing; then it copies little, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def moment(request: dict[str, Any]) -> Callable[[], bool]:
    """Whether the time of the signal has come; asked for before the command starts."""
    started, after = time.perf_counter(), request["kill_after"]
    if request["kill_at"] is None:
        return lambda: after is not None and time.perf_counter() >= started + after
    folder, more = Path(request["kill_at"][0]), request["kill_at"][1]
    there = lines_in(folder)
    return lambda: lines_in(folder) >= there + more


def lines_in(folder: Path) -> int:
    """Whole lines of rows, records and journals; `os.walk` takes folders that vanish meanwhile for empty."""
    count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".jsonl"):
                with suppress(FileNotFoundError):
                    count += Path(place, name).read_bytes().count(b"\n")
    return count


def ended(pid: int, come: Callable[[], bool]) -> int | None:
    """The exit status, or None if it still runs at that moment."""
    while not come():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def prepare(request: dict[str, Any]) -> None:
    """What the command finds changed; see above."""
    import forked_popen

    forked_popen.install()
    if (patience := request.get("patience")) is not None:
        from brief_profiles import changes

        for place, value in changes(patience).items():
            module, _, name = place.rpartition(".")
            setattr(import_module(module), name, value)


def serve() -> None:
    from zygote import child

    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        request = {"at": None, **json.loads(line)}
        started, come = time.perf_counter(), moment(request)
        pid = os.fork()
        if pid == 0:
            prepare(request)
            child(request)
        status = ended(pid, come)
        if status is None:
            os.kill(pid, request.get("signal", 9))
            status = ended(pid, lambda: False)
        print(json.dumps([status, time.perf_counter() - started]), flush=True)


if __name__ == "__main__":
    serve()
