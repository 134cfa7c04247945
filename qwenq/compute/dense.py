"""Multiply by a matrix that is not quantised, by the faster unit of the CPU.

Each way multiplies the same numbers, adds in float32 and rounds the sum to the dtype of the activations once;
they differ in the order of the additions. Up to some dozen rows of bfloat16 are multiplied in C, which reads
the matrix at the memory's speed; more by torch, or by a float32 copy where the CPU prefers float32: with AVX2
alone (512 rows, 576 × 576 to 49,152 × 576, 2 threads), torch's product of bfloat16 took 3.9 to 5.2 times as
long as that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qwenq.compute import cpu, linear

_MANY_ROWS, _MANY_ROWS_FLOAT32 = 48, 32
"""From so many rows on, torch's product of bfloat16, or of a float32 copy, is faster than the one in C."""

_OUTPUTS_AT_ONCE = 4096  # bounds the float32 copy
_PACKED_FOR = 32  # rows that oneDNN packs for; the layout is the same from 2 to 512 rows, another for one


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, […, out], of […, in] and [out, in] of any strides.

    On a CPU, x may be float32 over bfloat16.
    """
    _check(x, weight, bias)
    if x.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return functional.linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    if rows >= _MANY_ROWS_FLOAT32 and cpu.float32_is_faster():
        return _by_float32(x, weight, bias)
    if 0 < rows < _MANY_ROWS and x.dtype is weight.dtype and (layer := linear.plain(weight)) is not None:
        return _few_rows(x, layer, bias)
    return functional.linear(x, weight, bias) if x.dtype is weight.dtype else _by_float32(x, weight, bias)


def packable(weight: Tensor) -> bool:
    """Return whether products are faster with the matrix in oneDNN's blocks from the start.

    Libraries copy a float32 matrix into blocks as they multiply, which takes longer than the products with up
    to a few dozen rows. Measured with AVX-512, where oneDNN has kernels for it.
    """
    here = weight.device.type == "cpu" and weight.dtype is torch.float32 and cpu.vectorises_512_bits()
    return here and torch.backends.mkldnn.is_available()


def pack(weight: Tensor) -> Tensor:
    """Return a ``packable`` [out, in] in oneDNN's blocks; ``to_dense`` brings it back."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` of a weight that was packed; a row's result depends on no other row."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
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
