"""Make and judge questions with options, two to ten of them, each under its letter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from re import Pattern

from qwenq.errors import DataError
from qwenq.evals.task import LETTERS, Chosen, Item, Judgement, letters_of
from qwenq.evals.tasks.files import Row, require_text, text_columns

COLUMNS = ("question", "A", "B", "C", "D", "answer")
_NOT_ASCII_LATIN = dict.fromkeys(range(128, 256))


def lettered(question: str, options: Sequence[str], answer: str, where: str) -> dict[str, str]:
    """Return a checked row with each option under its letter."""
    letters = LETTERS[: len(options)]
    require_text(question, "question", where)
    if len(options) > len(LETTERS) or answer not in letters:
        raise DataError(
            f"the answer is {answer!r} of {len(options)} options",
            where=where,
            hint=f"it has to be the letter of one of at most {len(LETTERS)} options",
        )
    return {"question": question, **dict(zip(letters, options, strict=True)), "answer": answer}


def letter_item(row: Row, subject: str | None, columns: Sequence[str] = COLUMNS) -> Item:
    """Return an item of columns that are named by their letters, in any case but for these."""
    names = {name: name if name in LETTERS else name.lower() for name in row.data}
    named = {names[name]: str(value) if name == "id" else value for name, value in row.data.items()}
    found = text_columns(Row(named, row.where), columns)
    options = [found[letter] for letter in letters_of(found)]
    return Item("", subject, found | lettered(found["question"], options, found["answer"], row.where))


def judge_choice(item: Item, answer: Chosen) -> Judgement:
    """Judge the likeliest letter by float32 log probabilities; ``published`` by the scripts' double softmax.

    Of equal ones the first counts, as in ``numpy.argmax``, which both originals use.
    """
    gold, letter = item.data["answer"], _likeliest(item, answer.logprobs)
    also = {"published": _likeliest(item, answer.published) == gold} if answer.published else {}
    return Judgement(letter == gold, letter, also=also)


def judge_loglikelihood(item: Item, answer: Chosen) -> Judgement:
    """Judge the likeliest letter by float32 log probabilities alone."""
    return judge_found(item, _likeliest(item, answer.logprobs))


def judge_found(item: Item, letter: str | None) -> Judgement:
    """Judge a letter that was found in an answer, or that none was."""
    note = None if letter else "no letter in the answer"
    return Judgement(letter == item.data["answer"], letter, note=note)


def judge_text(item: Item, text: str, patterns: Iterable[Pattern[str]]) -> Judgement:
    """Judge the letter that the first matching pattern finds, else that of the option most like the text.

    In the text, options' texts are already replaced by their letters; of a pattern it is group 1.
    """
    gold, letters = item.data["answer"], letters_of(item.data)
    for pattern in patterns:
        if match := pattern.search(text):
            return Judgement(match.group(1) == gold, match.group(1))
    place = closest_option(text, [item.data[letter] for letter in letters])
    if place is None:
        return Judgement(False, None, note="the answer has nothing in common with any option")
    note = "no letter in the answer: the option most like its text"
    return Judgement(letters[place] == gold, letters[place], note=note)


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


def options_by_length(row: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return letters and texts of the options, longest first, so that none is replaced inside another."""
    return sorted(((letter, row[letter]) for letter in letters_of(row)), key=lambda pair: -len(pair[1]))


def _likeliest(item: Item, scores: Sequence[float]) -> str:
    """Return the letter of the greatest score, the first of equal ones."""
    return letters_of(item.data)[max(range(len(scores)), key=scores.__getitem__)]
