"""Average verdicts over items (micro) or over subjects (macro)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qwenq.evals.task import Item, Judgement, Score

MAIN = "accuracy"
_Verdict = tuple[str | None, bool]  # subject of an item, and whether it was answered correctly


def score_all(
    judged: Sequence[tuple[Item, Judgement]],
    *,
    macro: bool = False,
    categories: Mapping[str, Sequence[str]] | None = None,
) -> list[Score]:
    """Return the main score, then one for each further verdict of all items (``accuracy.published``).

    Args:
        judged: at least one item.
        macro: subjects count alike; else items do. Categories are averaged the same way inside.
        categories: subjects by category; a subject may be in several. Those without items are left out.
    """
    further = [name for name in judged[0][1].also if all(name in verdict.also for _, verdict in judged)]
    main = [(item.subject, verdict.correct) for item, verdict in judged]
    scores = [_score(MAIN, main, macro, categories or {})]
    for name in further:
        verdicts = [(item.subject, verdict.also[name]) for item, verdict in judged]
        scores.append(_score(f"{MAIN}.{name}", verdicts, macro, categories or {}))
    return scores


def _score(
    metric: str, verdicts: Sequence[_Verdict], macro: bool, categories: Mapping[str, Sequence[str]]
) -> Score:
    by_category = {
        name: _average([verdict for verdict in verdicts if verdict[0] in subjects], macro)
        for name, subjects in categories.items()
        if any(subject in subjects for subject, _ in verdicts)
    }
    return Score(
        metric=metric,
        value=_average(verdicts, macro),
        macro=macro,
        n=len(verdicts),
        parts=_by_subject(verdicts),
        categories=by_category,
    )


def _average(verdicts: Sequence[_Verdict], macro: bool) -> float:
    if macro:
        return _mean(_by_subject(verdicts).values())
    return _mean(float(correct) for _, correct in verdicts)


def _by_subject(verdicts: Sequence[_Verdict]) -> dict[str, float]:
    subjects = dict.fromkeys(subject for subject, _ in verdicts if subject is not None)
    return {
        subject: _mean(float(correct) for name, correct in verdicts if name == subject)
        for subject in subjects
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
