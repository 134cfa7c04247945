"""Match the rows of two runs: each row of the baseline with at most one row of the new run.

A folder may hold rows of several models of one precision: of other group sizes or names, which distinguish
them, or of a model that was quantised again later, which only the weights' fingerprint distinguishes. The
earlier rows of a run that was continued in its folder may even be the baseline's own. A gate that took those
would pass whatever came after.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qwenq.reporting.collect import Measured
from qwenq.results import Model

_EMPTY_FOLDER = "start each run in an empty folder"


@dataclass(frozen=True)
class Match:
    """What a row of the baseline is compared with.

    Attributes:
        found: candidate rows of the new run.
        why: why it cannot be compared with any of them; empty for exactly one, or for no candidate at all.
    """

    found: tuple[Measured, ...] = ()
    why: str = ""


def matched(olds: Sequence[Measured], news: Sequence[Measured]) -> list[Match]:
    """Return the match of each row of the baseline, in its order."""
    candidates: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for item in news:
        candidates[item.row.identity].append(item)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(olds):
        groups[item.row.identity].append(index)
    made: dict[int, Match] = {}
    for identity, indices in groups.items():
        matches = _match_identity([olds[index] for index in indices], candidates[identity])
        made.update(zip(indices, matches, strict=True))
    return [made[index] for index in range(len(olds))]


def _match_identity(olds: list[Measured], news: list[Measured]) -> list[Match]:
    """Match rows that only their models distinguish."""
    known = {old.row.model.fingerprint for old in olds}
    found = [_candidates(old, news, known) for old in olds]
    claims: dict[int, list[Measured]] = defaultdict(list)
    for old, candidates in zip(olds, found, strict=True):
        if old.row.status == "ok" and len(candidates) == 1:
            claims[id(candidates[0])].append(old)
    return [_match(old, candidates, claims) for old, candidates in zip(olds, found, strict=True)]


def _match(old: Measured, found: list[Measured], claims: dict[int, list[Measured]]) -> Match:
    """Match one row; of several rows that claim the same one, that of the most similar model gets it."""
    if len(found) > 1:
        why = f"{len(found)} models of the new run could be the same model: {_EMPTY_FOLDER}"
        return Match(tuple(found), why)
    if not found or old.row.status != "ok" or len(rivals := claims[id(found[0])]) == 1:
        return Match(tuple(found))
    similar = [_similarity(rival, found[0]) for rival in rivals]
    if _similarity(old, found[0]) < max(similar):
        return Match(why=f"missing in the new run, which has one of {len(rivals)} such models")
    if similar.count(max(similar)) > 1:
        why = f"{len(rivals)} models of the baseline could be the same model: {_EMPTY_FOLDER}"
        return Match(tuple(found), why)
    return Match(tuple(found))


def _candidates(old: Measured, news: list[Measured], known: set[str]) -> list[Measured]:
    """Return the rows of the same weights, and similar ones of weights that the baseline does not have.

    Args:
        old: of the baseline.
        news: of the new run.
        known: fingerprints of the baseline's rows of this identity.
    """
    similar = _most_similar(old, news)
    same = [item for item in news if item.row.model.fingerprint == old.row.model.fingerprint]
    if not same:
        return similar
    new = (item for item in similar if item.row.model.fingerprint not in known)
    return [*_most_similar(old, same), *new]


def _most_similar(old: Measured, news: list[Measured]) -> list[Measured]:
    """Narrow several rows down by method, group size and name, in this order."""
    for index, trait in enumerate(_traits(old.row.model)):
        if len(news) > 1:
            news = [item for item in news if _traits(item.row.model)[index] == trait] or news
    return news


def _traits(model: Model) -> tuple[bool, int | None, str]:
    """Return what distinguishes models of one precision: rounded on the fly or not, group size, name."""
    return (model.rounded_from is not None, model.group_size, model.name)


def _similarity(old: Measured, new: Measured) -> tuple[bool, ...]:
    """Return which traits two models share, the most telling first."""
    one, other = old.row.model, new.row.model
    shared = (a == b for a, b in zip(_traits(one), _traits(other), strict=True))
    return (one.fingerprint == other.fingerprint, *shared)
