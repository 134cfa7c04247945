"""Ask CMMLU: 67 Chinese subjects, four options, over 11,000 questions (Li et al. 2023).

Source of the base protocol: ``evaluate_cmmlu.py`` of QwenLM/Qwen, whose prompt and letters are C-Eval's.
There is no published script for chat models: ``card`` is C-Eval's, our choice.

The paper and the published files differ in the number of questions of a subject, so a file counts as whole
from the 100 rows on that every subject has.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from qwenq.errors import DataError
from qwenq.evals.task import Task, missing_subjects, score_all
from qwenq.evals.tasks.ceval import ask_base, ask_chat, read_chat
from qwenq.evals.tasks.choices import CARD, LETTERS, ChoiceSet, judge_choice, load_choices, read_subject
from qwenq.evals.tasks.data import Row, fetch_hub_file

VERSION = 1

FILE_COLUMNS = ("Question", *LETTERS, "Answer")
HUB = "lmlmcat/cmmlu"
ARCHIVE = "cmmlu_v1_0_1.zip"
"""The original files on the hub, beside a script that newer ``datasets`` do not run."""

# fmt: off
STEM = (
    "anatomy", "astronomy", "college_actuarial_science", "college_engineering_hydrology",
    "college_mathematics", "college_medical_statistics", "computer_science", "conceptual_physics",
    "electrical_engineering", "elementary_mathematics", "genetics", "high_school_biology",
    "high_school_chemistry", "high_school_mathematics", "high_school_physics", "machine_learning", "virology",
)
HUMANITIES = (
    "arts", "chinese_history", "chinese_literature", "college_law", "global_facts", "international_law",
    "jurisprudence", "logical", "marxist_theory", "philosophy", "professional_law", "world_history",
    "world_religions",
)
SOCIAL_SCIENCE = (
    "ancient_chinese", "business_ethics", "chinese_civil_service_exam", "chinese_food_culture",
    "chinese_foreign_policy", "chinese_teacher_qualification", "college_education", "economics", "education",
    "elementary_chinese", "ethnology", "high_school_geography", "high_school_politics", "journalism",
    "management", "marketing", "modern_chinese", "professional_accounting", "professional_psychology",
    "public_relations", "security_study", "sociology",
)
OTHER = (
    "agronomy", "chinese_driving_rule", "clinical_knowledge", "college_medicine", "computer_security",
    "construction_project_management", "elementary_commonsense", "elementary_information_and_technology",
    "food_science", "human_sexuality", "legal_and_moral_basis", "nutrition", "professional_medicine",
    "sports_science", "traditional_chinese_medicine",
)
CHINA_SPECIFIC = (
    "ancient_chinese", "chinese_civil_service_exam", "chinese_driving_rule", "chinese_food_culture",
    "chinese_foreign_policy", "chinese_history", "chinese_literature", "chinese_teacher_qualification",
    "construction_project_management", "elementary_chinese", "elementary_commonsense", "ethnology",
    "high_school_politics", "modern_chinese", "traditional_chinese_medicine",
)
# fmt: on
SUBJECTS = tuple(sorted(STEM + HUMANITIES + SOCIAL_SCIENCE + OTHER))
CATEGORIES: Mapping[str, Sequence[str]] = {
    "stem": STEM,
    "humanities": HUMANITIES,
    "social science": SOCIAL_SCIENCE,
    "other": OTHER,
    "china specific": CHINA_SPECIFIC,
}
"""The first four partition the subjects; the last overlaps them."""


def _copy_in(folder: Path | None) -> Path | None:
    return folder if folder is not None and (folder / ARCHIVE).is_file() else None


def _from_hub(split: str, subjects: Sequence[str], copy: Path | None = None) -> dict[str, list[Row]]:
    path = fetch_hub_file(HUB, ARCHIVE, sampled=False) if copy is None else copy / ARCHIVE
    try:
        with zipfile.ZipFile(path) as archive:
            root = zipfile.Path(archive)
            return {subject: read_subject(ORIGIN, root, split, subject) for subject in subjects}
    except zipfile.BadZipFile as error:
        raise DataError(
            f"not a whole zip archive: {error}", where=path, hint="delete it and try again"
        ) from error


ORIGIN = ChoiceSet(
    "cmmlu",
    dict.fromkeys(SUBJECTS),
    None,
    "test",
    FILE_COLUMNS,
    header=True,
    hub=_from_hub,
    file="{split}/{subject}.csv",
    least=100,
    copy=_copy_in,
)
_script = partial(
    Task,
    name="cmmlu",
    version=VERSION,
    load=partial(load_choices, ORIGIN),
    average=partial(score_all, macro=True, categories=CATEGORIES),
    comment=partial(missing_subjects, "cmmlu", SUBJECTS),
)
PROTOCOLS: tuple[Task, ...] = (
    _script(**CARD, ask=ask_chat, read=read_chat),
    _script(protocol="base", shots=5, allowed_shots=range(6), ask=ask_base, read=judge_choice),
)
