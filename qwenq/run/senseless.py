"""Refuse at once what a later step of a recipe would refuse after hours."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from qwenq.errors import UsageError
from qwenq.recipe import Recipe

ATTENTIONS = ("auto", "v2", "v1", "off", "sdpa", "split", "grouped", "best")
ENGINES = ("fast", "transformers")
"""Names that `qwenq profile` knows. Where they are defined torch is loaded, and the steps of a run would
inherit its memory as a peak of their own."""


PACKAGES = {"pandas": "results.csv", "matplotlib": "plots", "jinja2": "the page"}
"""What a report needs, and for what."""


def require_packages(recipe: Recipe) -> None:
    """Require the packages that the last step needs before the first one begins.

    Raises:
        UsageError: names the one that is missing.
    """
    needed = PACKAGES if recipe.eval is not None or recipe.profile is not None else {}
    if recipe.eval is not None and recipe.eval.data is None and not recipe.eval.sample:
        needed = {**needed, "datasets": "benchmarks of the hub"}
    for package, use in needed.items():
        if find_spec(package) is None:
            raise UsageError(
                f"the package {package} is missing, which {use} need{'s' * (use[-1] != 's')}",
                where="the recipe",
                hint=f"pip install {package}",
            )


def validate_recipe(recipe: Recipe) -> None:
    """Refuse what contradicts itself.

    Raises:
        UsageError: says which key, and what it may be.
    """
    for what, hint in _contradictions(recipe):
        raise UsageError(what, where="the recipe", hint=hint)


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key, name in (("model", recipe.model), ("gate.baseline", recipe.gate.baseline)):
        if name is not None and name.startswith("-"):  # a step would take it for an option of its own
            yield f"{key} = {name!r} is an option, not a name", f"write ./{name}, if that is its folder"
    if recipe.eval is not None and recipe.weights == "random":
        yield "[eval] of random weights would measure chance", "leave [eval] out"
    if recipe.eval is not None and not recipe.eval.tasks:
        yield "eval.tasks is empty: there is nothing to evaluate", "name a task, or leave [eval] out"
    if recipe.eval is not None and isinstance(recipe.eval.limit, dict):
        for task in [name for name in recipe.eval.limit if name not in recipe.eval.tasks]:
            yield f"eval.limit: {task!r} is not asked for", f"eval.tasks are {', '.join(recipe.eval.tasks)}"
    if recipe.profile is not None:
        yield from _contradictory_points(recipe)


def _contradictory_points(recipe: Recipe) -> Iterator[tuple[str, str]]:
    from qwenq.profiling.planning import parse_budget

    wanted = recipe.profile
    assert wanted is not None  # noqa: S101 - the caller has looked
    if 1 in wanted.tokens:
        yield "profile.tokens = 1: a generation has 2 new tokens or more", "use encode for prompts alone"
    if not wanted.tokens and not wanted.encode:
        yield "profile.tokens and profile.encode are empty", "name a length, or leave [profile] out"
    for key, names, known in (
        ("attention", wanted.attention, ATTENTIONS),
        ("engine", wanted.engine, ENGINES),
    ):
        if wrong := [name for name in names if name not in known]:
            yield f"profile.{key}: there is no {wrong[0]!r}", f"use {', '.join(known)}"
    if wanted.budget is not None:
        try:
            parse_budget(wanted.budget)
        except UsageError as error:
            yield f"profile.budget: {error.what}", str(error.hint)
