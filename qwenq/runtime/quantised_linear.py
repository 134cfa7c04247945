"""Multiply packed integers: each way to do so on CPUs and GPUs, and the choice among them at load."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from qwenq.compute import cpu, gpu, linear
from qwenq.errors import UnsupportedError, UsageError
from qwenq.models.gptq_config import SUPPORTED_BITS
from qwenq.models.gptq_format import PackedLinear, dequantise, has_trivial_g_idx, pack, unpack_zeros
from qwenq.runtime.linear import (
    Dense,
    Linear,
    LinearShape,
    QuantLinear,
    Requirements,
    UnpackedLinear,
    unpack_by_group,
)


class Dequantise(Dense):
    """A plain matrix product in the dtype of the activations."""

    name = "dequantise"
    device_type: ClassVar[str] = "any"
    widths: ClassVar[tuple[int, ...]] = SUPPORTED_BITS

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        weight = dequantise(packed, need.bits, need.checkpoint_format, need.dtype)
        super().__init__(weight.to(need.device), None if bias is None else bias.to(need.device, need.dtype))

    @staticmethod
    def unsupported_reason(need: Requirements) -> str | None:
        """Return None: it always can."""
        del need
        return None


# Multiply Int2, Int4 and Int8 weights on a CPU by C kernels, few rows as fast as memory is read.
#
# A decode step reads every weight once. Activations are 16-bit integers by group here (at most 128
# columns), more precise than bfloat16; sums are exact, scales and totals float32. For many rows, weights
# are unpacked and torch multiplies. Three things that the product over groups does not know are done
# around it:
#
# - columns in activation order: the input's are put into the stored order;
# - zero points off the middle: ``Σ_g scale · (middle - zero) · Σ_i x_i``, a product with the groups'
#   sums;
# - groups longer than the product knows: a scale is repeated.


class CpuNative:
    """Packed 2-, 4- or 8-bit integers; those of 2 bits lie in nibbles.

    Attributes:
        many_rows: from here on unpacking and one large product are faster.
        order: see `UnpackedLinear`.
        offsets: float32 [groups, out] of `UnpackedLinear`; None where every zero point is the middle.
        bias: [out], or None.
        layer: the weights as C reads them.
    """

    name = "cpu-native"
    device_type: ClassVar[str] = "cpu"
    widths: ClassVar[tuple[int, ...]] = (2, 4, 8)
    many_rows: ClassVar[int] = 96

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        layer = unpack_by_group(packed, need)
        self._take(layer, need.bits, None if bias is None else bias.to(need.dtype))

    @classmethod
    def of(cls, layer: UnpackedLinear, bits: int) -> Self:
        """Return a layer without a bias that comes from elsewhere than a file."""
        self = cls.__new__(cls)
        self._take(layer, bits, None)
        return self

    def _take(self, layer: UnpackedLinear, bits: int, bias: Tensor | None) -> None:
        self.order, self.bias = layer.order, bias
        offsets = layer.offsets(2 ** (bits - 1))
        self.offsets = None if offsets is None else offsets.t().contiguous()  # [groups, out]
        scales = layer.scales.repeat_interleave(layer.group_size // _longest_group(layer.group_size), dim=1)
        integers = layer.integers if bits > 2 else layer.integers + (8 - 2)
        self.layer = linear.pack(integers, scales, max(bits, 4))

    @classmethod
    def unsupported_reason(cls, need: Requirements) -> str | None:
        """Require the C library, bfloat16 activations, whole groups and whole blocks of outputs."""
        if need.bits not in cls.widths:
            return f"it holds {' or '.join(map(str, cls.widths))} bits, not {need.bits}"
        if reason := _unsupported_activations(need.device, need.dtype):
            return reason
        reasons = (_unsupported_layer(layer, need.group_size) for layer in need.layers)
        return next((reason for reason in reasons if reason), None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        if x.dim() == 2:  # as a decode step has it: a small model spends as long between products as in them
            return self._rows(x.contiguous())
        return self._rows(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], -1)

    def _rows(self, rows: Tensor) -> Tensor:
        if self.order is not None:
            rows = rows[:, self.order]
        dtype = rows.dtype if self.offsets is None else torch.float32  # which are added before it is rounded
        y = linear.multiply(rows, self.layer, dtype) if len(rows) < self.many_rows else self._many(rows)
        if self.offsets is not None:
            sums = rows.view(len(rows), len(self.offsets), -1).sum(-1, dtype=torch.float32)  # [rows, groups]
            y = torch.addmm(y.float(), sums, self.offsets).to(rows.dtype)
        if self.bias is not None:
            y += self.bias
        return y

    def _many(self, rows: Tensor) -> Tensor:
        """Multiply by one large product, in float32 where this CPU multiplies that faster."""
        wide = cpu.float32_is_faster()
        weight = linear.unpack(self.layer, torch.float32 if wide else rows.dtype)  # [in, out]
        return (rows.float() @ weight).to(rows.dtype) if wide else rows @ weight

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, offsets and bias."""
        held = (self.layer.weights, self.layer.scales, self.offsets, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _unsupported_activations(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    return cpu.unsupported_reason()


def _unsupported_layer(layer: LinearShape, columns: int) -> str | None:
    size = layer.in_features if columns == -1 else columns
    if not _longest_group(size):
        return f"a group of {layer.name} has {size} columns, no multiple of {linear.GROUP_SIZES[-1]}"
    if not layer.even:
        return f"the groups of {layer.name} differ in size"
    if layer.out_features % linear.OUTPUTS:
        return f"{layer.name} has {layer.out_features} outputs, no multiple of {linear.OUTPUTS}"
    return None


def _longest_group(columns: int) -> int:
    """Return the longest group of the C kernel that divides so many columns; 0: there is none."""
    return next((size for size in linear.GROUP_SIZES if columns % size == 0), 0)


# Round an output head to 8 bits: it is the largest matrix of a small model, read whole for every token.


_GROUP_SIZE = 32  # as in GGUF's Q8_0, the usual form of a head there
_VOCAB_AT_ONCE = 4096


class Int8Head:
    """The head, bfloat16 [vocabulary, hidden], rounded to 8 bits with a scale for each 32 columns."""

    name = f"int8 head by {CpuNative.name}"

    def __init__(self, weight: Tensor) -> None:
        self._vocab, hidden = weight.shape
        rows = -(-self._vocab // linear.OUTPUTS) * linear.OUTPUTS  # the product works on blocks of outputs
        integers = torch.full((rows, hidden), 128, dtype=torch.uint8)
        scales = torch.zeros(rows, hidden // _GROUP_SIZE)
        for start in range(0, self._vocab, _VOCAB_AT_ONCE):  # bounds the float32 temporary
            part = slice(start, min(start + _VOCAB_AT_ONCE, self._vocab))
            integers[part], scales[part] = _rounded(weight[part].float())
        layer = UnpackedLinear(integers, scales, torch.full(scales.shape, 128, dtype=torch.uint8), None)
        self._layer = CpuNative.of(layer, bits=8)

    @classmethod
    def of(cls, head: Linear) -> Int8Head:
        """Round a plain head; refuse one that is quantised already, or cannot run in Int8 here."""
        if not isinstance(head, Dense) or isinstance(head, Dequantise):
            reason: str | None = f"the output head is quantised already ({head.name})"
        else:
            reason = _unsupported_activations(head.weight.device, head.weight.dtype)
            if reason is None and (columns := head.weight.shape[1]) % _GROUP_SIZE:
                reason = f"{columns} columns are not a multiple of {_GROUP_SIZE}"
            if reason is None:
                return cls(head.weight)
        raise UnsupportedError(
            f"the Int8 head cannot be used: {reason}", where="--head", hint="leave --head out"
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., vocabulary] for [..., hidden]."""
        return self._layer(x)[..., : self._vocab]

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self._layer.nbytes


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round float32 [rows, hidden] to uint8 around 128, with float32 scales [rows, groups]."""
    groups = weight.view(len(weight), -1, _GROUP_SIZE)  # [rows, groups, group_size]
    largest = groups.abs().amax(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    # Rounded first, scales are what the integers are rounded against.
    scales = (largest / 127).to(torch.bfloat16).float()
    integers = (groups / scales.unsqueeze(-1)).round_().clamp_(-127, 127).add_(128)
    return integers.to(torch.uint8).view(weight.shape), scales


# Multiply Int4 and Int8 weights on an NVIDIA GPU by three Triton kernels, chosen by the number of rows.
#
# The packed words of the file are read as they are: a word holds consecutive inputs of one output, its
# neighbours the same inputs of the next outputs, so four words in a row are one 16-byte load. Zero points
# are unpacked once, at load: packed along the outputs, each word of them would be read by the threads of
# eight of those. Where all of them are the middle, as in a symmetric model, they are a constant.


SOME_ROWS = 16
"""Up to so many rows, tensor cores over words unpacked on the way; above, the weight is unpacked whole."""


class TritonInt4:
    """4-bit integers; float32 sums; the same input gives the same bits."""

    name = "triton-int4"
    device_type: ClassVar[str] = "cuda"
    widths: ClassVar[tuple[int, ...]] = (4,)

    def __init__(self, packed: PackedLinear, need: Requirements, bias: Tensor | None) -> None:
        self._bits, self._dtype = need.bits, need.dtype
        self._order: Tensor | None = None
        words, zeros = packed.qweight, unpack_zeros(packed.qzeros, need.bits, need.checkpoint_format)
        if not has_trivial_g_idx(packed.g_idx, packed.groups):
            # Columns in activation order are sorted by group and packed anew, and the input is put in that
            # order.
            layer = unpack_by_group(packed, need)
            words = pack(layer.integers, layer.scales, layer.zeros, need.bits, "gptq_v2").qweight
            self._order = None if layer.order is None else layer.order.to(need.device)
        self._words = words.to(need.device).contiguous()  # int32 [in · bits / 32, out]
        self._scales = packed.scales.to(need.device).contiguous()  # [groups, out]
        middle = 2 ** (need.bits - 1)
        self._zeros = None  # uint8 [groups, out]
        if bool((zeros != middle).any()):
            self._zeros = zeros.t().to(need.device).contiguous()
        self._bias = None if bias is None else bias.to(need.device, need.dtype)

    @classmethod
    def unsupported_reason(cls, need: Requirements) -> str | None:
        """Require a GPU with Triton, 16-bit activations, and groups of whole words."""
        if need.bits not in cls.widths:
            return f"it holds {cls.widths[0]} bits, not {need.bits}"
        if reason := gpu.unsupported_reason(need.device):
            return reason
        if need.dtype not in (torch.bfloat16, torch.float16):
            return f"it multiplies bfloat16 or float16, not {str(need.dtype).removeprefix('torch.')}"
        for layer in need.layers:
            size = layer.in_features if need.group_size == -1 else need.group_size
            if size % 32:
                return f"a group has {size} columns, which is not a multiple of 32 ({layer.name})"
            if not layer.even:
                return f"the groups of {layer.name} differ in size"
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        from qwenq.compute.triton.linear import multiply_row, multiply_rows, unpack_weight

        rows = x.reshape(-1, x.shape[-1])
        if self._order is not None:
            rows = rows[:, self._order]
        weight = (self._words, self._scales, self._zeros, self._bits)
        if len(rows) == 1:
            return multiply_row(rows, *weight, self._bias).view(*x.shape[:-1], -1)
        few = len(rows) <= SOME_ROWS
        y = multiply_rows(rows, *weight) if few else rows @ unpack_weight(*weight, x.dtype)
        if self._bias is not None:
            y += self._bias
        return y.view(*x.shape[:-1], -1)

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales, zero points and bias."""
        held = (self._words, self._scales, self._zeros, self._bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class TritonInt8(TritonInt4):
    """8-bit integers."""

    name = "triton-int8"
    widths: ClassVar[tuple[int, ...]] = (8,)


KERNELS: tuple[type[QuantLinear], ...] = (CpuNative, TritonInt4, TritonInt8, Dequantise)
"""``auto`` takes the first that is supported. Importing them works without a GPU."""


def choose(name: str, need: Requirements) -> tuple[type[QuantLinear], list[str]]:
    """Return the kernel of that name; ``auto``: the first of the table that can run the model.

    Returns:
        The kernel, and a notice for each faster one of this device that is not used, with the reason.

    Raises:
        UsageError: there is no such kernel.
        UnsupportedError: the kernel that was asked for cannot run this; no other is taken in its place.
    """
    asked = [kernel for kernel in KERNELS if name in ("auto", kernel.name)]
    if not asked:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise UsageError(f"there is no kernel {name!r}", where="--kernel", hint=f"use auto, {names}")
    notices: list[str] = []
    for kernel in asked:
        reason = kernel.unsupported_reason(need)
        if reason is None:
            return kernel, notices
        # Of two kernels for different widths, one is never the faster choice.
        if kernel.device_type == need.device.type and need.bits in kernel.widths:
            notices.append(f"the faster kernel {kernel.name} is not used because {reason}")
    raise UnsupportedError(  # the last kernel of the table runs everything
        f"the kernel {name} cannot run this model here: {reason}", where="--kernel", hint="use auto"
    )
