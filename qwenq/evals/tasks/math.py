"""Ask MATH: 5,000 competition problems (Hendrycks et al. 2021), and MATH-500, a part of it (Lightman et al.).

``base`` has the form of Minerva's 4 examples (Lewkowycz et al. 2022): ``Problem:``, ``Solution:``, and at the
end ``Final Answer: The final answer is $…$. I hope it is correct.`` The four examples were written for this
project, so a score is close to, but not the same as, one with Minerva's. Qwen's own script for MATH is not
published, nor one for chat models. The stated final answer counts, else the last ``\\boxed{…}``.

Other protocols of MATH-500: ``card`` is the prompt ``qwen-boxed`` of QwenLM/Qwen2.5-Math, whose sentence
Qwen's later model cards have, too; ``lm-eval`` that of ``hendrycks_math500`` of lm-evaluation-harness 0.4.13,
without examples. Answers are compared as those of MATH; the harness compares text. All problems count alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

from qwenq.errors import DataError
from qwenq.evals.task import DataSource, Item, Judgement, Task, Written
from qwenq.evals.tasks.data import Dataset, subjects_of
from qwenq.evals.tasks.files import Row, require_text, text_columns

# Find and compare final answers of mathematics.
#
# Two answers are the same if their normal forms are equal as text, or both are numbers of one value, or
# lists of one shape with equal parts. There is no algebra: ``x + 1`` and ``1 + x`` differ, as in the score
# of Hendrycks et al., so a score is a lower bound of one that simplifies with a computer algebra system.


BOXES = re.compile(r"\\f?boxed\s*|\\fbox\s*")
STATED = re.compile(r"[Ff]inal [Aa]nswer is:?\s*(.+?)\s*\.?\s*(?:I hope it is correct|$)", re.MULTILINE)
"""The end of the Minerva prompt's examples."""

_SPACES = re.compile(r"\\[,;:! ]|~|\\quad|\\qquad|\s+")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)(?![A-Za-z])")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree")
_PERCENT = re.compile(r"\\?%")
_MONEY = re.compile(r"\\\$")
_UNITS = re.compile(r"(?<=.)\\(?:text|mbox|mathrm|textrm)\{[^{}]*\}(?:\^\{?\d\}?)?$", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)|(\{[^{}]*\}))(?:(\d)|(\{[^{}]*\}))")
_SHORT_ROOT = re.compile(r"\\sqrt([0-9A-Za-z])")
_NAMED = re.compile(r"^[A-Za-z](?:\([A-Za-z]\))?(?:=|\\in)(?=.)")
_THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")
_DECIMAL = re.compile(r"^[+-]?(?:\d+\.?\d*|\.\d+)$")
_QUOTIENT = re.compile(r"^([+-]?)(\d*)\\frac\{([+-]?\d+)\}\{(\d+)\}$")
_SLASH = re.compile(r"^([+-]?\d+)/(\d+)$")
_OPEN, _CLOSE = "([{", ")]}"
_LONGEST = 200  # characters of an answer that is still read as a number


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{…}`` or ``\fbox{…}``; None without a closed one."""
    found = list(BOXES.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for place, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:place]
    return None


def stated(text: str) -> str | None:
    """Return the text behind the first "final answer is", to the end of its sentence."""
    match = STATED.search(text)
    return match.group(1) if match else None


def same_answer(one: str, other: str) -> bool:
    """Return whether two answers are the same, without algebra."""
    return _same(normal(one), normal(other))


def normal(text: str) -> str:
    r"""Return the normal form of an answer: that of ``$x=\dfrac12\text{ cm}$.`` is ``\frac{1}{2}``."""
    text = text.strip().rstrip(".").strip()
    if (box := boxed(text)) is not None:
        text = box
    text = _MONEY.sub("", text).replace("$", "").removeprefix(r"\(").removesuffix(r"\)").strip()
    text = _UNITS.sub("", text.rstrip(". "))
    text = _WORDS.sub(r"\1", text)
    for pattern in (_SIZES, _DEGREES, _PERCENT):
        text = pattern.sub("", text)
    text = _FRACTIONS.sub(r"\\frac", text).replace("{,}", ",").replace(r"\{", "{").replace(r"\}", "}")
    text = _SPACES.sub("", text)
    text = _SHORT_FRACTION.sub(_long_fraction, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _NAMED.sub("", text)
    return text.replace(",", "") if _THOUSANDS.match(text) else text


def number(text: str) -> Fraction | None:
    r"""Return the value of a normal form (decimal, ``\frac{a}{b}``, ``a\frac{b}{c}``, ``a/b``), or None."""
    if len(text) > _LONGEST:
        return None
    if _DECIMAL.match(text):
        return Fraction(text)
    if match := _SLASH.match(text):
        return _ratio(match.group(1), match.group(2))
    if match := _QUOTIENT.match(text):
        sign, whole, above, below = match.groups()
        ratio = _ratio(above, below)
        value = None if ratio is None else Fraction(int(whole or 0)) + ratio
        return -value if value is not None and sign == "-" else value
    return None


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = number(one), number(other)
    if first is not None or second is not None:
        return first == second
    ours, theirs = _parts(one), _parts(other)
    return len(ours) == len(theirs) > 1 and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))


def _parts(text: str) -> list[str]:
    """Split at commas outside of inner brackets; the outer brackets come first and last."""
    around = text[:1] in _OPEN and text[-1:] in _CLOSE and len(text) > 1
    inner = text[1:-1] if around else text
    parts, depth = [""], 0
    for char in inner:
        depth += (char in _OPEN) - (char in _CLOSE)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if len(parts) == 1:
        return [text]
    return [text[0], *parts, text[-1]] if around else parts


def _ratio(above: str, below: str) -> Fraction | None:
    return Fraction(int(above), int(below)) if int(below) else None


def _long_fraction(match: re.Match[str]) -> str:
    above, below = (match[1] or match[2].strip("{}")), (match[3] or match[4].strip("{}"))
    return rf"\frac{{{above}}}{{{below}}}"


# Ask for them.


CHAT_PROMPT = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PROBLEM = "Problem:\n{problem}\n\nSolution:"
SHOT = PROBLEM + " {solution}\nFinal Answer: The final answer is ${answer}$. I hope it is correct.\n\n"

EXAMPLES = (
    {
        "problem": r"For which real $x$ is $\frac{1}{\sqrt{9-x^2}}$ defined? Answer with an interval.",
        "solution": r"The root is real if $9-x^2\ge 0$, that is, if $-3\le x\le 3$. It is below the line, so "
        r"it must not be zero, which rules out $x=-3$ and $x=3$. What is left is $\boxed{(-3,3)}$.",
        "answer": "(-3,3)",
    },
    {
        "problem": r"A matrix $\mathbf{M}$ with 2 rows and 2 columns has $\det \mathbf{M} = 5.$ "
        r"Find $\det (3 \mathbf{M}).$",
        "solution": r"Each of the 2 rows is multiplied by 3, and each time so is the determinant. Hence "
        r"$\det (3\mathbf{M}) = 3^2 \cdot 5 = \boxed{45}.$",
        "answer": "45",
    },
    {
        "problem": "A pump that moves 12 litres a minute empties a tank in 35 minutes. How long does a "
        "pump take, in minutes, that moves 20 litres a minute?",
        "solution": r"The tank holds $12\cdot 35 = 420$ litres. The other pump takes $t$ minutes with"
        "\n\\begin{align*}\n20t &= 420\\\\\nt &= 420/20 = \\boxed{21}\n\\end{align*}",
        "answer": "21",
    },
    {
        "problem": r"The line through $(0, c)$ and $(4, d)$ has the slope $-\frac{3}{8}$. What is $c - d$?",
        "solution": r"From the first point to the second, $x$ grows by $4$ and $y$ by $d - c$. So "
        r"$$\frac{d-c}{4} = -\frac{3}{8},$$ hence $d - c = -\frac{3}{2}$ and $c - d = \boxed{\frac{3}{2}}.$",
        "answer": r"\frac{3}{2}",
    },
)
"""Written for this project."""

COUNTS, _ = subjects_of("math")


def make(row: Row, _: str | None) -> Item:
    """Return the item of a problem of MATH; of the original files the number is the file's."""
    data = text_columns(row, ("problem", "solution", "type"))
    subject = _subject(data["type"], row.where)
    if (answer := boxed(data["solution"])) is None:
        raise DataError("the solution has no boxed answer", where=row.where)
    require_text(data["problem"], "problem", row.where)
    name = row.data.get("file")
    return Item(f"{subject}/{name}" if name else "", subject, {**data, "answer": answer})


def make_500(row: Row, _: str | None) -> Item:
    """Return the item of a problem of MATH-500."""
    data = text_columns(row, ("problem", "solution", "answer", "subject", "unique_id"))
    for name in ("problem", "answer"):
        require_text(data[name], name, row.where)
    id_ = data["unique_id"].removeprefix("test/").removesuffix(".json")
    return Item(id_, _subject(data["subject"], row.where), data)


def _subject(named: str, where: str) -> str:
    subject = named.lower().replace("&", "and").replace(" ", "_")
    if subject not in COUNTS:
        raise DataError(f"no subject of MATH is called {named!r}", where=where)
    return subject


def judge(item: Item, answer: Written) -> Judgement:
    """Judge the stated final answer, else the last box."""
    return _judged(item, stated(answer.text) or boxed(answer.text))


def judge_chat(item: Item, answer: Written) -> Judgement:
    """Judge the last box, else the stated final answer."""
    text = answer.text.strip()
    return _judged(item, boxed(text) or stated(text))


def judge_lm_eval(item: Item, answer: Written) -> Judgement:
    """Judge the text between the first and the last dollar sign, else the whole answer."""
    first, last = answer.text.find("$"), answer.text.rfind("$")
    found = answer.text[first + 1 : last] if last > first else answer.text
    return _judged(item, found.strip() or None)


def _judged(item: Item, found: str | None) -> Judgement:
    if found is None:
        return Judgement(False, None, note="no final answer")
    return Judgement(same_answer(found, item.data["answer"]), found)


MATH = Dataset(
    name="math",
    make=make,
    counts=COUNTS,
    hub="EleutherAI/hendrycks_math",
    config="{subject}",
    files=("{split}.jsonl", "{split}/{subject}"),
)
MATH_500 = Dataset(
    name="math-500", make=make_500, counts=subjects_of("math-500")[0], hub="HuggingFaceH4/MATH-500"
)


def load(data: Dataset, source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
    """Return all problems of a set, with our examples."""
    return [replace(item, shots=EXAMPLES[:shots]) for item in data.items(source, subjects)]


_minerva = partial(
    Task,
    protocol="base",
    version=1,
    shots=4,
    allowed_shots=range(5),
    shot=SHOT,
    question=PROBLEM,
    until=("Problem:", "I hope it is correct"),
    max_new_tokens=1024,
    judge=judge,
)
_500 = partial(Task, name="math-500", version=1, load=partial(load, MATH_500), subjects=COUNTS)
PROTOCOLS: tuple[Task, ...] = (
    _minerva(name="math", load=partial(load, MATH), subjects=COUNTS),
    _500(protocol="card", question=CHAT_PROMPT, max_new_tokens=2048, judge=judge_chat),
    _minerva(name="math-500", load=partial(load, MATH_500), subjects=COUNTS),
    _500(
        protocol="lm-eval",
        question="Problem: {problem}\nAnswer:",
        until=("Problem:",),
        max_new_tokens=1024,  # our choice: the harness's default of 256 cuts most solutions
        judge=judge_lm_eval,
    ),
)
