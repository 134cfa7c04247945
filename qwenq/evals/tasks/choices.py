"""Load and judge questions with four options, for MMLU, C-Eval and CMMLU."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import Chosen, DataSource, Item, Judgement
from qwenq.evals.tasks.data import AnyPath, Row, check_count, copy_in, local_folder, read_csv

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("question", *LETTERS, "answer")
CARD: dict[str, Any] = {"protocol": "card", "version": 2, "shots": 0, "allowed_shots": (0,)}
"""Settings of the chat protocol in all of these tasks; its version is counted separately."""
_NOT_ASCII_LATIN = dict.fromkeys(range(128, 256))


@dataclass(frozen=True)
class ChoiceSet:
    """Source of a benchmark's questions.

    Attributes:
        name: of its folder.
        counts: published number of scored rows, by subject; None where only the total is known.
        total: of all subjects; None where sources differ.
        split: the scored split.
        columns: of its files; the rows of items have them in lower case, but for the letters.
        header: whether the files begin with a line that names the columns.
        hub: the rows of (split, subjects, copy) by subject: from the hub, or from a copy of its files.
        answered: whether the scored split has its answers.
        file: names of the files.
        copy: returns the folder if it holds the hub's files.
        least: rows that every subject has; a file with fewer is truncated.
    """

    name: str
    counts: Mapping[str, int | None]
    total: int | None
    split: str
    columns: Sequence[str]
    header: bool
    hub: Callable[[str, Sequence[str], Path | None], Mapping[str, list[Row]]]
    answered: bool = True
    file: str = "{split}/{subject}_{split}.csv"
    least: int = 1
    copy: Callable[[Path | None], Path | None] = copy_in

    def path(self, folder: AnyPath, split: str, subject: str) -> AnyPath:
        """Return the path of a subject's rows."""
        return folder / self.file.format(split=split, subject=subject)


def load_choices(origin: ChoiceSet, source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all items, subject by subject, in file order.

    Raises:
        DataError: no data, broken data, or a subject that the source does not have.
        UsageError: a subject that does not exist.
    """
    folder = local_folder(source, origin.name)
    known = _subjects_in(folder, origin.split) if source.sample and folder else list(origin.counts)
    _check_known(origin.name, subjects, known)
    wanted = [subject for subject in known if not subjects or subject in subjects]
    copy = None if folder is not None and (folder / origin.split).is_dir() else origin.copy(folder)
    if folder is None or copy is not None:
        scored = origin.hub(origin.split, wanted, copy)
        examples = origin.hub("dev", wanted, copy) if shots else {}
    else:
        wanted = _present(origin, folder, wanted, asked=bool(subjects))
        scored = {subject: read_subject(origin, folder, origin.split, subject) for subject in wanted}
        examples = (
            {subject: read_subject(origin, folder, "dev", subject) for subject in wanted} if shots else {}
        )
    if not source.sample:
        _check_counts(origin, scored, folder)
    items = []
    for subject in wanted:
        _check_rows(scored[subject], answered=origin.answered)
        shown = _examples(examples.get(subject, []), shots, subject)
        items += [Item(f"{subject}/{n}", subject, row.data, shown) for n, row in enumerate(scored[subject])]
    return items


def judge_choice(item: Item, answer: Chosen) -> Judgement:
    """Judge the likeliest letter by float32 log probabilities; ``published`` by the scripts' double softmax.

    Of equal ones the first counts, as in ``numpy.argmax``, which both originals use.
    """
    letter = LETTERS[_first_of_the_greatest(answer.logprobs)]
    gold = item.data.get("answer")  # a split without answers has none
    also = {}
    if gold and answer.published:
        also["published"] = LETTERS[_first_of_the_greatest(answer.published)] == gold
    return Judgement(letter == gold, letter, also=also, known=bool(gold))


def judge_loglikelihood(item: Item, answer: Chosen) -> Judgement:
    """Judge the likeliest letter by float32 log probabilities alone."""
    letter = LETTERS[_first_of_the_greatest(answer.logprobs)]
    return Judgement(letter == item.data["answer"], letter)


def judge_letter(item: Item, text: str, patterns: Iterable[re.Pattern[str]]) -> Judgement:
    """Judge the letter that the first matching pattern finds, else that of the option most like the text.

    Args:
        text: the answer, with the options' texts already replaced by their letters.
        patterns: each with the letter as its group 1, in order.
    """
    gold = item.data.get("answer")
    for pattern in patterns:
        if match := pattern.search(text):
            return Judgement(match.group(1) == gold, match.group(1), known=bool(gold))
    place = closest_option(text, [item.data[letter] for letter in LETTERS])
    if place is None:
        return Judgement(False, None, note="the answer has nothing in common with any option")
    letter = LETTERS[place]
    note = "no letter in the answer: the option most like its text"
    return Judgement(letter == gold, letter, note=note, known=bool(gold))


def closest_option(text: str, options: Sequence[str]) -> int | None:
    """Return the index of the option that ``thefuzz.process.extractOne(text, options)`` gives, or None.

    thefuzz scores with rapidfuzz's WRatio after its own clean-up, which rapidfuzz alone leaves out: a
    character that is neither letter nor digit becomes a space, ends are trimmed, case is dropped, and code
    points 128 to 255 (é, ü, ×, but no Chinese) are removed; from the query after a first clean-up.
    """
    from rapidfuzz import fuzz, process
    from rapidfuzz.utils import default_process

    def cleaned(value: str) -> str:
        return str(default_process(value.translate(_NOT_ASCII_LATIN)))

    found = process.extractOne(default_process(text), options, scorer=fuzz.WRatio, processor=cleaned)
    return None if found is None else options.index(found[0])


def options_by_length(item: Item) -> list[tuple[str, str]]:
    """Return letters and texts of the options, longest first, so that none is replaced inside another."""
    return sorted(((letter, item.data[letter]) for letter in LETTERS), key=lambda pair: -len(pair[1]))


def check_letter(row: Row) -> None:
    """Refuse a row whose answer is not A, B, C or D."""
    if row.data["answer"] not in LETTERS:
        raise DataError(
            f"the answer is {row.data['answer']!r}", where=row.where, hint="it has to be A, B, C or D"
        )


def _first_of_the_greatest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _subjects_in(folder: Path, split: str) -> list[str]:
    return sorted(path.name.removesuffix(f"_{split}.csv") for path in (folder / split).glob(f"*_{split}.csv"))


def _check_known(name: str, subjects: Sequence[str], known: Sequence[str]) -> None:
    for subject in subjects:
        if subject not in known:
            close = difflib.get_close_matches(subject, known, n=3)
            raise UsageError(
                f"{name} has no subject {subject!r}",
                where="--subjects",
                hint=f"did you mean {' or '.join(close)}?" if close else f"such as {', '.join(known[:3])}",
            )


def _present(origin: ChoiceSet, folder: Path, wanted: Sequence[str], *, asked: bool) -> list[str]:
    """Return the subjects that have a file; those asked for by name need one."""
    there = [s for s in wanted if asked or origin.path(folder, origin.split, s).exists()]
    if not there:
        some = next(iter(origin.counts))
        raise DataError(
            f"no {origin.name} file there",
            where=folder / origin.split,
            hint=f"it should hold files such as {origin.path(folder, origin.split, some).name}",
        )
    return there


def read_subject(origin: ChoiceSet, folder: AnyPath, split: str, subject: str) -> list[Row]:
    """Return the rows of one subject's file, whose folder may be inside a zip archive."""
    columns = list(origin.columns)
    optional = ["explanation", ""]  # the second is what pandas calls the column of row numbers
    if split == origin.split and not origin.answered:
        columns.remove("answer")
        optional.append("answer")  # some copies have the column, empty
    rows = read_csv(origin.path(folder, split, subject), columns, header=origin.header, optional=optional)
    return [Row(spelled(row.data), row.where) for row in rows]


def spelled(data: Mapping[str, str]) -> dict[str, str]:
    """Return a row with the names of COLUMNS, in any case in the file, without row numbers."""
    return {name if name in LETTERS else name.lower(): text for name, text in data.items() if name}


def _check_counts(origin: ChoiceSet, scored: Mapping[str, Sequence[Row]], folder: Path | None) -> None:
    for subject, rows in scored.items():
        expected = origin.counts[subject]
        if len(rows) < origin.least:
            raise DataError(
                f"{len(rows)} rows where the published set has {origin.least} or more",
                where=rows[0].where.rsplit(", ", 1)[0],
                hint="get the file again; --limit N evaluates the first N items of a whole set",
            )
        if expected is not None:
            check_count(len(rows), expected, rows[0].where.rsplit(", ", 1)[0])
    if origin.total is not None and len(scored) == len(origin.counts):
        check_count(sum(map(len, scored.values())), origin.total, folder or f"hub, {origin.name}")


def _check_rows(rows: Sequence[Row], *, answered: bool = True) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        if not row.data["question"].strip():
            raise DataError("the question is empty", where=row.where)
        if answered:
            check_letter(row)
        if "id" in row.data:
            if row.data["id"] in seen:
                raise DataError(
                    f"id {row.data['id']} occurs twice",
                    where=row.where,
                    hint=f"first: {seen[row.data['id']]}",
                )
            seen[row.data["id"]] = row.where


def _examples(rows: Sequence[Row], shots: int, subject: str) -> tuple[Mapping[str, str], ...]:
    if len(rows) < shots:
        raise DataError(
            f"{len(rows)} examples where {shots} are to be shown",
            where=rows[0].where.rsplit(", ", 1)[0] if rows else f"dev split of {subject}",
            hint="get the dev files again, or show fewer with --shots",
        )
    _check_rows(rows)
    return tuple(row.data for row in rows[:shots])
