"""Show speed as served: a table by concurrency, throughput against latency, and where models cross."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from qwenq.reporting.collect import Collection, Measured
from qwenq.reporting.figures import Figure, Point, Series
from qwenq.reporting.tables import Layout, Table, by_metric, pivot
from qwenq.reporting.text import clean
from qwenq.results import HERE, Row, intervals_overlap

SERVED = {
    "speed.served": "Output tokens/s",
    "time.first_token.p50": "TTFT p50 (ms)",
    "time.first_token.p95": "TTFT p95 (ms)",
    "time.first_token.p99": "TTFT p99 (ms)",
    "time.inter_token.p50": "ITL p50 (ms)",
    "time.inter_token.p95": "ITL p95 (ms)",
    "time.inter_token.p99": "ITL p99 (ms)",
    "failed.served": "Requests failed (%)",
}
"""Metrics of ``qwenq profile --endpoint`` and their headings, in order."""
_LATENCIES = (
    ("inter_token", "time.inter_token.p50", "Throughput against inter-token latency", "inter-token p50, ms"),
    ("first_token", "time.first_token.p50", "Throughput against time to first token", "first token p50, ms"),
)
Place = tuple[tuple[str, Any], ...]


def served_table(collection: Collection, family: str) -> Table | None:
    """Tabulate throughput, latencies and failures of served models by concurrency."""
    rows = collection.of(family, *SERVED)
    layout = Layout(
        "Served model",
        by_metric(SERVED),
        labels={"concurrency": "Concurrency"},
        names={"context": lambda value: f"{value} tokens", "tokens": lambda value: f"{value} of an answer"},
    )
    # A share of failures counts requests, the other figures repetitions, which the caption names.
    counted = [
        replace(item, row=replace(item.row, n=None)) if item.row.metric == "failed.served" else item
        for item in rows
    ]
    made = pivot(counted, layout, collection)
    loop = "a closed loop of streamed requests; TTFT: time to first token, ITL: inter-token latency"
    made.caption[:0] = [loop, _where_served(rows)]
    made.caption.extend(_counted(rows))
    return made.table("served", "Speed as served")


def _where_served(rows: list[Measured]) -> str:
    """Describe the servers: their kinds, and their hardware as far as their addresses tell it."""
    servers = [server for item in rows if isinstance(server := item.row.settings.get("server"), dict)]
    kinds = dict.fromkeys(clean(server["kind"]) for server in servers if server.get("kind"))
    named = f"owner in the server's list of models: {', '.join(kinds)}; " if kinds else ""
    if servers and all(server.get("place") == HERE for server in servers):
        return f"{named}the server's address is the machine below, which also sent the requests"
    return f"{named}the server's hardware is unknown; the machine below sent the requests"


def served_figures(collection: Collection, family: str) -> Iterator[Figure]:
    """Yield throughput against latency, a line for each model through its concurrencies."""
    speeds = collection.of(family, "speed.served")
    for key, metric, title, x_label in _LATENCIES:
        latencies = {item.place: item.row.value for item in collection.of(family, metric)}
        lines: dict[tuple[str, Place], list[Point]] = defaultdict(list)
        precisions: dict[tuple[str, Place], str] = {}
        for item in sorted(speeds, key=_concurrency):
            latency, speed = latencies.get(item.place), item.row.value
            if latency is None or speed is None:
                continue
            line = (collection.label(item.row.model), _lengths(item))
            mark = f"concurrency {clean(item.row.point.get('concurrency'))}"
            lines[line].append(Point(latency * 1e3, speed, mark, item.row.low, item.row.high))
            precisions[line] = item.row.model.precision
        several = len({lengths for _, lengths in lines}) > 1
        series = []
        for index, ((label, lengths), points) in enumerate(lines.items()):
            tone = precisions[label, lengths]  # where no other line has it
            if tone == "served" or list(precisions.values()).count(tone) > 1:
                tone = f"c{index % 6}"
            shown = clean(", ".join(f"{key} {value}" for key, value in lengths))
            name = f"{label}, {shown}" if several else label
            series += [Series(name, tuple(points), tone)] if len(points) > 1 else []
        if series:
            yield Figure(
                f"served_{key}", "lines", title, x_label, "output tokens/s", tuple(series),
                "Up and to the left is better. Each mark is a concurrency, the line joins a model's in their "
                "order; bars are 95 % intervals of the throughput.",
            )  # fmt: skip


def _concurrency(item: Measured) -> float:
    value = item.row.point.get("concurrency")
    return value if isinstance(value, int | float) else 0


def _lengths(item: Measured) -> Place:
    """Return what else two rows must share to stand beside each other: lengths of prompt and answer."""
    return tuple(sorted((key, value) for key, value in item.row.point.items() if key != "concurrency"))


def _counted(rows: list[Measured]) -> Iterator[str]:
    """Yield how the tokens of answers were counted, where a row says so."""
    by = [found for item in rows if isinstance(found := item.row.details.get("counted_by"), dict)]
    named = {
        "usage": "the server's usage",
        "chunks": "streamed chunks, as the server reports no usage",
        "contradicted": "streamed chunks, as the server's usage contradicts them",
    }
    if used := [text for name, text in named.items() if any(found.get(name) for found in by)]:
        yield f"tokens counted by {' and by '.join(used)}"


def served_summary(collection: Collection, family: str) -> Iterator[str]:
    """Yield, for each pair of models, at which concurrencies each has the higher throughput, beyond noise."""
    speeds: dict[tuple[str, Place], dict[float, Row]] = defaultdict(dict)
    for item in collection.of(family, "speed.served"):
        if item.row.value is not None:
            label = collection.label(item.row.model)
            speeds[label, _lengths(item)][_concurrency(item)] = item.row
    for (one, one_lengths), (other, other_lengths) in combinations(speeds, 2):
        first, second = speeds[one, one_lengths], speeds[other, other_lengths]
        shared = sorted(first.keys() & second.keys())
        if one_lengths != other_lengths or len(shared) < 2:
            continue
        ahead, behind, level = list[str](), list[str](), list[str]()
        for each in shared:
            faster = (first[each].value or 0.0) > (second[each].value or 0.0)
            place = level if intervals_overlap(first[each], second[each]) else ahead if faster else behind
            place.append(f"{each:g}")
        noise = f"; at {', '.join(level)} they differ by no more than noise" if level else ""
        if ahead and behind:
            yield (
                f"As served, {one} and {other} cross: {one} has the higher throughput at concurrency "
                f"{', '.join(ahead)}, {other} at {', '.join(behind)}{noise}."
            )
        elif ahead or behind:
            better, worse = (one, other) if ahead else (other, one)
            where = f"concurrency {', '.join(ahead or behind)}" if level else "each concurrency"
            yield f"As served, {better} has a higher throughput than {worse} at {where}{noise}."
        else:
            yield f"As served, the throughputs of {one} and {other} differ by no more than noise."
