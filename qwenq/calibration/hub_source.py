"""Read hub datasets as streams of documents, through the ``datasets`` library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwenq import stopping
from qwenq.calibration.documents import Document, from_record
from qwenq.errors import CalibrationError, HubError, QwenqError, UsageError

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_OTHERWISE = "download the file, repair it and give its path; or name another dataset"
_WITHOUT_HUB = "without a network: name self, or download the file elsewhere and give its path"


def is_hub_id(spec: str) -> bool:
    """Return whether ``spec`` is spelt ``owner/name`` or ``owner/name:config``."""
    return _HUB_ID.fullmatch(spec) is not None


def read_hub(spec: str, split: str | None = None, column: str | None = None) -> Iterator[Document]:
    """Yield the documents of a hub dataset, streamed, in the dataset's order.

    Args:
        spec: ``owner/name``, or ``owner/name:config`` for a dataset that has several.
        split: None means ``train``.
        column: None takes the first of text, messages, conversations.

    Raises:
        UsageError: ``datasets`` is not installed; no such split, config or column.
        HubError: the hub could not be reached, or has no such dataset.
        CalibrationError: its files are damaged, or of a form that ``datasets`` does not read; names the row.
    """
    split = split or "train"
    stream = _open(spec, split)
    where = f"{spec}, split {split}"
    number = 0
    try:
        for record in stream:
            number += 1
            document = from_record(record, f"{where}, row {number}", column)
            if not document.blank:
                yield document
    except (MemoryError, QwenqError):
        raise
    except (ConnectionError, OSError) as error:
        raise HubError(
            f"reading the dataset broke off: {error}", where=f"{where}, row {number + 1}", hint=_WITHOUT_HUB
        ) from error
    except Exception as error:  # ValueError, EOFError, pyarrow's, the library's own: there is no common class
        raise unreadable(error, f"{where}, after row {number}", _OTHERWISE) from error


def _open(spec: str, split: str) -> Iterable[Any]:
    parts = _HUB_ID.fullmatch(spec)
    if parts is None:
        raise UsageError("not a dataset id", where=spec, hint="write owner/name or owner/name:config")
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "reading hub datasets needs the package datasets",
            where=spec,
            hint="pip install 'qwenq[data]', or name a local file, or self",
        ) from None
    try:
        stream: Iterable[Any] = datasets.load_dataset(
            parts["name"], parts["config"], split=split, streaming=True
        )
        return stream
    except ValueError as error:  # unknown split or config: the library's message lists those there are
        raise UsageError(
            f"the dataset has no such split or config: {error}",
            where=f"{spec}, split {split}",
            hint="name the split (--split of `qwenq calibrate`, split in a recipe), or owner/name:config",
        ) from error
    except (ConnectionError, OSError) as error:  # offline, unreachable, not found, gated
        raise HubError(f"cannot open the dataset: {error}", where=spec, hint=_WITHOUT_HUB) from error
    except MemoryError:
        raise
    except Exception as error:  # RuntimeError: the dataset's script would have to be run
        raise unreadable(error, spec, _OTHERWISE) from error


def unreadable(error: Exception, where: Path | str, hint: str) -> BaseException:
    """Return the error to raise where ``datasets`` fails: the stop that caused it, if one did."""
    if (stop := stopping.behind(error)) is not None:
        return stop
    reason = " ".join(str(error).split())[:500] or type(error).__name__
    return CalibrationError(f"the dataset cannot be read: {reason}", where=where, hint=hint)
