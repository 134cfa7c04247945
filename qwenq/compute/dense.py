"""Multiply by a matrix that is not quantised, by the faster unit of the CPU.

Each way multiplies the same numbers, adds in float32 and rounds the sum to the dtype of the activations once;
they differ in the order of the additions. Up to some dozen rows are multiplied in C, which reads the matrix
at the memory's speed; more by torch, or, of bfloat16, by a float32 copy where the CPU prefers float32: with
AVX2 alone (512 rows, 576 × 576 to 49,152 × 576, 2 threads), torch's product of bfloat16 took 3.9 to 5.2 times
as long as that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qwenq.compute import cpu, linear

# From so many rows on, a product in C is slower than torch's of bfloat16, than one of float32, or than one of
# a float32 copy of bfloat16, which takes as long as several dozen rows.
_MANY_ROWS, _MANY_ROWS_FLOAT32, _MANY_ROWS_WIDENED = 48, 32, 96

_OUTPUTS_AT_ONCE = 4096  # bounds the float32 copy


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, […, out], of […, in] and [out, in] of any strides.

    On a CPU, x may be float32 over bfloat16.
    """
    _check(x, weight, bias)
    if x.device.type != "cpu" or weight.dtype not in cpu.DTYPE_CODES:
        return functional.linear(x, weight, bias)
    rows, alike = x.shape[:-1].numel(), x.dtype is weight.dtype
    narrow = weight.dtype is torch.bfloat16
    widened = narrow and cpu.float32_is_faster()
    many = rows >= (_MANY_ROWS_WIDENED if widened else _MANY_ROWS if narrow else _MANY_ROWS_FLOAT32)
    if alike and rows and not many and (layer := linear.plain(weight)) is not None:
        return _few_rows(x, layer, bias)
    if not alike or (many and widened):
        return _by_float32(x, weight, bias)
    if many and not narrow and weight.is_contiguous() and _has_onednn():
        return _by_onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


def _has_onednn() -> bool:
    """Return whether oneDNN's product of float32 is faster than that of torch's library, MKL.

    It took 0.80 to 0.95 of its time (64 to 2048 rows, 576 × 576 to 49,152 × 576) with AVX-512.
    """
    return cpu.vectorises_512_bits() and torch.backends.mkldnn.is_available()


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _by_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide, offsets = x.float(), None if bias is None else bias.float()
    out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)
    for start in range(0, len(weight), _OUTPUTS_AT_ONCE):
        part = slice(start, start + _OUTPUTS_AT_ONCE)
        out[..., part] = functional.linear(
            wide, weight[part].float(), None if offsets is None else offsets[part]
        )
    return out


def _few_rows(x: Tensor, layer: linear.PackedWeights, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, layer.columns)
    if bias is None:
        return linear.multiply(rows, layer).view(*x.shape[:-1], layer.outputs)
    found = linear.multiply(rows, layer, torch.float32).add_(bias)
    return found.to(x.dtype).view(*x.shape[:-1], layer.outputs)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} do not fit")
    wider = x.device.type == "cpu" and (x.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    if x.device != weight.device or (x.dtype != weight.dtype and not wider):
        raise ValueError(f"x is {x.dtype} on {x.device}, weight is {weight.dtype} on {weight.device}")
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device
    ):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)} on {bias.device}, not [{len(weight)}] as x"
        )
