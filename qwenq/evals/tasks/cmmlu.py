"""Ask CMMLU: 67 Chinese subjects, four options, over 11,000 questions (Li et al. 2023).

Source of the base protocol: ``evaluate_cmmlu.py`` of QwenLM/Qwen, whose prompt and letters are C-Eval's.
There is no published script for chat models: ``card`` is C-Eval's, our choice.

The paper and the published files differ in the number of questions of a subject, so a file counts as whole
from the 100 rows on that every subject has. The hub has the original files as an archive, beside a script
that newer ``datasets`` do not run.
"""

from __future__ import annotations

from functools import partial

from qwenq.evals.task import LETTERS, Task, score_all
from qwenq.evals.tasks import ceval
from qwenq.evals.tasks.choices import letter_item
from qwenq.evals.tasks.data import Dataset, subjects_of
from qwenq.evals.tasks.files import read_csv

SUBJECTS, CATEGORIES = subjects_of("cmmlu")
"""The first four categories partition the subjects; the last overlaps them."""

CMMLU = Dataset(
    name="cmmlu",
    make=letter_item,
    counts=SUBJECTS,
    hub="lmlmcat/cmmlu",
    hub_file="cmmlu_v1_0_1.zip",
    files=("{split}/{subject}.csv",),
    read=partial(read_csv, columns=("Question", *LETTERS[:4], "Answer"), header=True),
    least=100,
)
_task = partial(
    Task,
    name="cmmlu",
    load=CMMLU.load,
    subjects=SUBJECTS,
    average=partial(score_all, macro=True, categories=CATEGORIES),
)
PROTOCOLS: tuple[Task, ...] = (_task(**ceval.CARD, judge=ceval.judge_chat), _task(**ceval.BASE))
