"""Read benchmarks from the hub: data sets that load without remote code, their copies, or single files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from qwenq import stopping
from qwenq.errors import DataError
from qwenq.evals.tasks.files import LARGEST

_CONNECT = "either connect to the hub, or put the files into a folder and name it: --data DIR"
_NEITHER = "; --sample needs neither, but is not the benchmark"
_TIMEOUT = 10.0  # seconds


def read_hub(
    dataset: str, config: str | None, split: str, *, sampled: bool, copy: Path | None
) -> list[dict[str, Any]]:
    """Return all rows of one split, in its order, through the ``datasets`` library.

    Args:
        dataset: ``owner/name``; not one with a script (since datasets 4).
        config: one of its configurations; None where it has only one.
        split: such as ``test``.
        sampled: whether the sample suite has this benchmark, too.
        copy: a folder with the set's parquet files, as downloaded; None: the hub.
    """
    if copy is not None:
        return _read_copy(copy, config, split)
    import datasets

    where = f"hub dataset {dataset}{f', {config}' if config else ''}, split {split}"
    ways = _CONNECT + (_NEITHER if sampled else "")
    # What it raises where a set is unreachable, missing, refused, damaged or not as declared.
    own = getattr(getattr(datasets, "exceptions", None), "DatasetsError", OSError)
    try:
        with _from_the_cache(datasets, why=_unreachable(dataset)):
            rows: Iterable[Any] = datasets.load_dataset(dataset, config, split=split)
            listed = [dict(row) for row in rows]
    except (OSError, ValueError, RuntimeError, KeyError, own, _http_error()) as error:
        raise _no_benchmark(error, where, ways) from error
    if not listed:
        raise DataError("the hub returned no rows", where=where, hint=ways)
    return listed


def _read_copy(folder: Path, config: str | None, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split from parquet files that lie as on the hub."""
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    for file in _copied_files(folder, config, split):
        if file.stat().st_size > LARGEST:
            raise DataError(f"over {LARGEST // 1_000_000} MB: no benchmark file is that large", where=file)
        try:
            rows += parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"not a whole parquet file: {error}", where=file, hint="copy it again") from error
    if not rows:
        raise DataError("the parquet files hold no rows", where=folder, hint="download them again")
    return rows


def _copied_files(folder: Path, config: str | None, split: str) -> list[Path]:
    inside = [(file, file.relative_to(folder).parts) for file in sorted(folder.rglob("*.parquet"))]
    of_config = [(file, parts) for file, parts in inside if config in parts]
    if not of_config and (config == "all" or len({parts[:-1] for _, parts in inside}) == 1):
        of_config = inside  # downloaded alone, without its folder; or all of them one by one
    named = re.compile(rf"(?:.*[-_.])?{re.escape(split)}(?:[-_.].*)?")
    files = [
        file
        for file, parts in (inside if config is None else of_config)
        if split in parts[:-1] or named.fullmatch(parts[-1].removesuffix(".parquet"))
    ]
    if not files:
        names = ", ".join("/".join(parts) for _, parts in inside[:5])
        raise DataError(
            f"no parquet file of the split {split}{f' of {config}' if config else ''}",
            where=folder,
            hint=f"it should be called {config or 'data'}/{split}-00000-of-00001.parquet; there are {names}",
        )
    return files


def fetch_hub_file(dataset: str, name: str, sampled: bool) -> Path:
    """Return one file of a hub dataset, downloaded or from the cache; errors as `read_hub`'s."""
    from huggingface_hub import hf_hub_download

    where = f"hub dataset {dataset}, {name}"
    ways = _CONNECT + (_NEITHER if sampled else "")
    why = _unreachable(dataset)
    try:
        found = hf_hub_download(dataset, name, repo_type="dataset", local_files_only=why is not None)
    except (OSError, ValueError, RuntimeError, _http_error()) as error:
        raise _no_benchmark(why or error, where, ways) from error
    return Path(found)


def _no_benchmark(error: Exception, where: str, ways: str) -> BaseException:
    """Return the error to raise; a stop (SIGTERM) behind it comes first."""
    if (stop := stopping.behind(error)) is not None:
        return stop
    hidden = type(error).__name__ == "DatasetGenerationError"  # its text lacks the reason
    found = error.__cause__ if hidden and error.__cause__ is not None else error
    reason = str(found).strip().splitlines() or [type(found).__name__]
    return DataError(f"the benchmark could not be loaded from the hub: {reason[0]}", where=where, hint=ways)


class _UnreachableError(OSError):
    """The hub did not answer."""


@cache
def _unreachable(dataset: str) -> _UnreachableError | None:
    """Return why the hub is unreachable; None when it is reachable, or in offline mode.

    This comes first, once: an unreachable download is retried six times, in half a minute and eleven lines.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.is_offline_mode():
        return None
    try:
        HfApi().dataset_info(dataset, timeout=_TIMEOUT)
    except HfHubHTTPError:
        return None  # it answers; the download has the better error
    except (OSError, _http_error()) as error:
        return _UnreachableError(f"{constants.ENDPOINT} could not be reached: {error}")
    return None


def _http_error() -> type[Exception]:
    """Return the base error of the hub's HTTP library, which is httpx or a successor."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@contextmanager
def _from_the_cache(datasets: Any, *, why: _UnreachableError | None) -> Iterator[None]:
    """Make ``datasets`` use its cache at once where the hub is unreachable."""
    if why is None:
        yield
        return
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        raise why from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
