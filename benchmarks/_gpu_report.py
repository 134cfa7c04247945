"""The report of gpu.py as Markdown, and its ratios."""

from __future__ import annotations

from typing import Any

from qwenq.results import Row


def find(rows: list[Row], metric: str, model: str, precision: str, **point: Any) -> float | None:
    """Return the best value among rows of that kind; None where there is none."""
    values = [
        row.value
        for row in rows
        if row.metric == metric
        and row.model.family == model
        and row.model.precision == precision
        and row.value is not None
        and all(row.point.get(key) == value for key, value in point.items())
    ]
    return max(values, default=None)


def ratios(rows: list[Row], card_int4_8192: float) -> dict[str, float]:
    """Speed of the fast engine: Int4 of 1.8B over its card, Int4 of 7B over our own BF16, both at 8192."""
    found = {}
    point = {"engine": "fast", "tokens": 8192}
    small = find(rows, "speed.decode", "qwen-1.8b-chat", "int4", **point)
    if small is not None:
        found["int4_1.8b_vs_card"] = small / card_int4_8192
    int4, bf16 = (find(rows, "speed.decode", "qwen-7b-chat", p, **point) for p in ("int4", "bf16"))
    if int4 is not None and bf16 is not None:
        found["int4_7b_vs_bf16"] = int4 / bf16
    shares = [row.value for row in rows if row.metric == "bandwidth.share" and row.value is not None]
    if shares:
        found["bandwidth_share_best"] = max(shares)
    return found


def markdown(report: dict[str, Any], rows: list[Row]) -> str:
    """Tables of speed by model and engine; of kernels; what failed, by name."""
    gpus = report["environment"].get("gpus") or []
    where = ", ".join(gpu["name"] for gpu in gpus) or "no GPU"
    lines = [f"# Speed on {where}", ""]
    if report["dry_run"]:
        warning = "A dry run: tiny shapes on a CPU, kernels interpreted. No number here means anything."
        lines += [f"**{warning}**", ""]
    wrong = [check for check in report["checks"] if not check["passed"]]
    worst = max((check["error"] for check in report["checks"]), default=0.0)
    lines += [
        f"{len(report['checks'])} checks of Triton kernels against float64, {len(wrong)} wrong; the largest "
        f"error is {worst:.2f} of what rounding may do. A copy moves {report['copy_gb_per_s']:.0f} GB/s.",
        "",
        *(f"- WRONG: {check['name']}: {check['error']:.3g}" for check in wrong),
    ]
    lines += [f"- {name}: {value:.2f}" for name, value in report["ratios"].items()]
    for model, engine in dict.fromkeys((row.model.family, str(row.point["engine"])) for row in rows):
        lines += ["", f"## {model}, {engine}", "", *_speeds(rows, model, engine)]
    if report["kernels"]:
        header = "| kernel | in | out | rows | µs | GB/s |"
        lines += ["", "## Kernels alone", "", header, "|---|--:|--:|--:|--:|--:|"]
        lines += [_kernel_line(each) for each in report["kernels"]]
    reasons = dict.fromkeys(_reason_line(row) for row in rows if row.status != "ok")
    if reasons:
        lines += ["", "## Not measured", "", *reasons]
    return "\n".join(lines) + "\n"


def _speeds(rows: list[Row], model: str, engine: str) -> list[str]:
    mine = [row for row in rows if row.model.family == model and row.point["engine"] == engine]
    decode = [row for row in mine if row.metric == "speed.decode"]
    lengths = list(dict.fromkeys(row.point["tokens"] for row in decode))
    speeds_of = [f"1 → {n} tok/s" for n in lengths]
    header = ["precision", "attention", *speeds_of, "prefill tok/s", "share of a copy", "GiB"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "--:|" * (len(header) - 2)]
    for precision, attention in dict.fromkeys((r.model.precision, r.point["attention"]) for r in decode):
        point: dict[str, Any] = {"engine": engine, "attention": attention}
        speeds = [find(rows, "speed.decode", model, precision, tokens=n, **point) for n in lengths]
        prefill = find(rows, "speed.prefill", model, precision, **point)
        share = find(rows, "bandwidth.share", model, precision, **point)
        memory = find(rows, "memory.generate", model, precision, tokens=lengths[-1], **point)
        cells = [
            precision,
            str(attention),
            *(_cell(speed, ".1f") for speed in speeds),
            _cell(prefill, ".0f"),
            _cell(share, ".2f"),
            _cell(memory / 2**30 if memory is not None else None, ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _kernel_line(each: dict[str, Any]) -> str:
    cells = [str(each[key]) for key in ("kernel", "in", "out", "rows")]
    cells += [f"{each['microseconds']:.1f}", f"{each['gb_per_s']:.0f}"]
    return "| " + " | ".join(cells) + " |"


def _reason_line(row: Row) -> str:
    where = f"{row.model.family} {row.model.precision}, {row.point['engine']}, {row.point['attention']}"
    return f"- {where}: {row.reason}"


def _cell(value: float | None, form: str) -> str:
    return "unavailable" if value is None else format(value, form)
