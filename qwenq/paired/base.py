"""Choose the unquantised model that a quantised one is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

PLAIN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precisions of unquantised models, the preferred first, and the dtype that each is computed in."""

T = TypeVar("T")


def choose_base(measured: Mapping[str, T], dtype: object) -> T | None:
    """Return what was measured of the base; None where no unquantised model was measured.

    The base in the dtype of the quantised model comes first, as rounding activations has a cost that is not
    the quantisation's; then the order of `PLAIN`.

    Args:
        measured: values by precision; precisions that are not in `PLAIN` are ignored.
        dtype: of the quantised model's computation, ``settings["dtype"]`` of its row; None: unknown.
    """
    alike = [precision for precision, name in PLAIN.items() if name == dtype]
    return next((measured[precision] for precision in (*alike, *PLAIN) if precision in measured), None)
