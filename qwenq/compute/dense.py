"""Multiply by a matrix that is not quantised, by the faster unit of the CPU.

Each way multiplies the same numbers, adds in float32 and rounds the sum to the dtype of the activations once;
they differ in the order of the additions. Measured with AVX2 alone (576 × 576 to 49,152 × 576, 2 threads),
torch's time for bfloat16 over that of the way that is taken: 4 rows 1.2 to 2.0, 16 rows 1.9 to 2.7,
32 rows 2.3 to 3.0, 512 rows 3.9 to 5.2. One row is torch's: its product is as fast as ours, and 1.7 times as
fast with the largest matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from qwenq.compute import cpu
from qwenq.compute.block import DTYPE_CODES

_MANY_ROWS, _MANY_ROWS_PACKED = 32, 384
"""From so many rows on, a float32 copy of the weights is multiplied faster where the CPU prefers float32."""

_OUTPUTS_AT_ONCE = 4096  # bounds the float32 copy
_PACKED_FOR = 32
"""Rows that oneDNN packs for; the layout is the same from 2 to 512 rows, another for one."""


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``, […, out].

    Args:
        x: […, in].
        weight: [out, in], of any strides.
        bias: [out] or None.

    Raises:
        ValueError: the shapes, dtypes or devices do not fit. On a CPU, x may be float32 over bfloat16.
    """
    _check(x, weight, bias)
    if x.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    if rows >= _MANY_ROWS and cpu.float32_is_faster():
        return _by_float32(x, weight, bias)
    few = rows > 1 and not cpu.multiplies_bfloat16()
    if (few or x.dtype is torch.float32) and unsupported_reason(weight) is None and x.numel():
        return _few_rows(x, weight, bias)
    return linear(x, weight, bias) if x.dtype is weight.dtype else _by_float32(x, weight, bias)


def unsupported_reason(weight: Tensor) -> str | None:
    """Return why the C kernel does not multiply a few rows with a bfloat16 matrix; None: it can."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or weight.stride(-1) != 1:
        return "the C kernel is for rows of bfloat16 on the CPU"
    return cpu.unsupported_reason()


def packable(weight: Tensor) -> bool:
    """Return whether products are faster with the matrix in oneDNN's blocks from the start.

    Libraries copy a matrix into blocks as they multiply; with up to a few dozen rows that takes longer than
    the products. Measured with AVX-512, where oneDNN has kernels for float32 and for bfloat16
    instructions; where bfloat16 is emulated, packing gains nothing over ``multiply``.
    """
    native = weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and cpu.multiplies_bfloat16())
    here = weight.device.type == "cpu" and native and cpu.vectorises_512_bits()
    return here and torch.backends.mkldnn.is_available()


def pack(weight: Tensor) -> Tensor:
    """Return a ``packable`` [out, in] in oneDNN's blocks; ``to_dense`` brings it back."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` of a weight that was packed.

    The result of a row does not depend on how many others there are, but for many rows where float32 is
    faster.
    """
    if x.dtype is torch.bfloat16 and x.shape[:-1].numel() >= _MANY_ROWS_PACKED and cpu.float32_is_faster():
        return _by_float32(x, packed.to_dense(), bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return found


def _by_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide, offsets = x.float(), None if bias is None else bias.float()
    if len(weight) <= _OUTPUTS_AT_ONCE:
        return linear(wide, weight.float(), offsets).to(x.dtype)
    out = torch.empty(*x.shape[:-1], len(weight), dtype=x.dtype)
    for start in range(0, len(weight), _OUTPUTS_AT_ONCE):
        part = slice(start, start + _OUTPUTS_AT_ONCE)
        out[..., part] = linear(wide, weight[part].float(), None if offsets is None else offsets[part])
    return out


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outs, width = weight.shape
    rows = x.reshape(-1, width).float().contiguous()
    out = torch.empty(len(rows), outs, dtype=x.dtype)
    offsets = 0 if bias is None else bias.float().contiguous()
    sizes = len(rows), width, outs, weight.stride(0)
    cpu.call("dense_bf16", DTYPE_CODES[x.dtype], rows, weight, offsets, out, *sizes)
    return out.view(*x.shape[:-1], outs)


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
