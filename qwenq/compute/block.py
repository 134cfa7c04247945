"""Compute what lies between a block's products: RMSNorm, rotary positions, the gated activation.

torch takes several passes over memory for each, the C kernels (``csrc/block.c``) take one. Activations are
bfloat16 or float32. The kernels compute in float32 and round what the blocks of transformers round, so that
results differ by the last bit of a sum or a power.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from qwenq.compute import cpu
from qwenq.compute.cpu import DTYPE_CODES

STEP = 16  # the C kernels take widths that are a multiple of this


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, widths: Mapping[str, int] = MappingProxyType({})
) -> str | None:
    """Return why the C kernels do not run, in words that follow "because"; None: they do.

    ``widths`` are last axes, by what they are the width of.
    """
    if device.type == "cpu" and dtype in DTYPE_CODES:
        for name, width in widths.items():
            if not width or width % STEP:
                return f"the width of {name}, {width}, is not a multiple of {STEP}"
    return cpu.unsupported_input(device, dtype)


def fallback_notice(
    what: str, device: torch.device, dtype: torch.dtype, widths: Mapping[str, int] = MappingProxyType({})
) -> str | None:
    """Return a notice that ``what`` runs slower, in torch; None: C kernels run, or there are none.

    On a GPU and in float16 torch is the only implementation.
    """
    if device.type != "cpu" or dtype not in DTYPE_CODES:
        return None
    reason = unsupported_reason(device, dtype, widths)
    return f"{what} run in torch, which takes longer, because {reason}" if reason else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``weight · x / √(mean x² + eps)``, normalised in float32 over the last axis.

    Args:
        x: […, d].
        weight: [d], or [heads, d] for x of […, heads, d]; in the dtype of x, or in float32: then nothing but
            the result is rounded.
    """
    _require_alike(wider="weight", x=x, weight=weight)
    d = x.shape[-1]
    if weight.shape not in (x.shape[-1:], x.shape[-2:]):
        raise ValueError(f"a weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if _unsupported(x, d):
        if weight.dtype is not x.dtype:
            return (functional.rms_norm(x.float(), (d,), None, eps) * weight).to(x.dtype)
        if weight.ndim == 1:
            return functional.rms_norm(x, (d,), weight, eps)
        return functional.rms_norm(x, (d,), None, eps) * weight
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    codes, rows = (DTYPE_CODES[x.dtype], DTYPE_CODES[weight.dtype]), x.numel() // d
    cpu.call("rms_norm", *codes, x, weight, out, rows, d, weight.numel() // d, float(eps))
    return out


def swiglu(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) · up``, [..., d] each, of any strides: they may be halves of a product's result.

    ``out`` takes the result, contiguous; it may be ``gate``.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    _require_alike(gate=gate, up=up, out=out)
    if not gate.shape == up.shape == out.shape or not out.is_contiguous():
        shapes = (list(x.shape) for x in (gate, up, out))
        raise ValueError("gate is {}, so up {} and a contiguous out {} do not fit".format(*shapes))
    d = gate.shape[-1]
    if _unsupported(gate, d):
        return torch.mul(functional.silu(gate), up, out=out)
    gates, ups = (_rows(x) for x in (gate, up))
    sizes = len(gates), d, gates.stride(0), ups.stride(0)
    cpu.call("swiglu", DTYPE_CODES[gate.dtype], gates, ups, out, *sizes)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads rotated by their positions; ``x`` may be overwritten.

    Pairs are halves of a head, (x[i], x[i + d/2]). The arithmetic is in the dtype of the tables.

    Args:
        x: [batch, tokens, heads, d].
        cos: [batch or 1, tokens, 1, d], in the dtype of x or in float32.
        sin: likewise; its first half is negated: the sign of the rotation lies in the table.
    """
    _check_rotation(x, cos, sin)
    batch, tokens, heads, d = x.shape
    if _unsupported(x, d):
        swapped = x.roll(d // 2, dims=-1)  # (a, b) → (b, a)
        return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
    x = x if _heads_side_by_side(x) else x.contiguous()
    tables = [table.expand(batch, -1, -1, -1) for table in (cos, sin)]
    tables = [table if table.stride(-1) == 1 else table.contiguous() for table in tables]
    strides = (stride for tensor in (x, *tables) for stride in tensor.stride()[:2])
    codes = DTYPE_CODES[x.dtype], DTYPE_CODES[cos.dtype]
    cpu.call("rotate", *codes, x, *tables, batch, tokens, heads, d, *strides)
    return x


def _unsupported(x: Tensor, width: int) -> bool:
    return not x.numel() or unsupported_reason(x.device, x.dtype, {"rows": width}) is not None


def _rows(x: Tensor) -> Tensor:
    """Return […, d] as [rows, d] of any stride between rows, copied only where that takes it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _require_alike(wider: str = "", **tensors: Tensor) -> None:
    """Refuse tensors that differ from the first; the one of the name ``wider`` may be float32."""
    first_name, first = next(iter(tensors.items()))
    if not first.ndim:
        raise ValueError(f"{first_name} is a number, not a tensor of rows")
    for name, x in tensors.items():
        alike = x.dtype is first.dtype or (name == wider and x.dtype is torch.float32)
        if not alike or x.device != first.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, {first_name} is {first.dtype} on {first.device}"
            )


def _check_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or not x.shape[-1] or x.shape[-1] % 2:
        raise ValueError(f"x is {list(x.shape)}, not [batch, tokens, heads, d] with an even d")
    batch, tokens, _, d = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape not in ((batch, tokens, 1, d), (1, tokens, 1, d)):
            raise ValueError(f"x is {list(x.shape)}, so {name} {list(table.shape)} does not fit")
        if (
            table.dtype not in (x.dtype, torch.float32)
            or table.dtype != cos.dtype
            or table.device != x.device
        ):
            raise ValueError(f"{name} is {table.dtype} on {table.device}, x is {x.dtype} on {x.device}")


def _heads_side_by_side(x: Tensor) -> bool:
    """Return whether a token's heads are one stretch of memory, which no other token shares."""
    batch, tokens, heads, d = x.shape
    apart = all(count == 1 or x.stride(axis) >= heads * d for axis, count in ((0, batch), (1, tokens)))
    return x.stride(3) == 1 and (heads == 1 or x.stride(2) == d) and apart
