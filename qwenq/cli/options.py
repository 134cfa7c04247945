"""Options that several commands have: one type and one line of help each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperOption

DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
DtypeName = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="To compute in.")]
EngineName = Annotated[
    Literal["fast", "transformers"], typer.Option(help="The lean decoder, or transformers.")
]
AttentionName = Annotated[
    str, typer.Option(help="One that `doctor` lists; auto: grouped on a CPU, else sdpa.")
]
KernelName = Annotated[str, typer.Option(help="Of quantised weights: auto, or one that `doctor` lists.")]
ThinkingWish = Annotated[
    Literal["auto", "on", "off"],
    typer.Option(help="Whether the model thinks before it answers (enable_thinking of its chat template)."),
]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder. [default: runs/MODEL]")]
RowsAsJson = Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")]
RealWeights = Annotated[
    Literal["stored", "random"], typer.Option("--weights", help="random is refused: it has no accuracy.")
]
SeedOfWeights = Annotated[int, typer.Option(min=0, help="Of random weights.")]


class RecipeCommand(TyperCommand):
    """A command whose options override a recipe, whose defaults its help shows."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, each option with the default of the recipe's key of that name."""
        defaults = recipe_defaults()
        for param in self.params:
            if isinstance(param, TyperOption) and param.name in defaults:
                shown = _shown(defaults[param.name], param)
                param.help = f"{(param.help or '').partition(' [default: ')[0]} [default: {shown}]"
        super().format_help(ctx, formatter)


def recipe_defaults() -> dict[str, Any]:
    """Return the defaults of a recipe by the names of `qwenq quantize`'s options."""
    from qwenq.recipe import CalibrationRecipe, QuantizeRecipe, Recipe

    sizes = CalibrationRecipe().model_dump(include={"samples", "seq_len"})
    return {
        "weights": Recipe().weights,
        "calibration": CalibrationRecipe().source,
        **sizes,
        **QuantizeRecipe().model_dump(),
    }


def _shown(value: Any, option: TyperOption) -> str:
    """Return a default as it would be typed: of a flag, which of its two names."""
    if isinstance(value, bool):
        return (option.opts if value else option.secondary_opts)[0].removeprefix("--")
    return str(value)
