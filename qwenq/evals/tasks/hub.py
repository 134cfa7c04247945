"""Benchmarks from the hub, through the ``datasets`` library: only sets that load without remote code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwenq.errors import DataError

BOTH_WAYS = (
    "either connect to the hub (pip install 'qwenq[data]'), "
    "or put the files into a folder and name it: --data DIR"
)
NEITHER = "; --sample needs neither, but is not the benchmark"


def read_hub(dataset: str, config: str | None, split: str, *, sampled: bool = True) -> list[dict[str, Any]]:
    """All rows of one split, in its own order.

    Args:
        dataset: ``owner/name``.
        config: one of its configurations; None where it has one only.
        split: such as ``test``.
        sampled: whether the sample suite has this benchmark, too.

    Raises:
        DataError: ``datasets`` is not installed, the hub cannot be reached, or has no such set.
    """
    where = f"hub dataset {dataset}{f', {config}' if config else ''}, split {split}"
    ways = BOTH_WAYS + (NEITHER if sampled else "")
    try:
        import datasets
    except ImportError:
        raise DataError(
            "benchmarks come from the hub, which needs the package datasets", where=where, hint=ways
        ) from None
    try:
        rows: Iterable[Any] = datasets.load_dataset(dataset, config, split=split)
        listed = [dict(row) for row in rows]
    except (OSError, ValueError, RuntimeError, KeyError) as error:  # offline, gone, renamed, refused
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the hub did not give the benchmark: {reason[0]}", where=where, hint=ways) from error
    if not listed:
        raise DataError("the hub gave no rows", where=where, hint=ways)
    return listed
