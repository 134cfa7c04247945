"""Quantise one weight given its Hessian: GPTQ for people with a model of their own.

H = 2 / n * X.T @ X                       # X: [n, in], the inputs of the layer
found = qwenq.gptq.quantize_weight(layer.weight, H, bits=4, group_size=128)
layer.weight.copy_(found.dequantized)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qwenq.errors import UsageError
from qwenq.gptq.choices import Settings
from qwenq.gptq.module import quantise_group


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid: ``dequantized = (integers − zeros) · scales``, by groups of input columns.

    Attributes:
        integers: [out, in] uint8 in 0 … 2^bits − 1.
        scales: [out, groups] float32, each exact in float16.
        zeros: [out, groups] float32 that hold integers.
        dequantized: [out, in] float32.
        error: tr((W − Q) H (W − Q)ᵀ) / tr(W H Wᵀ): the change of the outputs as a share of their energy.
        rtn_error: the same for rounding to nearest.
        damp: the share of the mean diagonal that was added to the Hessian.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    dequantized: Tensor
    error: float
    rtn_error: float
    damp: float


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: bool = True,
    scale_search: Literal["hessian", "mse", "none"] = "hessian",
    damp: float = 0.1,
    coordinate_descent: bool = True,
) -> QuantizedWeight:
    """Quantise a weight so that its outputs change least: min tr((W − Q) H (W − Q)ᵀ).

    The defaults are those of `qwenq quantize`. ``scale_search="none", damp=0.01, coordinate_descent=False``
    is GPTQ as in the paper. The arguments are not changed.

    Args:
        weight: [out, in], any floating dtype.
        hessian: [in, in], proportional to Xᵀ X over the layer's inputs X.
        bits: 2 … 8.
        group_size: input columns per scale, a divisor of ``in``; -1: all of them.
        sym: fix the zero point in the middle.
        act_order: round columns by falling diag(H), with groups fixed before (static groups).
        scale_search: how scales are chosen: by error weighted with diag(H), by plain error, or min/max.
        damp: share of the mean of diag(H) that is added to it; raised where Cholesky fails.
        coordinate_descent: after GPTQ, descend on the same objective over integers and scales.

    Raises:
        UsageError: shapes that do not fit, or bits out of range.
        QuantisationError: the Hessian is not finite, or the result is worse than rounding to nearest.
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2:
        shapes = f"weight {list(weight.shape)}, hessian {list(hessian.shape)}"
        raise UsageError(f"a weight [out, in] needs a Hessian [in, in]: {shapes}")
    if not 2 <= bits <= 8:
        raise UsageError(f"bits={bits}", hint="use 2 … 8; files hold 4 and 8")
    if group_size != -1 and (group_size < 1 or weight.shape[1] % group_size):
        raise UsageError(
            f"group_size={group_size} does not divide {weight.shape[1]} columns", hint="or use -1"
        )
    settings = Settings(bits, group_size, sym, act_order, scale_search, damp, 0.0, coordinate_descent)
    W, H = weight.detach().float().clone(), hessian.detach().float().clone()
    found = quantise_group({"weight": W}, H, None, settings)["weight"]
    return QuantizedWeight(
        integers=found.integers,
        scales=found.grid.scales,
        zeros=found.grid.zeros,
        dequantized=found.grid.values(found.integers),
        error=found.stats.error,
        rtn_error=found.stats.rtn_error,
        damp=found.stats.damp,
    )
