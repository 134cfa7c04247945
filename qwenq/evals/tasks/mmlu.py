"""Ask MMLU: 57 subjects, four options, 14,042 questions (Hendrycks et al. 2021).

Sources of the protocols: ``evaluate_chat_mmlu.py`` and ``evaluate_mmlu.py`` of QwenLM/Qwen (card, base),
``tasks/mmlu/default`` of lm-evaluation-harness 0.4.13 (lm-eval). Differences from them:

- Options are text. The scripts read them with pandas, which turns an option such as ``None`` or ``N/A`` into
  ``nan`` in the prompt; here it stays what the file says.
- card: an option without text, or of full stops alone, is not searched for; the script inserts its letter
  between any two characters.
- base: a prompt that is too long for the model is an error of the run; the script drops its beginning.
- lm-eval: shows 5 examples, as ``--num_fewshot 5``; the harness shows none by default.
- lm-eval: no special token comes before a prompt, as with Qwen's tokenizers; the harness keeps those of
  others, such as Llama's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from qwenq.errors import DataError
from qwenq.evals.task import (
    Choose,
    Item,
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
    judge_loglikelihood,
    load_choices,
    options_by_length,
)
from qwenq.evals.tasks.data import Row, place_of, read_hub

VERSION = 1

CHAT_PROMPT = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as "
    "the answer to this question.\n\n{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"
)
MAX_NEW_TOKENS = 512
HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
OPTIONS = "\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
QUESTION = "Question: {question}" + OPTIONS
LM_EVAL_QUESTION = "{question}" + OPTIONS
SHOT_ANSWER = " {answer}\n\n"
CONTINUATIONS = tuple(f" {letter}" for letter in LETTERS)

PATTERNS = tuple(
    map(
        re.compile,
        (
            # "the answer is C", "I choose C"; not "the answer is not C"
            r"(?:(?:[Cc]hoose)|(?:(?:[Aa]nswer|[Cc]hoice)(?![^ABCD]{0,20}?(?:n't|not))[^ABCD]{0,10}?"
            r"\b(?:|is|:|be))\b)[^ABCD]{0,20}?\b(A|B|C|D)\b",
            # "C is correct"; not "C is not correct"
            r"\b(A|B|C|D)\b(?![^ABCD]{0,8}?(?:n't|not)[^ABCD]{0,5}?(?:correct|right))[^ABCD]{0,10}?"
            r"\b(?:correct|right)\b",
            # the answer begins with its letter
            r"^(A|B|C|D)(?:\.|,|:|$)",
            # the first letter that stands alone
            r"(?<![a-zA-Z])(A|B|C|D)(?![a-zA-Z=])",
        ),
    )
)

# fmt: off
COUNTS = {
    "abstract_algebra": 100, "anatomy": 135, "astronomy": 152, "business_ethics": 100,
    "clinical_knowledge": 265, "college_biology": 144, "college_chemistry": 100,
    "college_computer_science": 100, "college_mathematics": 100, "college_medicine": 173,
    "college_physics": 102, "computer_security": 100, "conceptual_physics": 235, "econometrics": 114,
    "electrical_engineering": 145, "elementary_mathematics": 378, "formal_logic": 126, "global_facts": 100,
    "high_school_biology": 310, "high_school_chemistry": 203, "high_school_computer_science": 100,
    "high_school_european_history": 165, "high_school_geography": 198,
    "high_school_government_and_politics": 193, "high_school_macroeconomics": 390,
    "high_school_mathematics": 270, "high_school_microeconomics": 238, "high_school_physics": 151,
    "high_school_psychology": 545, "high_school_statistics": 216, "high_school_us_history": 204,
    "high_school_world_history": 237, "human_aging": 223, "human_sexuality": 131, "international_law": 121,
    "jurisprudence": 108, "logical_fallacies": 163, "machine_learning": 112, "management": 103,
    "marketing": 234, "medical_genetics": 100, "miscellaneous": 783, "moral_disputes": 346,
    "moral_scenarios": 895, "nutrition": 306, "philosophy": 311, "prehistory": 324,
    "professional_accounting": 282, "professional_law": 1534, "professional_medicine": 272,
    "professional_psychology": 612, "public_relations": 110, "security_studies": 245, "sociology": 201,
    "us_foreign_policy": 100, "virology": 166, "world_religions": 171,
}
"""Questions by subject in the test split: 14,042."""

HUMANITIES = (
    "formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history",
    "international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios",
    "philosophy", "prehistory", "professional_law", "world_religions",
)
SOCIAL = (
    "econometrics", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
    "human_sexuality", "professional_psychology", "public_relations", "security_studies", "sociology",
    "us_foreign_policy",
)
OTHER = (
    "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging",
    "management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting",
    "professional_medicine", "virology",
)
# fmt: on
CATEGORIES: Mapping[str, Sequence[str]] = {
    "stem": tuple(name for name in COUNTS if name not in HUMANITIES + SOCIAL + OTHER),
    "humanities": HUMANITIES,
    "social sciences": SOCIAL,
    "other": OTHER,
}
"""As Qwen's scripts and the harness group them: anatomy is a science there, unlike in the data's own list."""


def ask_chat(item: Item) -> Request:
    """Return the bare question as the first message of a chat."""
    return Write(first_turn(CHAT_PROMPT.format_map(item.data)), MAX_NEW_TOKENS)


def read_chat(item: Item, answer: Written) -> Judgement:
    """Judge the letter that was named, once options' texts are replaced by their letters."""
    text = chat_text(answer)
    for letter, option in options_by_length(item):
        if option.rstrip("."):
            text = re.sub(re.escape(option.rstrip(".")), letter, text, flags=re.IGNORECASE)
    return judge_letter(item, text, PATTERNS)


def ask_base(item: Item) -> Request:
    """Return examples and question as plain text, continued by `` A`` … `` D``."""
    return Choose(_few_shot(item, QUESTION), CONTINUATIONS)


def ask_lm_eval(item: Item) -> Request:
    """Return the harness's prompt: no ``Question:``, and questions without white space around them."""
    return Choose(_few_shot(item, LM_EVAL_QUESTION, strip=True), CONTINUATIONS)


def _few_shot(item: Item, question: str, *, strip: bool = False) -> str:
    subject = (item.subject or "").replace("_", " ")
    rows = [
        {**row, "question": row["question"].strip()} if strip else row for row in (*item.shots, item.data)
    ]
    shown = "".join((question + SHOT_ANSWER).format_map(row) for row in rows[:-1])
    return HEADER.format(subject=subject) + shown + question.format_map(rows[-1])


def _from_hub(split: str, subjects: Sequence[str], copy: Path | None = None) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {subject: [] for subject in subjects}
    place = place_of("cais/mmlu", split, copy)
    config = "all" if copy is None or any(copy.rglob("all")) else None  # a copy may be of some subjects
    for number, record in enumerate(read_hub("cais/mmlu", config, split, copy=copy), 1):
        where = f"{place}, row {number}"
        options, answer = record.get("choices"), record.get("answer")
        texts = [record.get("question"), *(options if isinstance(options, list) else ())]
        whole = len(texts) == 5 and all(isinstance(text, str) for text in texts)
        if not (whole and isinstance(answer, int) and answer in range(4)):
            raise DataError("a row needs a question, 4 choices, and an answer from 0 to 3", where=where)
        if record.get("subject") in found:
            values = (*texts, LETTERS[answer])
            found[record["subject"]].append(Row(dict(zip(COLUMNS, values, strict=True)), where))
    empty = [subject for subject, rows in found.items() if not rows]
    if empty:
        raise DataError(f"no rows of {', '.join(empty)}", where=place)
    return found


ORIGIN = ChoiceSet("mmlu", COUNTS, 14042, "test", COLUMNS, header=False, hub=_from_hub)
_script = partial(
    Task,
    name="mmlu",
    version=VERSION,
    load=partial(load_choices, ORIGIN),
    average=partial(score_all, categories=CATEGORIES),
    comment=partial(missing_subjects, "mmlu", COUNTS),
)
PROTOCOLS: tuple[Task, ...] = (
    _script(**CARD, ask=ask_chat, read=read_chat),
    _script(protocol="base", shots=5, allowed_shots=range(6), ask=ask_base, read=judge_choice),
    _script(protocol="lm-eval", shots=5, allowed_shots=range(6), ask=ask_lm_eval, read=judge_loglikelihood),
)
