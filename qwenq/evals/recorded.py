"""Turn the check in a model's manifest into rows; nothing is measured again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from qwenq.errors import CorruptFileError
from qwenq.models.integrity import verify_files
from qwenq.models.manifest import MANIFEST
from qwenq.results import RESULTS_FILE, Model, Row, Value, append_row, read_rows, require_readable

UNITS = {"kl": "nats/token", "same_top": "share", "perplexity.ratio": "ratio"}
"""Metrics of the check that have an interval."""


def has_check(folder: Path) -> bool:
    """Return whether the folder has a manifest with a check; one of random weights has none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and isinstance(manifest.get("check"), dict)


def record_check(folder: Path, model: Model, run: Path, command: str = "") -> list[Row]:
    """Return the rows of a quantised model's check, and append those that the run folder does not have.

    Args:
        folder: of the model.
        model: its identity in rows.
        run: the run folder, which has to be locked (``storage.locked``).
        command: that quantised it; empty: unknown.

    Raises:
        CorruptFileError: no manifest, no sound check in it, or files that differ from its hashes.
        UsageError: a broken row in the run folder.
    """
    rows = _sound_rows(folder / MANIFEST, model, command)
    known = read_rows(run) if (run / RESULTS_FILE).exists() else []
    missing = [row for row in rows if not any(_same_row(other, row) for other in known)]
    if missing:
        verify_files(folder)
    for row in missing:
        append_row(run, row)
    return rows


def _check_rows(manifest: dict[str, Any], model: Model, command: str) -> Iterator[Row]:
    """Yield KL with the errors of the modules, same top token, and perplexity as a ratio to the base's."""
    check, calibration = manifest["check"], manifest["calibration"]
    point: dict[str, Value] = {
        "text": f"held out of {calibration['source']}",
        "text_fingerprint": calibration["tokens"],
        "sequences": check["sequences"],
        "seq_len": check["seq_len"],
        "dtype": check["dtype"],
    }
    common: dict[str, Any] = {
        "n": check["tokens"],
        "implementation": manifest["made_by"],
        "settings": {"recipe": manifest["recipe"], "device": check["device"]},
        "date": date.today().isoformat(),
    }
    for metric, unit in UNITS.items():
        found = check[metric.replace(".", "_")]
        if found["value"] is None:
            reason = "not finite"
            yield Row(metric, model, point, None, unit, status="failed", reason=reason, **common)
            continue
        details = {"command": command} if command else {}
        details |= _details_of_kl(check) if metric == "kl" else {}
        bounds = (found["low"], found["high"])
        yield Row(metric, model, point, found["value"], unit, *bounds, details=details, **common)


def _sound_rows(path: Path, model: Model, command: str) -> list[Row]:
    """Return the rows, once they are known to be readable: others would make the run folder unreadable."""
    manifest = _read(path)
    try:
        rows = list(_check_rows(manifest, model, command))
        for row in rows:
            require_readable(row)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"its check is incomplete, or not as `qwenq quantize` writes it: {error!r}", where=path
        ) from error
    return rows


def _same_row(known: Row, row: Row) -> bool:
    """Return whether a recorded row equals this one but for its date, and the command where it has one."""
    details = {**row.details, "command": known.details.get("command")}
    same = replace(row, date=known.date, details=details if details["command"] else row.details)
    return json.dumps(same.to_json(), sort_keys=True) == json.dumps(known.to_json(), sort_keys=True)


def _details_of_kl(check: dict[str, Any]) -> dict[str, Any]:
    """Return the modules' errors, and the curve over position, which older manifests do not have."""
    measured = [part for part in check.get("kl_by_position", []) if part["value"] is not None]
    curve = {
        "positions": [(part["first"] + part["last"]) / 2 for part in measured],
        "values": [part["value"] for part in measured],
        "counts": [part["n"] for part in measured],
        "lows": [part["low"] for part in measured],
        "highs": [part["high"] for part in measured],
    }
    return {"modules": check["modules"], **(curve if measured else {})}


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(manifest["check"], dict) and isinstance(manifest["calibration"], dict):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"no manifest of a quantised model: {error!r}", where=path) from error
    raise CorruptFileError("the manifest holds no check", where=path)
