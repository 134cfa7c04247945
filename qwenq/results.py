"""Write and read the rows of a run folder, the interface between evals and profiling and the reports.

A run folder holds ``results.jsonl``, one row a line, and ``environment.json``; other files there (records of
items, plots) belong to the command that wrote them. A figure that could not be measured is still a row:
``unavailable`` with its reason. Rows are appended and flushed one by one, so a kill loses none.

Reports read from ``details``, each key where a row has it (lists of one row have one length):

* accuracy: ``items`` {item id: correct}, ``parts`` {subject: share}; tests pair two rows by item id, unless
  ``questions``, a hash of all prompts, differs: then the data has changed under the ids; ``base`` of a
  quantised model, the fingerprint of the model it was made from, where that is known
* kl: ``positions`` [tokens read, the middle of a stretch] with ``values`` [mean nats there], ``lows`` and
  ``highs`` [95 % interval or null], ``counts`` [predictions]; ``modules`` [{name, error, rtn_error}]
* speed.decode: ``positions`` [token] with ``values`` [tokens/s]
* memory.generate: ``parts`` {weights, cache, activations: bytes}
* any: ``command``, the exact command that measured it
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal, get_args

from qwenq.errors import StorageError, UsageError
from qwenq.storage import (
    LONGEST_LINE,
    append_line,
    atomic_write_json,
    is_whole_line,
    open_file,
    too_long_line,
)

RESULTS_FILE = "results.jsonl"
REPORT_FILE = "results.json"
"""Written by ``qwenq report``: the rows of all its runs, from which the report can be made anew."""
ENVIRONMENT_FILE = "environment.json"
FORMAT = 1
Status = Literal["ok", "unavailable", "failed"]
Value = str | int | float | bool | None

HERE = "this machine"
"""Place of a server whose address is that of the machine itself."""


@dataclass(frozen=True)
class Model:
    """The weights that a row is about.

    Attributes:
        name: for people: the folder's or the hub's name.
        fingerprint: of the weights' bytes (models.fingerprint); "random:…" for random weights.
        precision: ``fp32``, ``bf16``, ``fp16``, ``int8``, ``int4``; of other tools
            ``awq-int4``, ``ct-int4``, ``ct-int8``, ``ct-fp8``, ``fp8``.
        family: name of the unquantised model that it and its siblings come from; rows of one family are
            compared with each other.
        nbytes: bytes of its weights, stored in its precision; None if unknown.
        group_size: of a quantised model, else None.
    """

    name: str
    fingerprint: str
    precision: str
    family: str
    nbytes: int | None = None
    group_size: int | None = None

    @property
    def label(self) -> str:
        """Return ``Qwen2.5-7B bf16``; the name alone where it ends with the precision, such as ``-Int4``."""
        ending = re.split(r"[-_. ]", self.name)[-1]
        return self.name if ending.lower() == self.precision.lower() else f"{self.name} {self.precision}"

    @property
    def rounded_from(self) -> str | None:
        """Return the fingerprint of a model rounded on the fly, or None (``profiling.subjects``)."""
        kind, _, base = self.fingerprint.partition(":")
        return base if kind.startswith("rounded-") else None

    @property
    def served(self) -> bool:
        """Return whether it is known by its server's address alone, and its weights are not."""
        return self.fingerprint.startswith("endpoint:")


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why it is missing.

    Attributes:
        metric: what was measured, with a dot between family and figure: ``accuracy``, ``accuracy.float32``,
            ``kl``, ``same_top``, ``perplexity``, ``perplexity.context``, ``speed.protocol``,
            ``speed.decode``, ``speed.prefill``, ``time.first_token``, ``memory.load``,
            ``memory.generate``, ``memory.unreset``, ``energy.token``, ``bandwidth.share``, ``size``; of a
            served model ``speed.served``, ``failed.served``, ``time.first_token.p50`` and
            ``time.inter_token.p50``, with p95 and p99.
        point: what it was measured at, flat: for accuracy ``task``, ``protocol``, ``version``, ``limit``; for
            speed and memory ``attention``, ``engine``, ``context``, ``tokens``, ``batch``, ``device``; for
            perplexity by context ``seq_len``, ``text``, ``ntk``, ``logn``; for a served model
            ``concurrency``, ``context``, ``tokens``.
        value: the figure; None unless ``status`` is ``ok``.
        unit: ``share`` (0 … 1), ``tokens/s``, ``bytes``, ``seconds``, ``nats/token``, ``joules/token``,
            ``ratio``.
        low, high: 95 % interval, None where there is none.
        n: items, repetitions or tokens behind the value.
        status: ``ok``, ``unavailable`` (cannot run here) or ``failed`` (ran, and did not finish).
        reason: one sentence, wherever the status is not ``ok``.
        implementation: exactly what ran: package and version, or our kernel.
        settings: whatever else decides the value (seed, dtype, generation settings, limits); ``machine``,
            what it was measured on (``qwenq.environment``); of a served model ``server``, its ``kind`` and
            ``place``: ``HERE``, or a hash of the host's name.
        details: series and side figures for plots: JSON values.
        date: ISO date.
    """

    metric: str
    model: Model
    point: dict[str, Value]
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    status: Status = "ok"
    reason: str | None = None
    implementation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"no status {self.status!r}")
        if (self.status == "ok") != (self.value is not None):
            raise ValueError(f"{self.metric}: a value belongs to status ok and to no other")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"{self.metric}: status {self.status} needs a reason")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.metric}: {self.value} is no figure")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"{self.metric}: an interval from {self.low} down to {self.high}")

    @property
    def identity(self) -> tuple[str, ...]:
        """Return what two rows of the same measurement share, perhaps of different weights."""
        where = (f"{key}={self.point[key]}" for key in sorted(self.point))
        return (self.model.family, self.model.precision, self.metric, *where)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: one line of ``results.jsonl``."""
        return {"format": FORMAT, **asdict(self)}


def intervals_overlap(one: Row, other: Row) -> bool | None:
    """Return whether the difference of two figures may be noise; None where one has no interval."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.high >= other.low and other.high >= one.low


def append_row(run: Path, row: Row) -> None:
    """Add a row to a run folder and flush it to the disk; the folder is made where it is missing."""
    append_line(run / RESULTS_FILE, json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False))


def require_readable(row: Row) -> None:
    """Refuse, before it is appended, a row made of foreign values that ``read_rows`` would refuse.

    Raises:
        TypeError, ValueError, RecursionError: a value has another type, is too large, or cannot be written.
    """
    json.dumps(row.to_json(), ensure_ascii=False, allow_nan=False).encode()
    _check_types(row)


def read_rows(run: Path) -> list[Row]:
    """Return all rows of a run folder; of rows with one identity and model the last.

    A last line that breaks off is left by a kill, and skipped. Any other broken line is an error.
    """
    path = run / RESULTS_FILE
    try:
        with open_file(path) as file:
            rows = [_row(line, f"{path}, line {number}") for number, line in _whole_lines(file, path)]
    except FileNotFoundError as error:
        hint = "name a folder that qwenq eval, profile or run has written"
        raise UsageError(f"no {RESULTS_FILE} there", where=run, hint=hint) from error
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8", where=path, hint="copy the run folder again") from error
    except OSError as error:
        raise StorageError(f"it cannot be read: {error.strerror}", where=path) from error
    latest = {(row.identity, row.model.fingerprint): row for row in rows}
    return list(latest.values())


def _whole_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines that are not blank; a kill may have cut the last one, even within a character."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
        if len(line) > LONGEST_LINE:
            raise too_long_line(f"{path}, line {number}")
        if line.strip() and (line.endswith(b"\n") or is_whole_line(line)):
            yield number, line.decode("utf-8").removeprefix("\ufeff")  # editors of Windows begin with that


def write_environment(run: Path, environment: dict[str, Any]) -> None:
    """Write what the rows of this folder were measured on."""
    atomic_write_json(run / ENVIRONMENT_FILE, environment)


def read_environment(run: Path) -> dict[str, Any]:
    """Return what the rows were measured on; empty where the file is missing."""
    path = run / ENVIRONMENT_FILE
    if not path.exists():
        return {}
    try:
        with open_file(path) as file:
            found = json.loads(file.read(LONGEST_LINE).decode())
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # as for rows: it is written again
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"it cannot be read: {error}", where=path) from error
    if not isinstance(found, dict):
        raise UsageError("not a JSON object", where=path)
    return found


def _row(line: str, where: str, hint: str = "delete that line") -> Row:
    try:
        content = json.loads(line)
        found = content.pop("format", None)
        if isinstance(found, int) and found > FORMAT:
            raise UsageError(
                f"not a row of results of this qwenq: its format is {found}, known is {FORMAT}",
                where=where,
                hint="use the qwenq that wrote it, or a newer one",
            )
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}, known is {FORMAT}")
        row = _made(content)
        _check_types(row)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"not a row of results: {error}", where=where, hint=hint) from error
    return row


def _made(content: dict[str, Any]) -> Row:
    """Make a row of plain values; a ValueError names a key or a value that cannot be."""
    model = content.pop("model")
    for kind, values, what in ((Model, model, "the model"), (Row, {**content, "model": model}, "it")):
        known = {each.name: each.default is MISSING is each.default_factory for each in fields(kind)}
        if strange := [key for key in values if key not in known]:
            raise ValueError(f"{what} has an unknown key {strange[0]!r}")
        if missing := [name for name, needed in known.items() if needed and name not in values]:
            raise ValueError(f"{what} has no {missing[0]!r}")
    try:
        # Infinity, NaN and halves of surrogate pairs can be read but not written again.
        json.dumps([model, content], ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character") from error
    except ValueError as error:
        raise ValueError("it holds a figure that is not finite") from error
    return Row(model=Model(**model), **content)


def _check_types(row: Row) -> None:
    """Check the types that the rest of the code relies on, and bounds: JSON has others."""
    parts: tuple[Row | Model, ...] = (row, row.model)
    for part in parts:
        for name in (each.name for each in fields(part) if each.name in _KINDS):
            value = getattr(part, name)
            if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, int | float) and not abs(value) < _MOST:
                raise ValueError(f"{value} is no figure")
    if any(isinstance(value, list | dict) for value in row.point.values()):
        raise TypeError("point holds something that is not flat")


_MOST = 2**63
"""No figure or count is larger: it would overflow where it is scaled."""
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("metric", "unit", "implementation", "date"), (str,)),
    **dict.fromkeys(("name", "fingerprint", "precision", "family"), (str,)),
    **dict.fromkeys(("point", "settings", "details"), (dict,)),
    **dict.fromkeys(("value", "low", "high"), (int, float, type(None))),
    **dict.fromkeys(("n", "nbytes", "group_size"), (int, type(None))),
    "reason": (str, type(None)),
}
assert _KINDS.keys() <= {f.name for f in (*fields(Row), *fields(Model))}  # noqa: S101 - misspelt ones check nothing


def each_run(folders: list[Path]) -> Iterator[tuple[Path, list[Row], dict[str, Any]]]:
    """Yield (folder, rows, environment) of each run folder; for a report's folder, of each of its runs."""
    for folder in folders:
        if (folder / REPORT_FILE).is_file() and not (folder / RESULTS_FILE).exists():
            yield from _runs_of_report(folder)
        else:
            yield folder, read_rows(folder), read_environment(folder)


def _runs_of_report(folder: Path) -> Iterator[tuple[Path, list[Row], dict[str, Any]]]:
    """Yield the runs that a report was made of, as far as it keeps them: not the records of single items."""
    path, hint = folder / REPORT_FILE, "name the run folders that the report was made of"
    try:
        with open_file(path) as file:
            content = json.loads(file.read(LONGEST_LINE).decode())
        runs = {str(run["name"]): run["environment"] for run in content["runs"]}
        rows: dict[str, list[Row]] = {name: [] for name in runs}
        for number, row in enumerate(content["rows"], 1):
            name = row.pop("run")
            rows[name].append(_row(json.dumps(row), f"{path}, row {number}", hint))
        if not all(isinstance(environment, dict) for environment in runs.values()):
            raise ValueError("an environment is no object")
        json.dumps(runs, ensure_ascii=False, allow_nan=False).encode()  # it is written again
    except OSError as error:
        raise StorageError(f"it cannot be read: {error.strerror}", where=path) from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"not the rows of a report: {error!r}", where=path, hint=hint) from error
    for name, environment in runs.items():
        yield folder / name, rows[name], environment
