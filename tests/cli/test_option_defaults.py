"""Help, recipe and docs/recipes.md give one default for each option."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from qwenq.calibration.load import DEFAULT_HELD_OUT, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN
from qwenq.cli import commands
from qwenq.cli.app import app
from qwenq.cli.options import recipe_defaults
from qwenq.recipe import EvalRecipe

RECIPES = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
FLAGS = {"sym": "sym", "refine": "refine"}  # what a true one is called on the command line


def help_of(command: str) -> str:
    """The whole help, without the line breaks that its width makes."""
    commands.register()
    ran = CliRunner().invoke(app, [command, "--help"])
    assert ran.exit_code == 0
    return " ".join(ran.output.split())


def parameters(command: str) -> dict[str | None, Any]:
    commands.register()
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    return {param.name: param for param in group.commands[command].params}


def test_quantize_shows_the_recipes_defaults() -> None:
    shown = help_of("quantize")
    options = parameters("quantize")
    assert set(recipe_defaults()) - set(options) == {"drift"}  # of the recipe alone
    for name in set(recipe_defaults()) & set(options):
        value = recipe_defaults()[name]
        text = FLAGS[name] if value is True else str(value)
        told = " ".join(options[name].help.split())
        assert f"{told} [default: {text}]" in shown
        assert options[name].default is None  # or it would win over a recipe file


@pytest.mark.parametrize("name", sorted(set(recipe_defaults()) - {"calibration"}))
def test_docs_give_the_same(name: str) -> None:
    shown = json.dumps(recipe_defaults()[name])
    assert re.search(rf"^\| `{name}` \| `{re.escape(shown)}` \|", RECIPES, re.MULTILINE)


def test_calibrate_shows_its_own_sizes() -> None:
    options = parameters("calibrate")
    for name, value in (
        ("samples", DEFAULT_SAMPLES),
        ("seq_len", DEFAULT_SEQ_LEN),
        ("held_out", DEFAULT_HELD_OUT),
    ):
        assert options[name].help.endswith(f"Default: {value}.")
    assert f"{DEFAULT_SAMPLES} × {DEFAULT_SEQ_LEN} tokens by default" in RECIPES


def test_an_option_of_eval_with_a_default_of_its_own_has_the_recipes() -> None:
    options, keys = parameters("eval"), EvalRecipe().model_dump()
    own = {name: options[name].default for name in keys if name in options}
    own = {name: default for name, default in own.items() if default not in (None, (), [])}
    assert own
    assert own == {name: ",".join(k) if isinstance(k := keys[name], tuple) else k for name in own}
