"""Help, recipe and docs/recipes.md hold the same settings, for every option of every command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from qwenq import api
from qwenq.calibration.load import DEFAULT_HELD_OUT, DEFAULT_SAMPLES, DEFAULT_SEQ_LEN
from qwenq.cli import app as app_module
from qwenq.cli.app import app
from qwenq.cli.options import Given, recipe_options
from qwenq.errors import UsageError
from qwenq.recipe import SECTIONS, Recipe, settings

ALL = [each for section in ("", *SECTIONS) for each in settings(section).values()]
FROM_RECIPE = {
    "quantize": {each.name for each in settings("quantize").values()} | {"weights", "samples", "seq_len"},
    "eval": {each.name for each in settings("eval").values()},
    "profile": {each.name for each in settings("profile").values()} | {"weights"},
    "calibrate": {each.name for each in settings("calibration").values()} | {"weights", "seed"},
    "compare": {"fail_on"},
    "report": {"title"},
}
SECTION_OF = {"quantize": "quantize", "eval": "eval", "profile": "profile", "calibrate": "calibration"}


def parameters() -> Iterator[tuple[str, Any]]:
    """Yield (command, option) for every option of every command."""
    app_module.register()
    group: Any = get_command(app)
    for name, command in group.commands.items():
        for inner in getattr(command, "commands", {"": command}).values():
            yield from ((name, param) for param in inner.params if param.param_type_name == "option")


def options(command: str) -> dict[str, Any]:
    return {param.name: param for name, param in parameters() if name == command}


@pytest.mark.parametrize("command", FROM_RECIPE)
def test_an_option_has_the_help_and_default_of_its_setting(command: str) -> None:
    found = options(command)
    for name in FROM_RECIPE[command]:
        candidates = [each for each in ALL if each.name == name and found[name].help.startswith(each.help)]
        assert candidates, name
        assert found[name].default is None  # or it would win over a recipe file


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.key)
def test_the_default_in_the_help_is_the_recipes(each: Any) -> None:
    """As typed on the command line, it gives the recipe's default."""
    app = typer.Typer()
    seen: list[Given] = []

    @app.command()
    @recipe_options(each.key)
    def command(*, given: Given) -> None:
        seen.append(given)

    (param,) = [one for one in get_command(app).params if one.name == each.name]
    shown = re.search(r" \[default: (.*?)(; [^;]*x.*)?\]$", str(param.help))  # type: ignore[attr-defined]
    if shown is None:
        assert each.default is False
        return
    if each.shown:
        assert shown[1] == each.shown
        assert each.default in (None, ())
        return
    text = [f"--{shown[1]}"] if each.flags else [f"--{each.name.replace('_', '-')}", shown[1]]
    if each.name == "module_bits":
        assert shown[1] == each.default
        return
    ran = CliRunner().invoke(app, text)
    assert ran.exit_code == 0, ran.output
    given = {key: dict(values) for key, values in seen[0].items()}
    recipe = Recipe().override(given.pop(""), **given)
    owner = getattr(recipe, each.section) if each.section else recipe
    assert getattr(owner, each.name) == each.default


def test_no_option_gives_its_default_twice_or_in_words_that_nothing_holds() -> None:
    for command, param in parameters():
        text = param.help or ""
        assert "Default:" not in text, (command, param.name)
        if "[default:" in text:
            assert param.default is None, (command, param.name)
        assert text.endswith((".", "]")) or param.name == "device", (command, param.name, text)


def test_calibrate_shows_the_sizes_of_a_set() -> None:
    found = options("calibrate")
    for name, value in (
        ("samples", DEFAULT_SAMPLES),
        ("seq_len", DEFAULT_SEQ_LEN),
        ("held_out", DEFAULT_HELD_OUT),
    ):
        assert f"[default: {value};" in found[name].help
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"{DEFAULT_SAMPLES} × {DEFAULT_SEQ_LEN} tokens by default" in text


@pytest.mark.parametrize(
    ("command", "function"),
    [
        *((name, name) for name in ("calibrate", "check", "convert", "perplexity", "plan", "profile")),
        ("chat", "load"),
        ("eval", "evaluate"),
    ],
)
def test_a_function_has_the_defaults_of_its_command(command: str, function: str) -> None:
    found = options(command)
    shown = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)  # noqa: E731
    for name, parameter in inspect.signature(getattr(api, function)).parameters.items():
        if name in found and found[name].default is not None and parameter.default is not None:
            assert shown(parameter.default) == shown(found[name].default), name


def test_a_recipe_made_in_python_is_checked() -> None:
    from qwenq.recipe import QuantizeRecipe

    with pytest.raises(UsageError, match=r"quantize\.bits = 3"):
        Recipe(quantize=QuantizeRecipe(bits=3)).validated()  # type: ignore[arg-type]
