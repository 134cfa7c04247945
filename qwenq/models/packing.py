"""Pack and unpack one quantised linear in the AutoGPTQ layout.

Tensors in, tensors out; no files. A weight ``[out, in]`` is stored transposed. Each int32 of ``qweight``
holds 32/bits consecutive *input* rows of one output column, each int32 of ``qzeros`` 32/bits consecutive
*output* columns of one group, the first in the lowest bits::

    weight[o, i] = scales[g_idx[i], o] * (integer[o, i] - zero[g_idx[i], o])

Two formats differ in the zero points alone: ``gptq`` (v1) stores ``zero - 1``, ``gptq_v2`` stores ``zero``.

Bits are moved as bytes: on a little-endian machine (all that torch is built for, and the byte order of
safetensors) four consecutive uint8 *are* the int32, so nothing is ever wider than the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qwenq.errors import QuantisationError

CheckpointFormat = Literal["gptq", "gptq_v2"]
PACKABLE_BITS = (2, 4, 8)

_ROWS_AT_ONCE = 256  # output rows dequantised in one go: bounds the float32 temporary


@dataclass(frozen=True)
class PackedLinear:
    """One quantised linear as it lies in a file.

    Attributes:
        qweight: int32 ``[in * bits / 32, out]``.
        qzeros: int32 ``[groups, out * bits / 32]``.
        scales: float16 ``[groups, out]`` (third-party files: any float).
        g_idx: int32 ``[in]``, the group of each input column.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def out_features(self) -> int:
        """Return rows of the weight."""
        return self.qweight.shape[1]

    @property
    def in_features(self) -> int:
        """Return columns of the weight."""
        return self.g_idx.shape[0]

    @property
    def groups(self) -> int:
        """Return groups along the input axis."""
        return self.scales.shape[0]

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return the four tensors under their names in a checkpoint, for the module of that name."""
        return {
            f"{module}.qweight": self.qweight,
            f"{module}.qzeros": self.qzeros,
            f"{module}.scales": self.scales,
            f"{module}.g_idx": self.g_idx,
        }


def trivial_g_idx(in_features: int, group_size: int) -> Tensor:
    """Return int32 ``[in]``: column i belongs to group i // group_size (-1: all columns to group 0)."""
    if group_size == -1:
        return torch.zeros(in_features, dtype=torch.int32)
    return torch.arange(in_features, dtype=torch.int32) // group_size


def pack(
    integers: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    checkpoint_format: CheckpointFormat = "gptq",
) -> PackedLinear:
    """Pack a quantised weight whose groups are consecutive, equally long runs of columns.

    Args:
        integers: uint8 ``[out, in]``, each below ``2**bits``.
        scales: ``[out, groups]``, any float dtype; stored as float16.
        zeros: uint8 ``[out, groups]``, each below ``2**bits`` and, in format v1, at least 1.
        bits: 2, 4 or 8.
        checkpoint_format: how zero points are stored.

    Raises:
        QuantisationError: a scale does not fit float16, or a zero point is 0 in format v1. There 0 would be
            stored as ``2**bits - 1``, which some readers add one to without masking.
        ValueError: shapes, dtypes or values that no packed layout holds.
    """
    _check_unpacked(integers, scales, zeros, bits)
    half_scales = scales.t().to(torch.float16).contiguous()  # [groups, out]
    if not torch.isfinite(half_scales).all():
        raise QuantisationError(
            "a scale is not finite in float16, the dtype in which scales are stored",
            hint="look for weights that are not finite or beyond 65504",
        )
    in_features, groups = integers.shape[1], scales.shape[1]
    return PackedLinear(
        qweight=_to_int32(integers, bits).t().contiguous(),  # [in * bits / 32, out]
        qzeros=pack_zeros(zeros, bits, checkpoint_format),
        scales=half_scales,
        g_idx=trivial_g_idx(in_features, in_features // groups).to(integers.device),
    )


def unpack(
    packed: PackedLinear, bits: int, checkpoint_format: CheckpointFormat = "gptq"
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert ``pack``; columns stay in file order, whatever ``g_idx`` is.

    Returns:
        integers uint8 ``[out, in]``, scales ``[out, groups]`` in their stored dtype, zeros uint8
        ``[out, groups]``.
    """
    integers = _from_int32(packed.qweight.t(), bits)  # [out, in]
    return integers, packed.scales.t(), unpack_zeros(packed.qzeros, bits, checkpoint_format)


def dequantise(
    packed: PackedLinear,
    bits: int,
    checkpoint_format: CheckpointFormat = "gptq",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight ``[out, in]`` that the integers stand for, whatever ``g_idx`` is.

    Computed in float32, where a float16 scale times an 8-bit integer is exact, and rounded once to ``dtype``.
    """
    scales = packed.scales.t().to(torch.float32)  # [out, groups]
    zeros = unpack_zeros(packed.qzeros, bits, checkpoint_format).to(torch.float32)
    weight = torch.empty(packed.out_features, packed.in_features, dtype=dtype)
    run = _run_length(packed)
    columns = packed.g_idx.long()
    for start in range(0, packed.out_features, _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        values = _from_int32(packed.qweight[:, block].t(), bits).to(torch.float32)
        if run:
            grouped = values.view(-1, packed.groups, run)  # [rows, groups, group_size]
            grouped.sub_(zeros[block].unsqueeze(-1)).mul_(scales[block].unsqueeze(-1))
        else:
            values.sub_(zeros[block][:, columns]).mul_(scales[block][:, columns])
        weight[block] = values
    return weight


def pack_zeros(zeros: Tensor, bits: int, checkpoint_format: CheckpointFormat = "gptq") -> Tensor:
    """Pack zero points uint8 ``[out, groups]`` to int32 ``[groups, out * bits / 32]``."""
    if checkpoint_format == "gptq":
        if bool((zeros == 0).any()):
            raise QuantisationError(
                "a zero point is 0, which the gptq (v1) format cannot hold: it stores zero - 1",
                hint="quantise with zero points of at least 1, or write checkpoint_format gptq_v2",
            )
        zeros = zeros - 1
    return _to_int32(zeros.t(), bits)


def unpack_zeros(qzeros: Tensor, bits: int, checkpoint_format: CheckpointFormat = "gptq") -> Tensor:
    """Unpack int32 ``[groups, out * bits / 32]`` to zero points uint8 ``[out, groups]``."""
    zeros = _from_int32(qzeros, bits).t()
    if checkpoint_format == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)  # at 8 bits uint8 wraps by itself
    return zeros.contiguous()


def has_trivial_g_idx(g_idx: Tensor, groups: int) -> bool:
    """Return whether the columns lie in their natural order, in ``groups`` equal runs."""
    in_features = g_idx.shape[0]
    if in_features % groups:
        return False
    natural = trivial_g_idx(in_features, in_features // groups)
    return torch.equal(g_idx.to(torch.int32), natural.to(g_idx.device))


def _run_length(packed: PackedLinear) -> int:
    """Return the group size where groups are equal runs of columns, else 0."""
    if not has_trivial_g_idx(packed.g_idx, packed.groups):
        return 0
    return packed.in_features // packed.groups


def _to_int32(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``[rows, n]``, each below ``2**bits``, to int32 ``[rows, n * bits / 32]``, first lowest.

    Two neighbours read as one int16 are ``first | second << 8``; shifted onto itself, that leaves both in
    the low byte. Repeat until a byte is full.
    """
    rows, values, width = values.shape[0], values.flatten(), bits
    while width < 8:
        pairs = values.view(torch.int16)  # [rows * n / 2]
        values = (pairs >> (8 - width)).bitwise_or_(pairs).to(torch.uint8)  # the high byte falls off
        width *= 2
    return values.view(torch.int32).view(rows, -1)


def _from_int32(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 ``[rows, n * bits / 32]`` to uint8 ``[rows, n]``: ``_to_int32`` backwards."""
    values, width = words.flatten().view(torch.uint8), 4
    while width >= bits:
        mask = (2**width - 1) * 0x0101
        pairs = values.to(torch.int16)
        values = (pairs << (8 - width)).bitwise_or_(pairs).bitwise_and_(mask).view(torch.uint8)
        width //= 2
    return values.view(words.shape[0], -1)


def _check_unpacked(integers: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    """Check shapes, dtypes and ranges that ``pack`` relies on."""
    if bits not in PACKABLE_BITS:
        raise ValueError(f"bits must be one of {PACKABLE_BITS}, got {bits}")
    if integers.dtype != torch.uint8 or zeros.dtype != torch.uint8:
        raise ValueError(f"integers and zeros must be uint8, got {integers.dtype} and {zeros.dtype}")
    out_features, in_features = integers.shape
    if scales.shape != zeros.shape or scales.shape[0] != out_features:
        raise ValueError(f"scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)}: expected [out, groups]")
    if scales.shape[1] == 0 or in_features % scales.shape[1]:
        raise ValueError(f"{in_features} columns do not divide into {scales.shape[1]} groups")
    per_word = 32 // bits
    if in_features % per_word or out_features % per_word:
        raise ValueError(f"a [{out_features}, {in_features}] weight needs both sides divisible by {per_word}")
    top = 2**bits - 1
    if integers.numel() and (int(integers.max()) > top or int(zeros.max()) > top):
        raise ValueError(f"integers and zeros must be at most {top} at {bits} bits")
