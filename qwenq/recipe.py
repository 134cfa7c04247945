"""Recipes: what to do to which model, as one TOML file. Every option of `qwenq quantize` is a field here.

The sections after it are for `qwenq run`, which evaluates, profiles, reports and gates what was quantised.

model = "Qwen/Qwen2.5-0.5B-Instruct"

[calibration]
source = "self"
samples = 128

[quantize]
bits = 4
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rapidfuzz import process

from qwenq.errors import UsageError

Count = Annotated[int, Field(ge=1, strict=True)]  # strict: true is no number
NotNegative = Annotated[int, Field(ge=0, strict=True)]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Thinking = Literal["auto", "on", "off"]
FAIL_ON = "accuracy:significant, kl:>0.05, speed:<0.95, memory:>1.05, size:>1.0"
"""What fails unless something else is asked (``reporting.gate`` has the rules)."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class CalibrationRecipe(_Section):
    """Which tokens the Hessians are measured on."""

    source: str = "self"
    samples: Count | Literal["auto"] = "auto"  # sequences; 48 on CPU, 128 on a GPU
    seq_len: Count | Literal["auto"] = "auto"  # tokens each; 256 on CPU, 2048 on a GPU
    held_out: Count = 8  # further sequences, for the check only
    split: str | None = None
    column: str | None = None
    thinking: Thinking = "auto"  # enable_thinking for conversations; auto: the chat template's own


class QuantizeRecipe(_Section):
    """GPTQ's settings."""

    bits: Literal[4, 8] = 4
    group_size: Literal["auto", 32, 64, 128, -1] = "auto"
    pad_ffn: Literal["none", "auto"] | Count = "none"  # channels of the MLP once it is widened with zeros
    module_bits: dict[str, Literal[4, 8, 16]] | Literal["auto"] = "auto"  # by pattern; 16: not quantised
    sym: bool = True
    act_order: Literal["static", "none"] = "static"
    scale_search: Literal["hessian", "mse", "none"] = "hessian"
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.1
    drift: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of inherited error that later layers make good
    refine: bool = True  # after GPTQ: descend on the same objective, integers and scales by turns
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: NotNegative = 0


class EvalRecipe(_Section):
    """Which benchmarks `qwenq run` asks, and how."""

    tasks: tuple[str, ...] = ("mmlu", "ceval", "gsm8k", "humaneval")
    protocol: Literal["card", "base", "lm-eval"] = "card"
    subjects: tuple[str, ...] = ()  # none: all
    limit: Count | dict[str, Count] | None = None  # items of each subject, or of a task without; or by task
    shots: NotNegative | None = None  # none: the protocol's own
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of quantised models
    data: str | None = None  # folder of the benchmarks' files; none: the hub
    thinking: Thinking = "auto"  # whether models think before they answer; auto: off where they can choose
    max_new_tokens: Count | dict[str, Count] | None = None  # of a written answer; none: the protocol's
    sample: bool = False  # the suite that ships with qwenq, which is not the benchmark


class ProfileRecipe(_Section):
    """Which points `qwenq run` measures speed and memory at."""

    tokens: tuple[Count, ...] = (2048, 8192)
    encode: tuple[Count, ...] = (2048,)  # lengths of prompts whose encoding is measured
    attention: tuple[str, ...] = ()  # none: the command's own
    engine: tuple[str, ...] = ()
    budget: Annotated[str, Field(pattern=r"^(\d+(\.\d+)?[smh])+$")] | None = None  # 10m, 1h30m


class ReportRecipe(_Section):
    """What `qwenq run` calls its report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None  # none: the recipe's
    folder: str = "reports"
    title: str | None = None


class GateRecipe(_Section):
    """What the result is compared with, and what fails."""

    baseline: str | None = None  # a run folder; none: no gate
    fail_on: str | None = None  # as --fail-on; without it FAIL_ON, of the metrics that the baseline has


class Recipe(_Section):
    """A whole recipe. ``model`` None is the bundled model; `qwenq run` leaves out sections that are None."""

    model: str | None = None
    weights: Literal["stored", "random"] = "stored"  # random: model is a catalogue name
    precisions: tuple[Precision, ...] = ()  # of `qwenq run`; none: the unquantised model and quantize.bits
    calibration: CalibrationRecipe = CalibrationRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    eval: EvalRecipe | None = None
    profile: ProfileRecipe | None = None
    report: ReportRecipe = ReportRecipe()
    gate: GateRecipe = GateRecipe()

    def override(self, top: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
        """A copy in which the given keys (those that are not None) replace the recipe's.

        Args:
            top: keys outside any section.
            sections: keys by section.

        Raises:
            UsageError: a value out of its range.
        """
        merged = self.model_dump()
        merged.update({key: value for key, value in (top or {}).items() if value is not None})
        for name, values in sections.items():
            given = {key: value for key, value in values.items() if value is not None}
            merged[name] = {**merged[name], **given}
        return _validate(merged, "the command line")


SECTIONS: dict[str, type[_Section]] = {
    "calibration": CalibrationRecipe,
    "quantize": QuantizeRecipe,
    "eval": EvalRecipe,
    "profile": ProfileRecipe,
    "report": ReportRecipe,
    "gate": GateRecipe,
}
"""The tables of a recipe file."""

LARGEST = 1_000_000
"""Bytes of a recipe file."""


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
                hint="see recipes/ for examples",
            )
        content = tomllib.loads(text.decode("utf-8-sig"))  # editors of Windows begin a file with a mark
    except FileNotFoundError as error:
        raise UsageError("no such recipe", where=path, hint="see recipes/ for examples") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the recipe cannot be read: {error}", where=path, hint="a recipe is a TOML file in UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # TOML's own error; endless digits; endless nesting
        _refuse_other_language(text.decode("utf-8-sig"), path)
        raise UsageError(
            f"the recipe is not TOML: {error}", where=path, hint="repair that line; strings need quotes"
        ) from error
    return _validate(content, str(path))


_TOOLS = {
    "quant_stage": "llm-compressor",
    "quant_modifiers": "llm-compressor",
    "GPTQModifier": "llm-compressor",
    "quant_method": "a quantised model's quantize_config.json",
    "desc_act": "a quantised model's quantize_config.json",
}
"""Words in other tools' settings, and whose they are."""


def _refuse_other_language(text: str, path: Path) -> None:
    """Say what a file that is not TOML looks like, if it looks like JSON or YAML.

    Raises:
        UsageError: it is JSON, or like YAML.
    """
    language = "JSON" if _is_json(text) else "YAML" if _is_like_yaml(text) else None
    if language is None:
        return
    owner = next((whose for word, whose in _TOOLS.items() if re.search(rf"\b{word}\b", text)), None)
    raise UsageError(
        f"this looks like {language}{f', as of {owner}' if owner else ''}; a recipe of qwenq is a TOML file",
        where=path,
        hint="write the settings as in docs/recipes.md, such as [quantize] and bits = 4; see recipes/",
    )


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def _is_like_yaml(text: str) -> bool:
    """Return whether the first line with content is ``key:``, ``key: value``, ``- item`` or ``---``."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return re.match(r"(---|- |[\w.\"'-]+\s*:(\s|$))", first) is not None


def _validate(content: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> UsageError:
    """The first complaint of pydantic in a sentence, with the nearest key where one is unknown."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path[:2])  # what follows names a variant of a union
    if first["type"] != "extra_forbidden":
        shown = first["input"] if not isinstance(first["input"], dict) else "a table"
        return UsageError(f"{key} = {shown!r}: {first['msg']}", where=where, hint="see docs/recipes.md")
    known = list((SECTIONS[path[0]] if len(path) > 1 else Recipe).model_fields)
    near = process.extractOne(path[-1], known)
    hint = f"did you mean {near[0]!r}?" if near and near[1] >= 60 else f"known keys: {', '.join(known)}"
    return UsageError(f"unknown key {key!r}", where=where, hint=hint)
