"""Quantise Qwen models with GPTQ, and measure what that cost and gained: the front door for Python.

    import qwenq

    result = qwenq.quantize("Qwen/Qwen2.5-0.5B-Instruct", bits=4)
    print(qwenq.load(result.folder).generate("The capital of France is"))

Importing qwenq loads nothing heavy: a name is looked up when it is used. docs/python.md has examples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwenq.environment import __version__

if TYPE_CHECKING:
    from qwenq import errors, events, gptq
    from qwenq.api import (
        LoadedModel,
        Results,
        calibrate,
        check,
        compare,
        convert,
        evaluate,
        load,
        perplexity,
        plan,
        profile,
        quantize,
        report,
    )
    from qwenq.publishing.push import push
    from qwenq.recipe import Recipe, read_recipe

__all__ = [
    "LoadedModel",
    "Recipe",
    "Results",
    "__version__",
    "calibrate",
    "check",
    "compare",
    "convert",
    "errors",
    "evaluate",
    "events",
    "gptq",
    "load",
    "perplexity",
    "plan",
    "profile",
    "push",
    "quantize",
    "read_recipe",
    "report",
]

_MODULES = ("errors", "events", "gptq")
_ELSEWHERE = {"Recipe": "qwenq.recipe", "read_recipe": "qwenq.recipe", "push": "qwenq.publishing.push"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"qwenq.{name}")
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "qwenq.api")), name)
    raise AttributeError(f"module 'qwenq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
