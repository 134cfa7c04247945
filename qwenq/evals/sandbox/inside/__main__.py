"""Run as ``python -m … solution LIMITS`` (socket on stdin) or ``… tests LIMITS SOCKET`` (job on stdin)."""

from __future__ import annotations

import json
import os
import sys

from qwenq.evals.sandbox.inside.confine import confine
from qwenq.evals.sandbox.inside.solution import serve
from qwenq.evals.sandbox.inside.tests import examine
from qwenq.evals.sandbox.inside.wire import Broken, receive


def main() -> None:
    """Close the standard streams, set the limits, then run the role."""
    role, limits = sys.argv[1], json.loads(sys.argv[2])
    if role == "solution":
        channel = os.dup(0)
        _silence()
        confine(limits)
        try:
            serve(channel)
        except Broken:
            os._exit(1)
        os._exit(0)  # not through atexit and threads of the solution's: whatever they do, it is over
    channel = int(sys.argv[3])
    job = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    receive(channel)  # the other side is ready; an end here means that its sandbox failed
    _silence()
    confine(limits)
    os.write(verdict, b'{"started": true}\n')
    os.write(verdict, json.dumps(examine(job, channel)).encode() + b"\n")
    os._exit(0)


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.close(nothing)


if __name__ == "__main__":
    main()
