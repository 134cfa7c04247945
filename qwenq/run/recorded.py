"""The check that `qwenq quantize` made of a model, as rows.

``python -m qwenq.run.recorded MODEL RUN COMMAND``, the last for the rows: what made the model.

The check is in the manifest already; nothing is measured again. It was made of the bytes whose hashes are
there, too: a folder with others has no check, and is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from qwenq.errors import CorruptFileError, QwenqError
from qwenq.results import Model, Row, Value, append_row

UNITS = {"kl": "nats/token", "same_top": "share", "perplexity.ratio": "ratio"}
"""Metrics of the check that have an interval."""


def record_check(model: Path, run: Path, command: str) -> list[Row]:
    """Append the rows of a quantised model's check to a run folder.

    Args:
        command: that quantised it.

    Raises:
        CorruptFileError: the folder has no manifest, or one without a check, or its bytes are others.
    """
    from qwenq.models.integrity import verify_files

    verify_files(model)
    rows = list(rows_of(_read(model / "qwenq.json"), _identity(model), command))
    for row in rows:
        append_row(run, row)
    return rows


def rows_of(manifest: dict[str, Any], model: Model, command: str) -> Iterator[Row]:
    """KL, with the errors of the modules; same top token; perplexity as a ratio to the base's; bytes."""
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
        details = {"command": command, **(_details_of_kl(check) if metric == "kl" else {})}
        bounds = (found["low"], found["high"])
        yield Row(metric, model, point, found["value"], unit, *bounds, details=details, **common)


def _details_of_kl(check: dict[str, Any]) -> dict[str, Any]:
    """The modules' errors; and the curve over position, which older manifests do not have."""
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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"no manifest of a quantised model: {error!r}", where=path) from error
    raise CorruptFileError("the manifest holds no check", where=path)


def _identity(model: Path) -> Model:
    """As the rows of evaluation and profile name it."""
    import torch

    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import result_model

    return result_model(open_checkpoint(model), torch.float32, str(model))


if __name__ == "__main__":
    try:
        record_check(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except QwenqError as failure:
        sys.exit(f"qwenq: {failure}")
