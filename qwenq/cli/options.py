"""Options of the command line: those that several commands share, and those that are settings of a recipe."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qwenq.cli import completion
from qwenq.errors import UsageError
from qwenq.recipe import Setting, settings

DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
DtypeName = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="dtype of the computation; auto: what the device multiplies natively."),
]
EngineName = Annotated[
    Literal["fast", "transformers"], typer.Option(help="fast: qwenq's own decoder; or transformers.")
]
AttentionName = Annotated[
    str,
    typer.Option(help="Attention backend that `qwenq doctor` lists; auto: grouped on a CPU, else sdpa."),
]
KernelName = Annotated[
    str, typer.Option(help="Kernel of quantised layers: auto, or one that `qwenq doctor` lists.")
]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL]")]
RowsAsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]
ThinkingChoice = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Let the model think before it answers (enable_thinking of its chat template)."),
]


def _refuse_random(weights: str) -> str:
    if weights == "random":
        raise UsageError(
            "random weights have no tokenizer and write no text, and accuracy would mean nothing",
            where="--weights",
            hint="name a model with real weights; `qwenq profile` and `qwenq plan` take random ones",
        )
    return weights


RealWeights = Annotated[
    Literal["stored", "random"],
    typer.Option(
        "--weights",
        callback=_refuse_random,
        help="random is refused here: random weights have no accuracy.",
    ),
]
"""Of commands that need to know no more of it: it is there to be refused with a reason."""
RandomSeed = Annotated[int, typer.Option(min=0, help="Seed of random weights.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also show versions, the time of each step, each module's error."),
]

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Model folder or hub id, e.g. Qwen/Qwen2.5-0.5B-Instruct. [default: the bundled model]",
        autocompletion=completion.models,
    ),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL...",
        autocompletion=completion.models,
        help="Model folders or hub ids; bundled: the bundled model. [default: bundled]",
    ),
]

Given = dict[str, dict[str, Any]]
"""Settings that were given on the command line: values by section ("": outside any) and name."""


def recipe_options(
    *keys: str, defaults: dict[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each of these settings of a recipe, in place of its parameter ``given``.

    Type, default, bounds and help are the recipe's; the command gets the values that were typed.

    Args:
        keys: such as ``quantize.bits``; ``quantize.*`` for a whole section; ``--text=calibration.source`` for
            an option with another name.
        defaults: by key: what the command takes where the option is not given, if not the recipe's default.
    """
    chosen: dict[str, Setting] = {}
    for text in keys:
        option, _, key = text.rpartition("=")
        section, _, name = key.rpartition(".")
        for each in settings(section).values() if name == "*" else [settings(section)[name]]:
            chosen[option.removeprefix("--") or each.name] = each

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def command(**arguments: Any) -> None:
            given: Given = {"": {}, **{each.section: {} for each in chosen.values()}}
            for name, each in chosen.items():
                value = arguments.pop(name)
                if value is not None and value != []:
                    given[each.section][each.name] = _value(each, value, f"--{name.replace('_', '-')}")
            function(**arguments, given=given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name != "given":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for name, each in chosen.items():
                hint = _option(each, (defaults or {}).get(each.key))
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(name, kind, default=None, annotation=hint))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": None}
        return command

    return decorate


def typed_options(context: typer.Context) -> list[str]:
    """Return the names of the options that were typed, be it with their default."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    # Compared by its name: typer uses either its bundled click or the installed one.
    return [name for name, source in sources if source is not None and source.name == "COMMANDLINE"]


def server_decides(option: str) -> UsageError:
    """Return the error of an option that would decide how a served model runs."""
    return UsageError(
        "the server decides how it runs its model",
        where=f"--{option}",
        hint="leave this option out, and set it on the server",
    )


def default_shown(setting: Setting, default: str | None = None) -> str:
    """Return a setting's default as the help shows it: as it would be typed."""
    if default is not None or setting.shown:
        return default or setting.shown
    if isinstance(setting.default, bool):
        return setting.flags.split("/")[not setting.default].removeprefix("--")
    if isinstance(setting.default, tuple):
        return ",".join(map(str, setting.default))
    return str(setting.default)


def _option(setting: Setting, default: str | None) -> Any:
    """Return the annotation that typer makes an option of; None where it is not given."""
    if setting.flags:
        off = "/" not in setting.flags  # a switch that is off by default has no default to show
        help = setting.help if off else f"{setting.help} [default: {default_shown(setting)}]"
        return Annotated[bool | None, typer.Option(setting.flags, help=help, show_default=False)]
    listed = tuple in setting.kinds  # of these, 0 stands for none, whatever an entry has to be
    limits = f"; {setting.limits}" if setting.limits and not listed else ""
    help = f"{setting.help} [default: {default_shown(setting, default)}{limits}]"
    if setting.name == "module_bits":
        return Annotated[list[str] | None, typer.Option(metavar="PATTERN=BITS", help=help)]
    names = {int: "int", float: "float", str: "str", tuple: "a,b,…", dict: "task=int,…"}
    parts = [names.get(kind, str(kind)) for kind in setting.kinds if kind is not type(None)]
    return Annotated[str | None, typer.Option(metavar=f"<{'|'.join(parts)}>", help=help)]


def _value(setting: Setting, text: str | bool | list[str], option: str) -> Any:
    """Return what was typed as a recipe would hold it; whether it is in range, the recipe checks."""
    if isinstance(text, bool):
        return text
    if isinstance(text, list):
        return by_name(text, option, "linear_attn=8")
    text = text.strip()
    if tuple in setting.kinds:
        listed = listed_names(text, option)
        return () if listed == ["0"] else [_number(part) for part in listed]
    if dict in setting.kinds and "=" in text:
        return by_name(listed_names(text, option), option, "mmlu=20,gsm8k=150")
    if str in setting.kinds or text in setting.kinds:
        return text
    return _number(text)


def by_name(entries: list[str], option: str, example: str) -> dict[str, Any]:
    """Read ``NAME=NUMBER`` entries."""
    found: dict[str, Any] = {}
    for entry in entries:
        name, _, number = (part.strip() for part in entry.rpartition("="))
        if not name:
            raise UsageError(f"{entry!r} is not NAME=NUMBER", where=option, hint=f"such as {example}")
        if name in found:
            raise UsageError(f"{name} is given twice", where=option, hint="give each name one number")
        found[name] = _number(number)
    return found


def listed_names(text: str, option: str) -> list[str]:
    """Return comma-separated names, each once, in their order."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UsageError("no name given", where=option)
    return names


def listed_numbers(text: str, option: str, example: str = "1,2,4") -> list[int]:
    """Return comma-separated whole numbers, each once, in their order."""
    found = [_number(name) for name in listed_names(text, option)]
    numbers = [number for number in found if isinstance(number, int)]
    if len(numbers) < len(found):
        raise UsageError(f"{text!r} is not a list of whole numbers", where=option, hint=f"such as {example}")
    return numbers


def _number(text: str) -> int | float | str:
    """Return a number where the text is one, whole if it can be; else the text, which the recipe refuses."""
    if re.fullmatch(r"-?[0-9]{1,4000}", text):
        return int(text)
    try:
        return float(text) if text.isascii() and "_" not in text else text
    except ValueError:
        return text
