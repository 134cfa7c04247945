"""Standard output that ends early: a full disk behind it is a message, and no traceback follows at exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qwenq.errors import StorageError


@contextmanager
def to_standard_output() -> Iterator[None]:
    """For what prints and must be seen whole.

    Raises:
        StorageError: it is a file, and the disk refused.
        BrokenPipeError: its reader has seen enough.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise StorageError(f"it cannot be written: {error.strerror}", where="standard output") from error
