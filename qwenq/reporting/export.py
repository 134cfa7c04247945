"""Write a report for programs: ``results.json`` and, with a line per row, ``results.csv``."""

from __future__ import annotations

import io
import json
from typing import Any

from qwenq.reporting.collect import Measured
from qwenq.reporting.report import Report
from qwenq.reporting.text import clean, spreadsheet

FORMAT = 1


def to_json(report: Report) -> dict[str, Any]:
    """Return plain values. Rows leave out the record of single items, which stays in the run folder."""
    return {
        "format": FORMAT,
        "title": report.title,
        "runs": [{"name": run.name, "environment": run.environment} for run in report.runs],
        "commands": list(report.commands),
        "sections": [
            {
                "family": section.family,
                "summary": list(section.summary),
                "tables": [table.to_json() for table in section.tables],
                "figures": [figure.key for figure in section.figures],
            }
            for section in report.sections
        ],
        "rows": [_row(item) for item in report.collection.measured],
    }


def json_text(report: Report) -> str:
    """Return `to_json` indented by two spaces, with a final newline."""
    return json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row(item: Measured) -> dict[str, Any]:
    row = item.row.to_json()
    row["details"] = {key: value for key, value in item.row.details.items() if key != "items"}
    return {"run": item.run.name, **row}


def csv_text(report: Report) -> str:
    """Return one line a row; each key of a point has a column."""
    import pandas as pd

    frame = pd.DataFrame([_record(item) for item in report.collection.measured], dtype=object)
    text = io.StringIO()
    frame.to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def _record(item: Measured) -> dict[str, Any]:
    row, model = item.row, item.row.model
    record: dict[str, Any] = {
        "run": item.run.name,
        "hardware": item.hardware,
        "family": model.family,
        "model": model.name,
        "precision": model.precision,
        "group_size": model.group_size,
        "weights_bytes": model.nbytes,
        "metric": row.metric,
        **{f"point.{clean(key)}": value for key, value in row.point.items()},
        "value": row.value,
        "unit": row.unit,
        "low": row.low,
        "high": row.high,
        "n": row.n,
        "status": row.status,
        "reason": row.reason,
        "implementation": row.implementation,
        "fingerprint": model.fingerprint,
        "date": row.date,
    }
    return {key: spreadsheet(value) if isinstance(value, str) else value for key, value in record.items()}
