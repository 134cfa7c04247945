"""Ask C-Eval: 52 Chinese subjects, four options; 1,346 questions with answers, 12,342 without (Huang et al.).

Sources of the protocols: ``evaluate_chat_ceval.py`` and ``evaluate_ceval.py`` of QwenLM/Qwen. ``ceval``
scores the val split, as the cards do. ``ceval-test`` answers the test split, whose answers are not published:
it has no score, but a file for the leaderboard (`submission`).

Difference from the scripts, as in MMLU: options are text, and an empty option is not searched for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwenq.errors import DataError
from qwenq.evals.task import (
    Choose,
    Item,
    Judged,
    Judgement,
    Request,
    Task,
    Write,
    Written,
    chat_text,
    first_turn,
    missing_subjects,
    score_all,
)
from qwenq.evals.tasks.choices import (
    CARD,
    COLUMNS,
    LETTERS,
    ChoiceSet,
    judge_choice,
    judge_letter,
    load_choices,
    options_by_length,
)
from qwenq.evals.tasks.data import Row, place_of, read_hub, text_columns

VERSION = 1

CHAT_PROMPT = "{question}\n\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"
MAX_NEW_TOKENS = 512
QUESTION = "问题：{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案："
SHOT = QUESTION + "{answer}\n\n"
"""No line about the subject before the first, unlike MMLU's."""

PATTERNS = tuple(
    map(
        re.compile,
        (
            # 答案是C, 应该选C; not 答案不是C
            r"(?:(?:选|选择|选定)[：:]?\s*|(?:(?:答案|选项)(?![^ABCD]{0,10}?(?:不|非)[^ABCD]{0,10}?"
            r"(?:是|选|为|：|:|】))[^ABCD]{0,10}?(?:是|选|为|：|:|】))[^ABCD]{0,10}?)(A|B|C|D)(?:选项)?"
            r"(?:\)|。|\.|，|,|．|、|A|B|C|D|$|：|:|\)|）)",
            # C选项正确; not C不正确
            r"(A|B|C|D)(?:选?项)?(?![^ABCD]{0,4}?(?:不|非)[^ABCD]{0,4}?(?:正确|对[的，。：]|符合))"
            r"[^ABCD]{0,4}?(?:正确|对[的，。：]|符合)",
            # the answer begins with its letter
            r"^[\(（]?(A|B|C|D)(?:。|\)|）|\.|，|,|．|：|:|$)",
            # the first letter that stands alone
            r"(?<![a-zA-Z])(A|B|C|D)(?![a-zA-Z=])",
        ),
    )
)
LONG = 4  # a part of the question longer than this is removed from the answer

# fmt: off
STEM = {
    "advanced_mathematics": 19, "college_chemistry": 24, "college_physics": 19, "college_programming": 37,
    "computer_architecture": 21, "computer_network": 19, "discrete_mathematics": 16,
    "electrical_engineer": 37, "high_school_biology": 19, "high_school_chemistry": 19,
    "high_school_mathematics": 18, "high_school_physics": 19, "metrology_engineer": 24,
    "middle_school_biology": 21, "middle_school_chemistry": 20, "middle_school_mathematics": 19,
    "middle_school_physics": 19, "operating_system": 19, "probability_and_statistics": 18,
    "veterinary_medicine": 23,
}
SOCIAL_SCIENCE = {
    "business_administration": 33, "college_economics": 55, "education_science": 29,
    "high_school_geography": 19, "high_school_politics": 19, "mao_zedong_thought": 24, "marxism": 19,
    "middle_school_geography": 12, "middle_school_politics": 21, "teacher_qualification": 44,
}
HUMANITIES = {
    "art_studies": 33, "chinese_language_and_literature": 23, "high_school_chinese": 19,
    "high_school_history": 20, "ideological_and_moral_cultivation": 19, "law": 24, "legal_professional": 23,
    "logic": 22, "middle_school_history": 22, "modern_chinese_history": 23, "professional_tour_guide": 29,
}
OTHER = {
    "accountant": 49, "basic_medicine": 19, "civil_servant": 47, "clinical_medicine": 22,
    "environmental_impact_assessment_engineer": 31, "fire_engineer": 31, "physician": 49,
    "plant_protection": 22, "sports_science": 19, "tax_accountant": 49, "urban_and_rural_planner": 46,
}
HARD = (
    "advanced_mathematics", "discrete_mathematics", "probability_and_statistics", "college_physics",
    "college_chemistry", "high_school_mathematics", "high_school_physics", "high_school_chemistry",
)
# fmt: on
VAL_COUNTS = {**STEM, **SOCIAL_SCIENCE, **HUMANITIES, **OTHER}
"""Questions by subject in the val split: 1,346."""
CATEGORIES: Mapping[str, Sequence[str]] = {
    "stem": tuple(STEM),
    "social science": tuple(SOCIAL_SCIENCE),
    "humanities": tuple(HUMANITIES),
    "other": tuple(OTHER),
    "hard": HARD,
}


def ask_chat(item: Item) -> Request:
    """Return the bare question as the first message of a chat."""
    return Write(first_turn(CHAT_PROMPT.format_map(item.data)), MAX_NEW_TOKENS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter that was named, or whose option completed the question's last sentence."""
    text = chat_text(answer)
    parts = item.data["question"].rstrip("。").split("。")[-1].split("_")
    if len(parts[0].strip()) > LONG:
        text = text.replace(parts[0], "答案是")
    if len(parts[-1].strip()) > LONG:
        text = text.replace(parts[-1], "")
    for letter, option in options_by_length(item):
        if option.rstrip("。"):
            text = text.replace(option.rstrip("。"), letter)
    return judge_letter(item, text, PATTERNS)


def ask_base(item: Item) -> Request:
    """Return examples and question as plain text, continued by ``A`` … ``D`` without a space."""
    shown = "".join(SHOT.format_map(row) for row in item.shots)
    return Choose(shown + QUESTION.format_map(item.data), LETTERS)


def submission(judged: Judged) -> dict[str, dict[str, str]]:
    """Return answers to the test split in the leaderboard's layout: ``{subject: {id: letter}}``.

    Raises:
        DataError: an item has no answer; the leaderboard needs all of them.
    """
    answers: dict[str, dict[str, str]] = {}
    for item, judgement in judged:
        if judgement.extracted is None or item.subject is None:
            raise DataError("an item has no answer, and the leaderboard needs all of them", where=item.id)
        answers.setdefault(item.subject, {})[item.data["id"]] = judgement.extracted
    return answers


def _from_hub(split: str, subjects: Sequence[str], copy: Path | None = None) -> dict[str, list[Row]]:
    columns = ("id", *(COLUMNS[:-1] if split == "test" else COLUMNS))
    found = {}
    for subject in subjects:
        where = place_of(f"ceval/ceval-exam, {subject}", split, copy)
        records = enumerate(read_hub("ceval/ceval-exam", subject, split, copy=copy), 1)
        found[subject] = [_row(record, columns, f"{where}, row {n}") for n, record in records]
    return found


def _row(record: Mapping[str, Any], columns: Sequence[str], where: str) -> Row:
    """Return a row of the hub, whose ids are numbers, as text."""
    named = {**record, "id": str(record["id"])} if "id" in record else dict(record)
    return Row(text_columns(named, columns, where), where)


VAL = ChoiceSet("ceval", VAL_COUNTS, 1346, "val", ("id", *COLUMNS), header=True, hub=_from_hub)
TEST = ChoiceSet(
    "ceval", dict.fromkeys(VAL_COUNTS), 12342, "test", ("id", *COLUMNS), True, hub=_from_hub, answered=False
)
_val = partial(
    Task,
    name="ceval",
    version=VERSION,
    load=partial(load_choices, VAL),
    average=partial(score_all, macro=True, categories=CATEGORIES),
    comment=partial(missing_subjects, "ceval", VAL_COUNTS),
)
_test = partial(
    Task,
    name="ceval-test",
    version=VERSION,
    load=partial(load_choices, TEST),
    average=lambda judged: [],  # the answers are not published
    comment=partial(missing_subjects, "ceval", VAL_COUNTS),
)
PROTOCOLS: tuple[Task, ...] = (
    _val(**CARD, ask=ask_chat, read=read_chat),
    _val(protocol="base", shots=5, allowed_shots=range(6), ask=ask_base, read=judge_choice),
    _test(**CARD, ask=ask_chat, read=read_chat),
    _test(protocol="base", shots=5, allowed_shots=range(6), ask=ask_base, read=judge_choice),
)
