"""Which unquantised model a quantised one stands beside: one rule, for evaluations and for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

PLAIN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precisions of unquantised models, the preferred first, and the dtype that each is computed in."""

T = TypeVar("T")


def choose_base(measured: Mapping[str, T], dtype: object) -> T | None:
    """Of what was measured at one point, that of the base; None where no unquantised model was measured.

    The base is computed in the dtype that the quantised model was, where that was measured: rounding
    activations costs something of its own, which quantising did not cause. Else it is the first of `PLAIN`.

    Args:
        measured: anything, by precision; other precisions than those of `PLAIN` are passed over.
        dtype: what the quantised model was computed in, ``settings["dtype"]`` of its row; None: unknown.
    """
    alike = [precision for precision, name in PLAIN.items() if name == dtype]
    return next((measured[precision] for precision in (*alike, *PLAIN) if precision in measured), None)
