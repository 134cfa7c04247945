"""``python -m qwenq.profiling.point``: measures the point on standard input, one JSON row a line.

Standard output carries rows and nothing else; what libraries print goes to standard error. With
``{"probe": device}`` it says what the plan needs to know of the device instead.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from qwenq.errors import OutOfMemoryError, QwenqError, UnsupportedError
from qwenq.profiling.points import Point
from qwenq.results import Row

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Read the request, answer it, and turn what goes wrong into rows."""
    _die_with_parent()
    began = time.monotonic()
    out = os.dup(1)
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())
    if request["parent"] != os.getppid():  # it was killed before this one asked to die with it
        sys.exit("the sweep is gone")
    if "probe" in request:
        _write(out, probe(request["probe"]))
        return
    point = Point.from_json(request["point"])
    done: list[str] = []
    try:
        for row in _rows(point, request.get("seconds"), request.get("meeting"), began):
            _write(out, row.to_json())
            done.append(row.metric)
    except Exception as error:  # whatever it is, it is this point's end and not the sweep's
        if os.environ.get("QWENQ_DEBUG"):
            raise
        status, reason = explain(error)
        left = [metric for metric in point.metrics if metric not in done]
        for row in point.without(status, reason, left, again=status == "failed"):
            _write(out, row.to_json())


def _rows(point: Point, seconds: float | None, meeting: str | None, began: float) -> Iterator[Row]:
    """Measured alone, or by the leader of several processes; the others give none.

    Args:
        seconds: for all of it; reading the libraries is part of that.
        began: when the clock of those seconds started.
    """
    from qwenq.profiling.measure import measure

    if seconds is not None:
        seconds -= time.monotonic() - began
    if meeting is None:
        yield from measure(point, seconds)
        return
    from qwenq.distributed import assembled
    from qwenq.profiling.loading import assist

    # The leader's parent, or torchrun's own process, holds the store already.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with assembled(point.device, meeting=meeting) as team:
        if team.leads:
            yield from measure(point, seconds, team)
        else:
            assist(point, team)


def _die_with_parent() -> None:
    """Have Linux kill this process with the sweep that waits for it, however that ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def explain(error: Exception) -> tuple[Any, str]:
    """Status and reason of a row, for what was raised."""
    if isinstance(error, UnsupportedError):
        return "unavailable", _sentence(error)
    if isinstance(error, QwenqError):
        prefix = "out of memory: " if isinstance(error, OutOfMemoryError) else ""
        return "failed", prefix + _sentence(error)
    name, text = type(error).__name__, (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "failed", f"out of memory: {text}" if text else "out of memory"
    return "failed", f"{name}: {text}" if text else name


def _sentence(error: QwenqError) -> str:
    return f"{error.what}; {error.hint}" if error.hint else error.what


def probe(device: str) -> dict[str, Any]:
    """Type of the device, bytes free on it, bytes per second of a copy, and operations per second.

    What is free is no more than a container grants. ``worked_seconds`` is what it took to find out, libraries
    read; ``error`` where there is no such device.
    """
    from qwenq.models.granted import free_memory
    from qwenq.models.precision import compute_dtype, resolve_device
    from qwenq.profiling.bandwidth import copy_bandwidth, matmul_rate

    began = time.monotonic()
    try:
        place = resolve_device(device)
    except QwenqError as error:
        return {"error": {"what": error.what, "where": error.where, "hint": error.hint}}
    if place.type == "cuda":
        import torch

        free = torch.cuda.mem_get_info(place)[0]
    else:
        free = free_memory()
    dtype = compute_dtype(place)
    return {
        "device": str(place),
        "free_bytes": free,
        "copy_bytes_per_s": copy_bandwidth(place, 3),
        "operations_per_s": matmul_rate(place, dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "worked_seconds": time.monotonic() - began,
    }


def _write(out: int, content: dict[str, Any]) -> None:
    data = (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    main()
