"""Starts `qwenq` commands in processes of their own and kills them after a while, from outside.

One JSON object per line on stdin, as for `zygote`, with ``kill_after`` seconds (null: never) and ``signal``;
one line on stdout for each: the exit status and the seconds that it ran. Processes that the command starts
are forked as well (`forked_popen`). ``patience`` is how many seconds `profile` repeats one thing; then it
copies little, too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def ended(pid: int, until: float | None) -> int | None:
    """The exit status, or None if it still runs at that moment."""
    while until is None or time.perf_counter() < until:
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
        measure = import_module("qwenq.profiling.measure")
        measure.PATIENCE = measure.PROTOCOL_PATIENCE = patience
        import_module("qwenq.profiling.bandwidth")._BYTES["cpu"] = 1 << 20


def serve() -> None:
    from zygote import child

    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        request = {"at": None, **json.loads(line)}
        started = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            prepare(request)
            child(request)
        after = request["kill_after"]
        status = ended(pid, None if after is None else started + after)
        if status is None:
            os.kill(pid, request.get("signal", 9))
            status = ended(pid, None)
        print(json.dumps([status, time.perf_counter() - started]), flush=True)


if __name__ == "__main__":
    serve()
