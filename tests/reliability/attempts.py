"""Trying a reader on bytes from a stranger: it may refuse with a message, and may do nothing worse.

``attempt`` lets a reader run with a limit on new address space, and looks at how far its memory grew. What
is not a ``QwenqError`` goes through to the test, and so does a reader that takes more memory than its input
justifies. How often it is done is set by $QWENQ_FUZZ_EXAMPLES (default 100): with it, examples are random;
without, they are the same every time.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from qwenq.errors import QwenqError

GIVEN = os.environ.get("QWENQ_FUZZ_EXAMPLES")
EXAMPLES = int(GIVEN or 100)
LINUX = sys.platform == "linux"
FREE_MEMORY = 96_000_000  # what libraries and the allocator may take once, whatever the input
PER_BYTE = 60  # Python objects of a JSON text take up to 40 times its bytes
NEW_ADDRESSES = 3 << 30
SLOWEST = 30.0  # seconds of computing, whatever else the machine does; nothing here takes one


@dataclass
class Tally:
    """What one test tried."""

    tried: int = 0
    refused: int = 0
    most_bytes: int = 0
    slowest: float = 0.0


def budget(share: float = 1.0) -> Any:
    """hypothesis' settings for a test that takes this share of the budget."""
    return settings(
        max_examples=max(5, round(EXAMPLES * share)),
        deadline=None,
        derandomize=GIVEN is None,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example,
            HealthCheck.data_too_large,
        ],
    )  # fmt: skip


def attempt(tally: Tally, nbytes: int, read: Callable[[], object]) -> bool:
    """Whether ``read`` accepted its input; a refusal has to be a ``QwenqError`` that says something."""
    before = _resident("VmRSS")
    _forget_peak()
    started = time.process_time()
    accepted = True
    try:
        with _few_new_addresses():
            read()
    except QwenqError as error:
        assert error.what.strip()
        assert len(str(error)) < 20_000, "a message that nobody can read"
        assert "\x1b" not in str(error), "an escape sequence reaches the terminal"
        accepted = False
        tally.refused += 1
    seconds = time.process_time() - started
    grown = _resident("VmHWM") - before
    tally.tried += 1
    tally.most_bytes = max(tally.most_bytes, grown)
    tally.slowest = max(tally.slowest, seconds)
    assert grown < FREE_MEMORY + PER_BYTE * nbytes, f"{grown:,} bytes for an input of {nbytes:,}"
    assert seconds < SLOWEST, f"{seconds:.1f} s for an input of {nbytes:,} bytes"
    return accepted


def _resident(kind: str) -> int:
    if not LINUX:
        return 0
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(kind)) * 1024


def _forget_peak() -> None:
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def _few_new_addresses() -> Iterator[None]:
    """An allocation that is asked for and not even touched fails, too."""
    if not LINUX:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_resident("VmSize") + NEW_ADDRESSES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
