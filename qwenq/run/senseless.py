"""What a recipe can say, and a later step would refuse after hours: it is refused at once."""

from __future__ import annotations

from collections.abc import Iterator

from qwenq.errors import UsageError
from qwenq.recipe import Recipe

ATTENTIONS = ("auto", "v2", "v1", "off", "sdpa", "split", "grouped", "best")
ENGINES = ("fast", "transformers")
"""Names that `qwenq profile` knows. To look them up where they are defined would load torch, and the steps of
a run would inherit its memory as a peak of their own."""


def refuse_senseless(recipe: Recipe) -> None:
    """Raise for the first thing that has no meaning.

    Raises:
        UsageError: says which key, and what it may be.
    """
    for what, hint in _senseless(recipe):
        raise UsageError(what, where="the recipe", hint=hint)


def _senseless(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key, name in (("model", recipe.model), ("gate.baseline", recipe.gate.baseline)):
        if name is not None and name.startswith("-"):  # a step would take it for an option of its own
            yield f"{key} = {name!r} is an option, no name", f"write ./{name}, if that is its folder"
    if recipe.eval is not None and recipe.weights == "random":
        yield "[eval] of random weights would measure chance", "leave [eval] out"
    if recipe.eval is not None and not recipe.eval.tasks:
        yield "eval.tasks is empty: there is nothing to evaluate", "name a task, or leave [eval] out"
    if recipe.eval is not None and isinstance(recipe.eval.limit, dict):
        for task in [name for name in recipe.eval.limit if name not in recipe.eval.tasks]:
            yield f"eval.limit: {task!r} is not asked for", f"eval.tasks are {', '.join(recipe.eval.tasks)}"
    if recipe.profile is not None:
        yield from _senseless_points(recipe)


def _senseless_points(recipe: Recipe) -> Iterator[tuple[str, str]]:
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
