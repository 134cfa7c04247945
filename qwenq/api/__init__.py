"""Offer what the commands do as functions: ``import qwenq`` re-exports what is public here.

The functions have the defaults, the checks and the errors (``qwenq.errors``) of the command line.
``progress`` is True (a bar in a terminal or a notebook, plain lines elsewhere, notices), False, or a function
that receives the events of ``qwenq.events``. Nothing heavy is imported before a function is called.
"""

from qwenq.api.measurements import Results, check, compare, evaluate, perplexity, profile, report
from qwenq.api.models import LoadedModel, calibrate, chosen_recipe, convert, load, plan, quantize

__all__ = [
    "LoadedModel",
    "Results",
    "calibrate",
    "check",
    "chosen_recipe",
    "compare",
    "convert",
    "evaluate",
    "load",
    "perplexity",
    "plan",
    "profile",
    "quantize",
    "report",
]
