"""Quantise weights with GPTQ: the algorithm on tensors, and the pipeline that streams blocks through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenq.gptq.tensor import QuantizedWeight, quantize_weight

__all__ = ["QuantizedWeight", "quantize_weight"]


def __getattr__(name: str) -> Any:  # lazy: importing a file of this room loads no more than that file
    if name not in __all__:
        raise AttributeError(f"module 'qwenq.gptq' has no attribute {name!r}")
    from qwenq.gptq import tensor

    return getattr(tensor, name)
