"""Measure the point on standard input, in a process of its own: ``python -m qwenq.profiling.worker``.

Standard output carries one JSON row a line and nothing else; what libraries print goes to standard error.
A request ``{"probe": device}`` is answered with what the plan needs to know of the device.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from qwenq.errors import OutOfMemoryError, QwenqError, UnsupportedError
from qwenq.profiling.child import AHEAD
from qwenq.profiling.spec import Point
from qwenq.results import Row, Status
from qwenq.stopping import die_with_parent


def main() -> None:
    """Read the request and answer it; an error becomes rows."""
    die_with_parent()
    out = os.dup(1)
    os.dup2(2, 1)
    if AHEAD in sys.argv:
        import qwenq.profiling.measure  # noqa: F401 - what every point needs is read before there is one
    request = json.loads(sys.stdin.read())
    began = time.monotonic()
    if "probe" in request:
        _write(out, probe(request["probe"]))
        return
    point = Point.from_json(request["point"])
    done: list[str] = []
    try:
        for row in _rows(point, request["seconds"], began):
            _write(out, row.to_json())
            done.append(row.metric)
    except Exception as error:  # whatever it is, it ends this point and not the sweep
        if os.environ.get("QWENQ_DEBUG"):
            raise
        status, reason = explain(error)
        left = [metric for metric in point.metrics if metric not in done]
        for row in point.without(status, reason, left, again=status == "failed"):
            _write(out, row.to_json())


def _rows(point: Point, seconds: float | None, began: float) -> Iterator[Row]:
    """Yield the point's rows, on rank 0 where it has several processes.

    The time limit, ``seconds`` from ``began`` on, includes reading the libraries.
    """
    from qwenq.profiling.measure import measure

    if seconds is not None:
        seconds -= time.monotonic() - began
    if point.tp == 1:
        yield from measure(point, seconds)
        return
    from qwenq.distributed import process_group
    from qwenq.profiling.measure import assist

    with process_group(point.device) as team:
        if team.is_rank0:
            yield from measure(point, seconds, team)
        else:
            assist(point, team)


def explain(error: Exception) -> tuple[Status, str]:
    """Return status and reason of a row, for what was raised."""
    if isinstance(error, QwenqError):
        text = f"{error.what}; {error.hint}" if error.hint else error.what
        if isinstance(error, UnsupportedError):
            return "unavailable", text
        return "failed", f"out of memory: {text}" if isinstance(error, OutOfMemoryError) else text
    name, text = type(error).__name__, (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        name = "out of memory"
    return "failed", f"{name}: {text}" if text else name


def probe(device: str) -> dict[str, Any]:
    """Return what ``planning.Device`` holds of a device, but the seconds of a start.

    ``worked_seconds`` is what the probe took, libraries read; ``error`` is there where the device is not.
    """
    from qwenq.models.machine import compute_dtype, resolve_device
    from qwenq.profiling.meters import copy_bandwidth, matmul_rate
    from qwenq.runtime.memory import free_bytes

    began = time.monotonic()
    try:
        found = resolve_device(device)
    except QwenqError as error:
        return {"error": {"what": error.what, "where": error.where, "hint": error.hint}}
    dtype = compute_dtype(found)
    return {
        "device": str(found),
        "free_bytes": free_bytes(found),
        "copy_bytes_per_s": copy_bandwidth(found, 3),
        "operations_per_s": matmul_rate(found, dtype),
        "dtype": str(dtype).removeprefix("torch."),
        "worked_seconds": time.monotonic() - began,
    }


def _write(out: int, content: dict[str, Any]) -> None:
    data = (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    main()
