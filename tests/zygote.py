"""Starts `qwenq` commands in processes of their own without importing torch for each: it forks.

One JSON object per line on stdin: ``{"argv": […], "cwd": …, "output": path, "at": {…}}``; one integer per
line on stdout: the exit status, negative for a signal. ``at`` says when the process sends itself a signal:
``{"signal": 9, "fsync": 5}`` at its 5th fsync, ``{"signal": 15, "print": "text"}`` after printing a text,
``{"signal": 15, "call": "module:Class.method", "number": 3}`` before that is called for the third time, with
``"again": 1.5`` once more after so many seconds.
A list of such objects, each with an ``environment`` if need be, runs all at once; the answer is a list, too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from importlib import import_module
from typing import Any


def arm(at: dict[str, Any]) -> None:
    """Make this process send itself the signal at the place that ``at`` names."""
    flush, calls = os.fsync, [0]

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] == at["fsync"]:
            os.kill(os.getpid(), at["signal"])
        flush(handle)

    write = sys.stdout.write

    def watched(text: str) -> int:
        count = write(text)
        if at["print"] in text:
            sys.stdout.flush()
            os.kill(os.getpid(), at["signal"])
        return count

    if "fsync" in at:
        os.fsync = fsync
    if "call" in at:
        arm_call(at)
    if "print" in at:
        sys.stdout.write = watched  # type: ignore[method-assign]


def arm_call(at: dict[str, Any]) -> None:
    """Send the signal before a function is called for the so manieth time."""
    module, _, path = at["call"].partition(":")
    *holders, name = path.split(".")
    holder: Any = import_module(module)
    for one in holders:
        holder = getattr(holder, one)
    function, calls = getattr(holder, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at["number"]:
            os.kill(os.getpid(), at["signal"])
            if "again" in at:
                time.sleep(at["again"])
                os.kill(os.getpid(), at["signal"])
        return function(*arguments, **options)

    setattr(holder, name, counted)


def child(request: dict[str, Any]) -> None:
    """Become the command; never returns."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(request["cwd"])
    os.environ.update(request.get("environment") or {})
    sys.argv = ["qwenq", *request["argv"]]
    arm(request["at"] or {})
    from qwenq.cli import main

    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        code = 99
    sys.stdout.flush()
    os._exit(code or 0)


def serve() -> None:
    """Answer requests until stdin closes."""
    import transformers.models.llama.modeling_llama  # noqa: F401  what all commands load, loaded once

    import qwenq.evals.check
    import qwenq.gptq.pipeline  # noqa: F401

    for name in sys.argv[1:]:
        import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        requests = asked if isinstance(asked, list) else [asked]
        held = store_for(requests[0].get("environment") or {})  # lives as long as its processes
        started = [start(request) for request in requests]
        ended = wait_for(started)
        del held
        print(json.dumps(ended if isinstance(asked, list) else ended[0]), flush=True)


def wait_for(started: list[int]) -> list[int]:
    """Exit statuses. When one fails, the others are told to end two seconds later, as torchrun does."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(started):
        pid, status = os.waitpid(-1, 0)
        statuses[pid] = os.waitstatus_to_exitcode(status)
        left = [other for other in started if other not in statuses]
        if statuses[pid] and left:
            threading.Timer(2.0, end, [left, statuses]).start()
    return [statuses[pid] for pid in started]


def end(pids: list[int], statuses: dict[int, int]) -> None:
    """SIGTERM for those of whom nothing has been heard since."""
    for pid in pids:
        if pid not in statuses:
            os.kill(pid, signal.SIGTERM)


def store_for(environment: dict[str, str]) -> Any:
    """The key-value store that torchrun's own process holds for its ranks."""
    if "MASTER_PORT" not in environment:
        return None
    from torch.distributed import TCPStore

    place = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return TCPStore(*place, is_master=True, wait_for_workers=False)


def start(request: dict[str, Any]) -> int:
    """The process id of a command that runs."""
    pid = os.fork()
    if pid == 0:
        child(request)
    return pid


if __name__ == "__main__":
    serve()
