"""The tables of gpu.py in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from _common import markdown_table


def markdown(found: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any], *, dry_run: bool) -> str:
    """Return a section for each step; what was not measured has its reason."""
    where = ", ".join(gpu["name"] for gpu in environment.get("gpus") or []) or "no GPU"
    lines = [f"# Measured on {where}", ""]
    if dry_run:
        lines += ["**A dry run: tiny shapes on a CPU, kernels interpreted. No number means anything.**", ""]
    for name, section in (
        ("checks", _checks), ("card", _card), ("products", _products),
        ("batches", _batches), ("quantising", _quantising),
    ):  # fmt: skip
        lines += [f"## {name.capitalize()}", ""]
        step = found.get(name)
        reason = "not reached yet" if step is None else step.get("unavailable")
        lines += [f"unavailable: {reason}" if step is None or reason else section(step), ""]
        if step is not None and not reason and not step["complete"]:
            lines += ["In part: the time was over.", ""]
    return "\n".join(lines)


def _checks(step: Mapping[str, Any]) -> str:
    wrong = [check for check in step["checks"] if not check["passed"]]
    worst = max(check["error"] for check in step["checks"])
    line = (
        f"{len(step['checks'])} checks of Triton kernels against float64, {len(wrong)} wrong; "
        f"the largest error is {worst:.2f} of what rounding may do."
    )
    return "\n".join([line, *(f"- WRONG: {check['name']}: {check['error']:.3g}" for check in wrong)])


def _card(step: Mapping[str, Any]) -> str:
    codes = ", ".join(f"qwenq {name} {code}" for name, code in step["exit_codes"].items())
    return (
        f"{step['measured']} figures measured, {step['unavailable_rows']} unavailable with a reason; "
        f"exit codes: {codes}. The tables: page/README.md."
    )


def _products(step: Mapping[str, Any]) -> str:
    header = ["kernel", "in", "out", "rows", "µs", "GB/s", "largest error"]
    rows = [
        [
            row["kernel"],
            str(row["in"]),
            str(row["out"]),
            str(row["rows"]),
            *_times(row),
            _number(row, "error", ".3f"),
        ]
        for row in step["rows"]
    ]
    return markdown_table(header, rows)


def _times(row: Mapping[str, Any]) -> list[str]:
    if "unavailable" in row:
        return [f"unavailable: {row['unavailable']}", ""]
    return [_number(row, "microseconds", ".1f"), _number(row, "gb_per_s", ".0f")]


def _batches(step: Mapping[str, Any]) -> str:
    header = ["model", "precision", "sequences", "ms a step", "tokens/s"]
    rows = [
        [
            row["model"],
            row["precision"],
            str(row["batch"]),
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_s']:.0f}",
        ]
        for row in step["rows"]
    ]
    return markdown_table(header, rows) + f"\n{step['context']} tokens in the cache."


def _quantising(step: Mapping[str, Any]) -> str:
    rows = [[name, f"{1e3 * seconds:.0f}"] for name, seconds in step["phases"].items()]
    peak = "unavailable" if step["peak_gpu_bytes"] is None else f"{step['peak_gpu_bytes'] / 2**30:.2f} GiB"
    return (
        f"{step['model']}, {step['layers_measured']} layers measured, "
        f"{step['samples']} × {step['seq_len']} tokens: {step['seconds_per_layer']:.2f} s a layer, "
        f"peak {peak}.\n\n" + markdown_table(["phase", "ms a layer"], rows)
    )


def _number(row: Mapping[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""
