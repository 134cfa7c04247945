"""kill -9 while rows are written: each row whose writing returned is there, and no half one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from qwenq.results import Model, Row, append_row, read_rows

KILLS = 20
Record = Callable[[str, object], None]


def test_rows_that_were_written_are_there_after_kill_9(tmp_path: Path, record_property: Record) -> None:
    """What `profile`, `eval` and `run` report with: each row whose writing returned, and no half one."""
    draw, lost, made = random.Random(9), 0, 0
    model = Model("M", "sha256:m", "int4", "F")
    for kill in range(KILLS):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            for number in range(100_000):
                point = {"kill": kill, "number": number}
                append_row(tmp_path, Row("speed.decode", model, point, 1.0, "tokens/s", reason="x" * 999))
                os.write(write, b".")
            os._exit(0)
        os.close(write)
        os.read(read, 1)
        time.sleep(draw.uniform(0.001, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = 1
        while part := os.read(read, 65536):
            acknowledged += len(part)
        os.close(read)
        numbers = {row.point["number"] for row in read_rows(tmp_path) if row.point["kill"] == kill}
        lost += len(set(range(acknowledged)) - numbers)
        made += len(numbers)
    assert made >= KILLS
    record_property("faults", KILLS)
    record_property("lost", lost)
    assert lost == 0
