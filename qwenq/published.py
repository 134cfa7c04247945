"""Read the figures of Qwen's model cards (``published.toml``), which plans and reports show beside theirs."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class PublishedRow:
    """A card's figures for one precision of a model (units and protocol: head of ``published.toml``)."""

    model: str
    precision: str
    hardware: str
    source: str
    accuracy: dict[str, float]
    speed: dict[str, list[float]]
    memory_gib: list[float]


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return every row, in the order of the file."""
    data = tomllib.loads(files("qwenq").joinpath("published.toml").read_text(encoding="utf-8"))
    return tuple(
        PublishedRow(**{**row, "hardware": data["hardware"][row["hardware"]]}) for row in data["row"]
    )


def published_of(name: str) -> list[PublishedRow]:
    """Return the rows of a model by its catalogue name, hub id or folder; empty where there are none.

    ``Qwen/Qwen-1_8B-Chat``, ``Qwen-1_8B-Chat`` and ``qwen-1.8b-chat`` are one model: hub ids cannot hold
    every name, so they write ``_`` for the point.
    """
    wanted = name.rstrip("/").rsplit("/", 1)[-1].lower().replace("_", ".")
    return [row for row in published_rows() if row.model == wanted]
