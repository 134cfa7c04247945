"""Declare every setting of a recipe once: name, type, default, bounds and help.

A recipe says what to do to which model, as one TOML file. The command line's options (``cli.options``) and
the table of docs/recipes.md are made from what is declared here. Pydantic is imported when it is needed.

model = "Qwen/Qwen2.5-0.5B-Instruct"

[calibration]
source = "self"
samples = 128

[quantize]
bits = 4
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from qwenq.errors import UsageError

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Limits of a value, which pydantic checks: ``Annotated[int, Bounds(ge=1)]``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    pattern: str | None = None
    strict: bool | None = None  # of a whole number: true is not one

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of the type itself with these limits."""
        return {**handler(source), **{name: v for name, v in vars(self).items() if v is not None}}


Count = Annotated[int, Bounds(ge=1, strict=True)]
NotNegative = Annotated[int, Bounds(ge=0, strict=True)]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Thinking = Literal["auto", "on", "off"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionName = Literal["auto", "v2", "v1", "off", "sdpa", "split", "grouped", "best"]
EngineName = Literal["fast", "transformers"]
ON_CPU, ON_GPU = (48, 256), (128, 2048)
"""Calibration sequences, and tokens of each, that auto stands for where memory suffices."""
FAIL_ON = "accuracy:significant, kl:>0.05, speed:<0.95, memory:>1.05, size:>1.0"
"""Conditions of the gate where the recipe has none (``reporting.gate`` has the rules)."""


def setting(default: T, help: str, more: str = "", *, shown: str = "", flags: str = "") -> T:
    """Declare a setting of a recipe.

    Args:
        default: its value where the recipe does not have the key.
        help: a sentence for ``--help`` and docs/recipes.md.
        more: further sentences for docs/recipes.md.
        shown: what the default means, where None or an empty list does not say it.
        flags: of a boolean setting: its options, such as ``--sym/--asym``.
    """
    field: T = dataclasses.field(
        default=default, metadata={"help": help, "more": more, "shown": shown, "flags": flags}
    )
    return field


@dataclass(frozen=True)
class CalibrationRecipe:
    """Text that the Hessians are measured on."""

    source: str = setting(
        "self",
        "Calibration text: self (the model writes it); a file of text, JSON, CSV or parquet; a folder of "
        "these; a set made by `qwenq calibrate`; or a hub dataset owner/name[:config].",
        "Files: `.txt`, `.md`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, also compressed. A folder may "
        "be one of `save_to_disk`. A set is a `.safetensors` file.",
    )
    samples: Count | Literal["auto"] = setting(
        "auto",
        "Calibration sequences; auto: 48 on a CPU, 128 on a GPU, fewer where memory is short.",
        "A set that `qwenq calibrate` makes has 32 × 512 tokens by default.",
    )
    seq_len: Count | Literal["auto"] = setting(
        "auto",
        "Tokens of a calibration sequence; auto: 256 on a CPU, 2048 on a GPU, fewer where memory is short.",
        "At most what the model takes; of Qwen v1 `seq_length`.",
    )
    held_out: Count = setting(8, "Further sequences, used only to check the result.")
    split: str | None = setting(
        None,
        "Split of a hub dataset, or of a folder whose files are named after splits.",
        shown="train",
    )
    column: str | None = setting(
        None,
        "Column or key that holds the text.",
        shown="the first of text, messages, conversations that is filled",
    )
    thinking: Thinking = setting(
        "auto", "enable_thinking of the chat template, for conversations; auto: the template's default."
    )


@dataclass(frozen=True)
class QuantizeRecipe:
    """Settings of GPTQ."""

    bits: Literal[4, 8] = setting(4, "Bits of a weight.")
    group_size: Literal["auto", 32, 64, 128, -1] = setting(
        "auto",
        "Input columns that share a scale; -1: the whole row; auto: the largest of 128, 64, 32 that divides "
        "every width. vLLM and SGLang load no other sizes.",
    )
    module_bits: dict[str, Literal[4, 8, 16]] | Literal["auto"] = setting(
        "auto",
        "Bits of linear layers whose names match a pattern: 4, 8, or 16 to leave them as they are; the first "
        "match counts. auto: linear attention in 8 bits where the rest has 4.",
        'As `{ "linear_attn" = 8, "self_attn" = 16 }`; on the command line `--module-bits PATTERN=BITS`, '
        "which may be repeated.",
    )
    budget: str | float | None = setting(
        None,
        "Size to reach, with 8 bits where they count most and 4 elsewhere: 4.5: bits that a weight takes, "
        "scales included; 450MB: of all weights; rtx-4090:8192: what fits that GPU with so many tokens.",
        "Each group of layers is rounded to 4 bits alone and the whole model's KL divergence measured; the "
        "choice is the best for these figures, which `qwenq.json` and the report show.",
        shown="the same bits everywhere",
    )
    sym: bool = setting(
        True,
        "Symmetric: the zero point is fixed in the middle; else each group has its own.",
        "With zero points the format is `gptq_v2`, which neither vLLM nor SGLang loads: see `any_engine`.",
        flags="--sym/--asym",
    )
    act_order: Literal["static", "none"] = setting(
        "static",
        "Order of columns: static: by importance (act-order), with groups fixed before; none: file order.",
    )
    scale_search: Literal["hessian", "mse", "none"] = setting(
        "hessian",
        "How a group's scale is chosen: hessian: least error weighted by the Hessian's diagonal; mse: least "
        "error; none: from the largest weight.",
    )
    damp: Annotated[float, Bounds(gt=0, lt=1)] = setting(
        0.1,
        "Damping: share of the Hessian's mean diagonal that is added to it.",
        "It keeps the solver from following what is chance in the text; raised, with a notice, where the "
        "factorisation fails.",
    )
    asymmetric_calibration: Annotated[float, Bounds(ge=0, le=1)] = setting(
        0.5,
        "Share of the error inherited from earlier layers that a layer corrects (GPTAQ's alpha); 0: plain "
        "GPTQ.",
    )
    coordinate_descent: bool = setting(
        True,
        "After GPTQ, coordinate descent on the same objective over integers and scales, two sweeps.",
        flags="--coordinate-descent/--no-coordinate-descent",
    )
    any_engine: bool = setting(
        False,
        "Quantise also where neither vLLM nor SGLang would load the result, as with --asym.",
        flags="--any-engine",
    )
    dtype: Dtype = setting("auto", "dtype of the forward pass; auto: what the device multiplies fastest.")
    seed: NotNegative = setting(0, "Seed of the calibration text, and of random weights.")


@dataclass(frozen=True)
class EvalRecipe:
    """Benchmarks, and how they are run."""

    tasks: tuple[str, ...] = setting(
        ("mmlu", "ceval", "gsm8k", "humaneval"),
        "Benchmarks, comma-separated: mmlu, ceval, gsm8k, humaneval, cmmlu, mbpp, math, bbh, "
        "mmlu-pro, gpqa-diamond, ifeval, math-500.",
        "math and bbh have the base protocol only.",
    )
    protocol: Literal["auto", "card", "base", "lm-eval"] = setting(
        "auto",
        "Prompts and scoring: card: as in Qwen's model cards; base: few-shot, for base models; lm-eval: as "
        "lm-evaluation-harness; auto: card for chat models, else base.",
    )
    subjects: tuple[str, ...] = setting(
        (), "Subjects of tasks that have some, such as MMLU, comma-separated.", shown="all"
    )
    limit: Count | dict[str, Count] | None = setting(
        None,
        "Use only the first N items of each subject (or task without subjects): 20, or by task: "
        "mmlu=20,gsm8k=150.",
        "In a recipe `20` or `{ mmlu = 20, gsm8k = 150 }`.",
        shown="all",
    )
    shots: NotNegative | None = setting(
        None, "Examples before each question (few-shot).", shown="the protocol's"
    )
    thinking: Thinking = setting(
        "auto", "Let models think before they answer (enable_thinking); auto: off where it can be switched."
    )
    max_new_tokens: Count | dict[str, Count] | None = setting(
        None,
        "Limit of new tokens of a written answer: 2048, or by task: gsm8k=2048,humaneval=4096.",
        "In a recipe `2048` or `{ gsm8k = 2048 }`.",
        shown="the protocol's; 32768 where the model thinks",
    )
    data: str | None = setting(
        None, "Folder of the benchmarks' files: mmlu/, ceval/, gsm8k/, humaneval/ …", shown="the hub"
    )
    sample: bool = setting(
        False, "Use the small suite that ships with qwenq; it is not the benchmark.", flags="--sample"
    )
    dtype: Dtype = setting(
        "auto",
        "dtype of the computation; auto: what the device multiplies natively.",
        "In a recipe that of quantised models; an unquantised model has that of its precision.",
    )


@dataclass(frozen=True)
class ProfileRecipe:
    """Points at which speed and memory are measured."""

    tokens: tuple[Count, ...] = setting(
        (2048,),
        "Numbers of new tokens to generate, comma-separated; 0: no generation.",
        "In a recipe `[]` for no generation. Qwen's cards have `[2048, 8192]`.",
    )
    encode: tuple[Count, ...] = setting(
        (2048,),
        "Lengths of prompts whose prefill is measured, comma-separated; 0: no prefill.",
        "In a recipe `[]` for no prefill.",
    )
    attention: tuple[AttentionName, ...] = setting(
        ("auto",),
        "Attention backends that `qwenq doctor` lists, comma-separated; auto: grouped on a CPU, else sdpa.",
    )
    engine: tuple[EngineName, ...] = setting(("fast",), "Engines, comma-separated: fast, transformers.")
    budget: Annotated[str, Bounds(pattern=r"^(\d+(\.\d+)?[smh])+$")] | None = setting(
        None, "Time limit of the whole sweep: 90s, 10m, 1h30m.", shown="unlimited"
    )


@dataclass(frozen=True)
class ReportRecipe:
    """Name and title of the report."""

    name: Annotated[str, Bounds(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = setting(
        None, "Name of the report's folder.", shown="the recipe file's"
    )
    folder: str = setting("reports", "Folder that the report's folder is made in.")
    title: str | None = setting(None, "Heading of the report.", shown="the models' names")


@dataclass(frozen=True)
class GateRecipe:
    """What the result is compared with, and what fails."""

    baseline: str | None = setting(
        None, "Run folder to compare with; without it nothing is compared.", shown="not set"
    )
    fail_on: str | None = setting(
        None,
        "Conditions that fail, comma-separated: METRIC:significant, or METRIC:>LIMIT, METRIC:<LIMIT (new / "
        "baseline; of kl new − baseline); none: compare only.",
        shown=f"{FAIL_ON}, where the baseline has such rows",
    )


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; `qwenq run` leaves out the steps of sections that are None.

    One that was made in Python is checked by ``validated``; those read from a file, and what ``override``
    returns, are sound.
    """

    model: str | None = setting(None, "Model folder or hub id.", shown="the bundled model")
    weights: Literal["stored", "random"] = setting(
        "stored",
        "random: MODEL is a catalogue name such as qwen-7b-chat, and its weights are drawn from a seed.",
        "For speed and memory without a download; with `[profile]`, Int8 and Int4 are rounded on the fly and "
        "nothing is quantised.",
    )
    precisions: tuple[Precision, ...] = setting(
        (),
        "Precisions that `qwenq run` makes and measures: fp32, bf16, fp16, int8, int4.",
        shown="bf16 and that of bits",
    )
    calibration: CalibrationRecipe = CalibrationRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    eval: EvalRecipe | None = None
    profile: ProfileRecipe | None = None
    report: ReportRecipe = ReportRecipe()
    gate: GateRecipe = GateRecipe()

    def override(self, top: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
        """Return a copy in which the given keys (those that are not None) replace the recipe's.

        Args:
            top: keys outside any section.
            sections: keys by section.

        Raises:
            UsageError: a value out of its range.
        """
        merged = dataclasses.asdict(self)
        merged.update({key: value for key, value in (top or {}).items() if value is not None})
        for name, values in sections.items():
            given = {key: value for key, value in values.items() if value is not None}
            merged[name] = {**(merged[name] or {}), **given}
        return _validate(merged, "the command line")

    def validated(self) -> Recipe:
        """Return the recipe with every value checked.

        Raises:
            UsageError: a value out of its range.
        """
        return _validate(dataclasses.asdict(self), "the recipe")

    def to_json(self) -> dict[str, Any]:
        """Return all keys as plain JSON values."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return content


SECTIONS: dict[str, type[Any]] = {
    "calibration": CalibrationRecipe,
    "quantize": QuantizeRecipe,
    "eval": EvalRecipe,
    "profile": ProfileRecipe,
    "report": ReportRecipe,
    "gate": GateRecipe,
}
"""The tables of a recipe file."""


@dataclass(frozen=True)
class Setting:
    """One declared setting; see ``setting``."""

    section: str  # its table; "" for keys outside any
    name: str
    default: Any
    kinds: tuple[Any, ...]  # the alternatives of its type: types such as int, and literal values
    limits: str  # bounds of its numbers, such as ``0 < x < 1``
    help: str
    more: str
    shown: str
    flags: str

    @property
    def key(self) -> str:
        """Return the name in a recipe, such as ``quantize.bits``."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def values(self) -> str:
        """Return what it may be: ``4, 8``; ``auto, number (x >= 1)``."""
        names = {
            dict: "table",
            tuple: "list",
            bool: "true, false",
            int: "number",
            float: "number",
            str: "text",
        }
        shown = [names.get(kind, str(kind)) for kind in self.kinds if kind is not type(None)]
        return ", ".join(dict.fromkeys(shown)) + (f" ({self.limits})" if self.limits else "")


@cache
def settings(section: str) -> dict[str, Setting]:
    """Return the settings of a table ("": outside any) by name, in their order."""
    owner = SECTIONS[section] if section else Recipe
    hints = get_type_hints(owner, include_extras=True)
    return {
        field.name: Setting(
            section,
            field.name,
            field.default,
            tuple(_kinds(hints[field.name])),
            next(_limits(hints[field.name]), ""),
            **field.metadata,
        )
        for field in dataclasses.fields(owner)
        if field.metadata
    }


def _kinds(hint: Any) -> Iterator[Any]:
    """Yield the alternatives of a type: ``Literal[4, 8] | Count`` gives 4, 8, int."""
    origin = get_origin(hint)
    if origin is Annotated:
        yield from _kinds(get_args(hint)[0])
    elif origin is Literal:
        yield from get_args(hint)
    elif origin in (Union, UnionType):
        for each in get_args(hint):
            yield from _kinds(each)
    else:
        yield origin or hint


def _limits(hint: Any) -> Iterator[str]:
    """Yield the bounds of the numbers in a type: ``x >= 1``, ``0 < x < 1``."""
    for bounds in getattr(hint, "__metadata__", ()):
        low, high = bounds.ge, bounds.le
        if bounds.gt is not None:
            yield f"{bounds.gt:g} < x < {bounds.lt:g}"
        elif low is not None:
            yield f"x >= {low:g}" if high is None else f"{low:g} <= x <= {high:g}"
    for part in get_args(hint):
        yield from _limits(part)


def markdown_table() -> str:
    """Return the table of docs/recipes.md: every key with its default and meaning."""
    notes = {
        "eval": "without this section `qwenq run` evaluates nothing",
        "profile": "without this section `qwenq run` profiles nothing",
    }
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for section in ("", *SECTIONS):
        if section:
            lines.append(f"| **`[{section}]`** | | | {notes.get(section, '')} |".replace("|  |", "| |"))
        for each in settings(section).values():
            default = each.shown or f"`{json.dumps(each.default)}`"
            meaning = " ".join(part for part in (each.help, each.more) if part)
            lines.append(f"| `{each.name}` | {default} | {each.values} | {meaning} |")
    return "\n".join(lines)


_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
HUB_ID = re.compile(rf"{_PART}/{_PART}")
"""owner/name on the hub."""


def options_of(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a command for settings of a section that are not the defaults."""
    for name, each in settings(section).items():
        option, value = f"--{name.replace('_', '-')}", values.get(name)
        if value is None or _typed(value) == _typed(each.default):
            continue
        if isinstance(value, bool):
            yield each.flags.split("/")[0 if value else -1]
        elif name == "module_bits" and isinstance(value, dict):  # the option that is repeated
            for pattern, bits in value.items():
                yield from (option, f"{pattern}={bits}")
        else:
            yield from (option, _typed(value))


def _typed(value: Any) -> str:
    """Return a value as it is typed on the command line: ``20``, ``mmlu=20,gsm8k=150``, ``2048,8192``."""
    if isinstance(value, dict):
        value = [f"{key}={number}" for key, number in value.items()]
    return ",".join(map(str, value)) or "0" if isinstance(value, list | tuple) else str(value)


def quantize_command(recipe: Mapping[str, Any], out: str) -> str:
    """Return the command that quantises by a recipe (``Recipe.to_json``): options that are not the defaults.

    Of folders and files the names are shown, without where they lie.
    """
    words = ["qwenq", "quantize"]
    if recipe.get("model"):
        given = str(recipe["model"])
        words.append(given if HUB_ID.fullmatch(given) else Path(given).name)
    calibration = recipe.get("calibration", {})
    if (source := str(calibration.get("source", "self"))) != "self":
        words += ["--calibration", Path(source).name]
    sizes = {key: calibration.get(key) for key in ("samples", "seq_len")}
    options = (*options_of("calibration", sizes), *options_of("quantize", recipe.get("quantize", {})))
    return " ".join([*words, *options, "--out", out])


LARGEST = 1_000_000
"""Limit of a recipe file, in bytes."""


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        UsageError: no such file, not TOML, an unknown key (the nearest is suggested), a bad value.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UsageError(
                f"the file has more than {LARGEST // 1_000_000} MB; no recipe is so long",
                where=path,
                hint="`qwenq recipe settings` lists all that it may hold",
            )
        content = tomllib.loads(text.decode("utf-8-sig"))  # Windows editors write a byte-order mark
    except FileNotFoundError as error:
        raise UsageError("no such recipe", where=path, hint="name a TOML file that is there") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the recipe cannot be read: {error}", where=path, hint="a recipe is a TOML file in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # TOML's own error; endless digits; endless nesting
        other = _other_language(text.decode("utf-8-sig"))
        raise UsageError(
            f"this looks like {other}; a recipe of qwenq is a TOML file"
            if other
            else f"the recipe is not TOML: {error}",
            where=path,
            hint="docs/recipes.md and recipes/ have examples"
            if other
            else "repair that line: NAME = VALUE, text in quotes, below a [SECTION]",
        ) from error
    return _validate(content, str(path))


def _other_language(text: str) -> str:
    """Return ``JSON`` or ``YAML``, which other tools' recipes are in; empty for neither.

    YAML is told by the first line with content: ``key:``, ``key: value``, ``- item`` or ``---``.
    """
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), dict | list):
            return "JSON"
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return "YAML" if re.match(r"(---|- |[\w.\"'-]+\s*:(\s|$))", first) else ""


def _validate(content: dict[str, Any], where: str) -> Recipe:
    from pydantic import ValidationError

    try:
        recipe: Recipe = _adapter().validate_python(content)
    except ValidationError as error:
        raise _explained(error, where) from error
    return recipe


@cache
def _adapter() -> Any:
    """Return pydantic's validator of a recipe; importing pydantic at the top would delay ``--help``."""
    from pydantic import ConfigDict, TypeAdapter

    for section in (*SECTIONS.values(), Recipe):
        setattr(section, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010 - unknown to mypy
    return TypeAdapter(Recipe)


def _explained(error: ValidationError, where: str) -> UsageError:
    """Return pydantic's complaint in a sentence, with the nearest key where one is unknown."""
    from rapidfuzz import process

    first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union: what came furthest
    path = [str(part) for part in first["loc"]]
    inner = path[3:4] if len(path) > 3 and path[2].startswith("dict[") else []
    key = ".".join(path[:2] + inner)  # what else follows names a variant of a union
    if first["type"] != "unexpected_keyword_argument":
        shown = first["input"] if not isinstance(first["input"], dict) else "a table"
        reason = first["msg"].partition(" or an instance of ")[0]  # of a class that users do not know
        return UsageError(
            f"{key} = {shown!r}: {reason}", where=where, hint="`qwenq recipe settings` lists what each takes"
        )
    known = [field.name for field in dataclasses.fields(SECTIONS[path[0]] if len(path) > 1 else Recipe)]
    near = process.extractOne(path[-1], known)
    hint = f"did you mean {near[0]!r}?" if near and near[1] >= 60 else f"known keys: {', '.join(known)}"
    return UsageError(f"unknown key {key!r}", where=where, hint=hint)
