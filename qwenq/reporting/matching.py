"""Which row of a new run a row of the baseline is compared with: one, and nobody else's; or nobody can tell.

A folder may hold rows of several models of one precision: with other groups or names, which tell them apart,
or of a model that was quantised anew since, which nothing does. The earlier rows of a run that went on in its
folder may be the baseline's very own. To take them would be to pass whatever has come after.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qwenq.reporting.collect import Measured
from qwenq.results import Model

_EMPTY = "begin it in an empty folder"


@dataclass(frozen=True)
class Match:
    """What a row of the baseline is compared with.

    Attributes:
        found: rows of the new run that may be meant.
        why: why it is compared with none of them; empty where there is one, or none to be had.
    """

    found: tuple[Measured, ...] = ()
    why: str = ""


def matched(olds: Sequence[Measured], news: Sequence[Measured]) -> list[Match]:
    """For each row of the baseline, in its order."""
    theirs: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for item in news:
        theirs[item.row.identity].append(item)
    mine: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, item in enumerate(olds):
        mine[item.row.identity].append(place)
    made: dict[int, Match] = {}
    for identity, places in mine.items():
        matches = _of_one_identity([olds[place] for place in places], theirs[identity])
        made.update(zip(places, matches, strict=True))
    return [made[place] for place in range(len(olds))]


def _of_one_identity(olds: list[Measured], news: list[Measured]) -> list[Match]:
    """The matches of rows that only their models tell apart."""
    known = {old.row.model.fingerprint for old in olds}
    meant = [_meant(old, news, known) for old in olds]
    claims: dict[int, list[Measured]] = defaultdict(list)
    for old, found in zip(olds, meant, strict=True):
        if old.row.status == "ok" and len(found) == 1:
            claims[id(found[0])].append(old)
    return [_match(old, found, claims) for old, found in zip(olds, meant, strict=True)]


def _match(old: Measured, meant: list[Measured], claims: dict[int, list[Measured]]) -> Match:
    """One row of the new run is a match of one row of the baseline only: that of the model nearest to it."""
    if len(meant) > 1:
        return Match(tuple(meant), f"{len(meant)} models of the new run could be meant: {_EMPTY}")
    if not meant or old.row.status != "ok" or len(rivals := claims[id(meant[0])]) == 1:
        return Match(tuple(meant))
    near = [_nearness(rival, meant[0]) for rival in rivals]
    if _nearness(old, meant[0]) < max(near):
        return Match(why=f"missing in the new run: of {len(rivals)} such models it has but one")
    if near.count(max(near)) > 1:
        return Match(tuple(meant), f"{len(rivals)} models of the baseline could be meant: {_EMPTY}")
    return Match(tuple(meant))


def _meant(old: Measured, news: list[Measured], known: set[str]) -> list[Measured]:
    """The rows that may be meant: those of the same weights, unless others cannot be told from them.

    Args:
        old: of the baseline.
        news: of the new run.
        known: fingerprints of all rows of the baseline that could be meant by these.
    """
    alike = _most_alike(old, news)
    same = [item for item in news if item.row.model.fingerprint == old.row.model.fingerprint]
    if not same:
        return alike
    return [*_most_alike(old, same), *(item for item in alike if item.row.model.fingerprint not in known)]


def _most_alike(old: Measured, news: list[Measured]) -> list[Measured]:
    """Of several, those of the same making, group size or name, one after the other."""
    for place, fact in enumerate(_told_apart_by(old.row.model)):
        if len(news) > 1:
            news = [item for item in news if _told_apart_by(item.row.model)[place] == fact] or news
    return news


def _told_apart_by(model: Model) -> tuple[bool, int | None, str]:
    """What tells models of one precision apart: whether it was made on the fly, group size, name."""
    return (model.rounded_from is not None, model.group_size, model.name)


def _nearness(old: Measured, new: Measured) -> tuple[bool, ...]:
    """What both models have in common, what tells most first."""
    one, other = old.row.model, new.row.model
    alike = (a == b for a, b in zip(_told_apart_by(one), _told_apart_by(other), strict=True))
    return (one.fingerprint == other.fingerprint, *alike)
