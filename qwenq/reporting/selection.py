"""Select the rows of one point, which may stand beside each other in a plot."""

from __future__ import annotations

from collections import defaultdict

from qwenq.reporting.collect import Collection, Measured
from qwenq.reporting.machine import machine_of
from qwenq.reporting.text import clean


def at_one_point(
    rows: list[Measured], *, anywhere: bool = False, fastest_of: tuple[str, ...] = ()
) -> list[Measured]:
    """Return the measured rows of the point that most models have; each model once.

    Of points with equally many models, the one with most tokens counts, then the one with the largest sum.

    Args:
        rows: of one metric.
        anywhere: on any machine: accuracy and divergence do not depend on it.
        fastest_of: keys of the point that may differ; of a model's rows the largest counts.
    """
    groups: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for item in rows:
        if item.row.status == "ok":
            point = (
                f"{key}={value}" for key, value in sorted(item.row.point.items()) if key not in fastest_of
            )
            where = () if anywhere else (item.hardware, *machine_of(item).values())
            groups[*where, *point].append(item)
    if not groups:
        return []
    best = max(groups.values(), key=_worth)
    if fastest_of:
        best = sorted(
            best, key=lambda item: item.row.value or 0.0
        )  # stable: the last of each model is its fastest
    chosen = {item.row.model: item for item in best}
    return [chosen[model] for model in dict.fromkeys(item.row.model for item in rows) if model in chosen]


def _worth(group: list[Measured]) -> tuple[int, int, float]:
    tokens = group[0].row.point.get("tokens")
    models = len({item.row.model for item in group})
    return models, tokens if isinstance(tokens, int) else 0, sum(item.row.value or 0 for item in group)


def point_text(item: Measured, *, without: tuple[str, ...] = ()) -> str:
    """Describe the point and hardware of a row for a caption."""
    point = item.row.point.items()
    parts = [f"{key} {value}" for key, value in point if key not in without and value is not None]
    return clean(", ".join([*parts, item.hardware]))


def decode_rows(collection: Collection, family: str) -> list[Measured]:
    """Return each model's speed of decoding at one length, with its fastest attention and engine.

    By the cards' protocol if decoding alone was not measured.
    """
    for metric in ("speed.decode", "speed.protocol"):
        if chosen := at_one_point(collection.of(family, metric), fastest_of=FASTEST_OF):
            return chosen
    return []


FASTEST_OF = ("attention", "engine")
"""Choices that change only how fast a model answers: each model is shown with its best."""
