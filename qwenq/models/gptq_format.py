"""Read, check and pack GPTQ tensors, and show a GPTQ checkpoint as a plain one.

A weight ``[out, in]`` is stored transposed. Each int32 of ``qweight`` holds 32/bits consecutive *input* rows
of one output column, each int32 of ``qzeros`` 32/bits consecutive *output* columns of one group, the first in
the lowest bits; of 3 bits, 32 integers lie in three words, some of them across two::

    weight[o, i] = scales[g_idx[i], o] * (integer[o, i] - zero[g_idx[i], o])

Two formats differ in the zero points alone: ``gptq`` (v1) stores ``zero - 1``, ``gptq_v2`` stores ``zero``.

Bits are moved as bytes: on a little-endian machine (all that torch is built for, and the byte order of
safetensors) four consecutive uint8 *are* the int32, so nothing is ever wider than the result.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import ModelError, QuantisationError
from qwenq.models.gptq_config import LAYER_PARTS, SUPPORTED_BITS, CheckpointFormat, QuantConfig
from qwenq.models.source import OTHER_MODEL, TensorInfo, TensorSource, WeightsView

_OTHER: dict[CheckpointFormat, CheckpointFormat] = {"gptq": "gptq_v2", "gptq_v2": "gptq"}
_ROWS_AT_ONCE = 256  # output rows dequantised in one go: bounds the float32 temporary


@dataclass(frozen=True)
class PackedLinear:
    """One quantised linear as it lies in a file."""

    qweight: Tensor  # int32 ``[in * bits / 32, out]``
    qzeros: Tensor  # int32 ``[groups, out * bits / 32]``
    scales: Tensor  # float16 ``[groups, out]`` (third-party files: any float)
    g_idx: Tensor  # int32 ``[in]``, the group of each input column

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

    def outputs(self, order: Tensor, bits: int, checkpoint_format: CheckpointFormat) -> PackedLinear:
        """Return the linear of some of the outputs, int64 [chosen], in that order."""
        zeros = unpack_zeros(self.qzeros, bits, checkpoint_format)[order]
        qzeros = pack_zeros(zeros, bits, checkpoint_format)
        return PackedLinear(self.qweight[:, order], qzeros, self.scales[:, order], self.g_idx)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return the four tensors under their names in a checkpoint, for the module of that name."""
        return {f"{module}.{part}": getattr(self, part) for part in LAYER_PARTS}


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
        bits: one of ``SUPPORTED_BITS``.
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
    """Invert ``pack``: integers, scales in their stored dtype, zeros; columns stay in file order."""
    integers = from_int32(packed.qweight.t(), bits)  # [out, in]
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
    runs = has_trivial_g_idx(packed.g_idx, packed.groups)
    columns = packed.g_idx.long()
    for start in range(0, packed.out_features, _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        values = from_int32(packed.qweight[:, block].t(), bits).to(torch.float32)
        if runs:
            grouped = values.view(len(values), packed.groups, -1)  # [rows, groups, group_size]
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
    zeros = from_int32(qzeros, bits).t()
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


def _to_int32(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``[rows, n]``, each below ``2**bits``, to int32 ``[rows, n * bits / 32]``, first lowest.

    Two neighbours read as one int16 are ``first | second << 8``; shifted onto itself, that leaves both in
    the low byte. Repeat until a byte is full. Others than 1, 2, 4 and 8 bits
    are split into single bits first.
    """
    rows, width = values.shape[0], bits
    if 8 % bits:
        shifts = torch.arange(bits, dtype=torch.uint8, device=values.device)
        values, width = (values.unsqueeze(-1) >> shifts) & 1, 1  # [rows, n, bits]
    values = values.flatten()
    while width < 8:
        pairs = values.view(torch.int16)  # [rows * n / 2]
        values = (pairs >> (8 - width)).bitwise_or_(pairs).to(torch.uint8)  # the high byte falls off
        width *= 2
    return values.view(torch.int32).view(rows, -1)


def from_int32(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 ``[rows, words]`` to uint8 ``[rows, words * 32 // bits]`` of 1 to 8 bits, lowest first."""
    if 8 % bits:  # an integer may lie across bytes and words: a stream of single bits
        count = words.shape[1] * 32 // bits
        stream = from_int32(words, 1)[:, : count * bits].reshape(len(words), count, bits)
        shifts = torch.arange(bits, dtype=torch.uint8, device=words.device)
        return (stream << shifts).sum(-1, dtype=torch.uint8)
    values, width = words.flatten().view(torch.uint8), 4
    while width >= bits:
        mask = (2**width - 1) * 0x0101
        pairs = values.to(torch.int16)
        values = (pairs << (8 - width)).bitwise_or_(pairs).bitwise_and_(mask).view(torch.uint8)
        width //= 2
    return values.view(words.shape[0], -1)


def _check_unpacked(integers: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    """Check shapes, dtypes and ranges that ``pack`` relies on."""
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits must be one of {SUPPORTED_BITS}, got {bits}")
    if integers.dtype != torch.uint8 or zeros.dtype != torch.uint8:
        raise ValueError(f"integers and zeros must be uint8, got {integers.dtype} and {zeros.dtype}")
    out_features, in_features = integers.shape
    if scales.shape != zeros.shape or scales.shape[0] != out_features:
        raise ValueError(f"scales {tuple(scales.shape)}, zeros {tuple(zeros.shape)}: expected [out, groups]")
    if scales.shape[1] == 0 or in_features % scales.shape[1]:
        raise ValueError(f"{in_features} columns do not divide into {scales.shape[1]} groups")
    whole = 32 // gcd(32, bits)  # integers that fill whole words
    if in_features % whole or out_features % whole:
        raise ValueError(f"a [{out_features}, {in_features}] weight needs both sides divisible by {whole}")
    top = 2**bits - 1
    if integers.numel() and (int(integers.max()) > top or int(zeros.max()) > top):
        raise ValueError(f"integers and zeros must be at most {top} at {bits} bits")


def quantised_modules(source: TensorSource) -> list[str]:
    """Return names of the modules that have a ``.qweight``, in file order."""
    return [name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight")]


def read_packed(
    source: TensorSource, module: str, quant: QuantConfig, names: Container[str] | None = None
) -> PackedLinear:
    """Read the packed tensors of one module; without act-order a missing ``g_idx`` is trivial.

    ``names`` of all tensors are for callers that read many modules.
    """
    names = set(source.names()) if names is None else names
    quant = quant.of(module)
    check_module_shapes(source, names, module, quant)
    qweight = source.read(f"{module}.qweight")  # [in * bits / 32, out]
    if f"{module}.g_idx" in names:
        g_idx = source.read(f"{module}.g_idx")
    else:
        g_idx = trivial_g_idx(qweight.shape[0] * 32 // quant.bits, quant.group_size)
    return PackedLinear(qweight, source.read(f"{module}.qzeros"), source.read(f"{module}.scales"), g_idx)


class DequantisedSource(WeightsView):
    """A GPTQ checkpoint that reads like a plain one.

    Weights are dequantised when they are read, to ``dtype`` or else that of the scales. All-zero biases that
    AutoGPTQ wrote beside modules which have none (its releases up to 0.7.1) are hidden, but those that
    ``config``, the model's config.json, asks for.
    """

    def __init__(
        self,
        source: TensorSource,
        quant: QuantConfig,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(source, LAYER_PARTS)
        self._quant, self._config, self._dtype = quant, config, dtype
        self._all = frozenset(source.names())

    def hidden(self) -> set[str]:
        """Return the biases that are not shown."""
        return surplus_biases(self.stored, self.modules, self._config)

    def weight_info(self, module: str) -> TensorInfo:
        """Return shape and dtype from the headers."""
        words, out_features = self.stored.info(f"{module}.qweight").shape
        dtype = self._dtype or self.stored.info(f"{module}.scales").dtype
        return TensorInfo((out_features, words * 32 // self._quant.of(module).bits), dtype)

    def weight(self, module: str) -> torch.Tensor:
        """Dequantise the weight of a module."""
        packed, own = read_packed(self.stored, module, self._quant, self._all), self._quant.of(module)
        return dequantise(packed, own.bits, own.checkpoint_format, self.weight_info(module).dtype)


def surplus_biases(
    source: TensorSource, modules: Iterable[str], config: Mapping[str, Any] | None = None
) -> set[str]:
    """Return all-zero biases of quantised modules that have none in a Qwen or Llama block: o, gate, up, down.

    ``config``, the model's config.json, may ask for some of them.
    """
    config = config or {}
    names, kind = set(source.names()), config.get("model_type")
    of_mlp = kind == "llama" and config.get("mlp_bias")
    suffixes = () if of_mlp else (".gate_proj", ".up_proj", ".down_proj")
    if kind == "qwen2" or not config.get("attention_bias"):
        suffixes = (*suffixes, ".o_proj")
    candidates = [f"{m}.bias" for m in modules if m.endswith(suffixes) and f"{m}.bias" in names]
    return {name for name in candidates if not bool(source.read(name).any())}


def packed_modules(source: TensorSource, quant: QuantConfig) -> list[str]:
    """Return the names of the quantised modules, in file order, their headers checked against the config."""
    modules, names = quantised_modules(source), set(source.names())
    if not modules:
        raise ModelError(
            "the config says GPTQ, but no tensor is named *.qweight",
            hint="the folder mixes the config and the weights of two models, or a shard is missing",
        )
    # Modules that have a ``qweight``, then those that have only some of the other tensors.
    rest = (name.removesuffix(".qzeros") for name in sorted(names) if name.endswith(".qzeros"))
    for module in dict.fromkeys([*modules, *rest]):
        check_module_shapes(source, names, module, quant)
        if f"{module}.weight" in names:
            what = f"{module} is there twice: as weight and as qweight"
            raise ModelError(what, where=f"{module}.weight", hint=OTHER_MODEL)
    return modules


def validate_quantised(source: TensorSource, quant: QuantConfig) -> list[str]:
    """Check the tensors of every quantised module against the config; return the modules' names."""
    modules, names = packed_modules(source, quant), set(source.names())
    for module in modules:
        if f"{module}.g_idx" in names:
            check_g_idx(source.read(f"{module}.g_idx"), module, quant)
        if quant.of(module).sym:
            check_symmetric_zeros(source.read(f"{module}.qzeros"), module, quant)
    return modules


def check_module_shapes(source: TensorSource, names: Container[str], module: str, quant: QuantConfig) -> None:
    """Check that one module's tensors are all there, in the shapes of its bits and group size."""
    quant = quant.of(module)
    required = LAYER_PARTS if quant.desc_act else LAYER_PARTS[:3]
    missing = [part for part in required if f"{module}.{part}" not in names]
    if missing:
        raise ModelError(
            f"a quantised module lacks {', '.join(missing)}",
            where=module,
            hint="a shard is missing or the file was cut; download or quantise the model again",
        )
    _check_types(source, names, module)
    words, out_features = source.info(f"{module}.qweight").shape
    shapes = quant.packed_shapes(out_features, words * 32 // quant.bits)
    for part in ("scales", "qzeros", "g_idx"):
        name, shape = f"{module}.{part}", shapes[part]
        if name in names and source.info(name).shape != shape:
            raise ModelError(
                f"{part} is {list(source.info(name).shape)}, but bits {quant.bits} and group_size "
                f"{quant.group_size} make it {list(shape)} (qweight is {[words, out_features]})",
                where=name,
                hint="bits or group_size of quantization_config are not those of the weights",
            )


def _check_types(source: TensorSource, names: Container[str], module: str) -> None:
    """Check that words are int32, scales are real, and the weight is a matrix that is not empty."""
    for part in LAYER_PARTS:
        name = f"{module}.{part}"
        if name not in names:
            continue
        info = source.info(name)
        sound = info.dtype.is_floating_point if part == "scales" else str(info.dtype) == "torch.int32"
        if part == "qweight":
            sound = sound and len(info.shape) == 2 and info.numel > 0
        if not sound:
            raise ModelError(
                f"{part} is {info.dtype} {list(info.shape)}, which no GPTQ layer has",
                where=name,
                hint="the file is damaged or no GPTQ checkpoint; download or quantise the model again",
            )


def check_g_idx(g_idx: torch.Tensor, module: str, quant: QuantConfig) -> None:
    """Check that a module's ``g_idx`` names groups that exist."""
    groups = quant.of(module).groups(g_idx.shape[0])
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ModelError(
            f"g_idx runs from {int(g_idx.min())} to {int(g_idx.max())}, but there are {groups} groups",
            where=f"{module}.g_idx",
            hint="the file is damaged, or group_size of quantization_config is wrong",
        )


def stored_format(source: TensorSource, quant: QuantConfig) -> CheckpointFormat:
    """Return the format in which zero points are stored; the first module tells.

    Files have been published that say ``gptq`` and hold zero points as ``gptq_v2`` does. Of a symmetric model
    every zero point is the middle, so its values tell.
    """
    module = next(iter(quantised_modules(source)), None)
    own = quant if module is None else quant.of(module)
    if module is None or not own.sym or f"{module}.qzeros" not in set(source.names()):
        return quant.checkpoint_format
    qzeros, other = source.read(f"{module}.qzeros"), _OTHER[quant.checkpoint_format]
    if str(qzeros.dtype) != "torch.int32" or qzeros.ndim != 2 or not qzeros.numel():
        return quant.checkpoint_format
    return other if _all_in_the_middle(qzeros, own.bits, other) else quant.checkpoint_format


def check_symmetric_zeros(qzeros: torch.Tensor, module: str, quant: QuantConfig) -> None:
    """Check that every zero point of a symmetric model is the middle."""
    quant = quant.of(module)
    if _all_in_the_middle(qzeros, quant.bits, quant.checkpoint_format):
        return
    zeros = unpack_zeros(qzeros, quant.bits, quant.checkpoint_format)
    raise ModelError(
        f"the config says sym, but zero points run from {int(zeros.min())} to {int(zeros.max())}",
        where=f"{module}.qzeros",
        hint='an asymmetric model needs "sym": false, one of the other format its "checkpoint_format"; '
        "otherwise the file is damaged",
    )


def _all_in_the_middle(qzeros: Tensor, bits: int, checkpoint_format: CheckpointFormat) -> bool:
    return bool((unpack_zeros(qzeros, bits, checkpoint_format) == 2 ** (bits - 1)).all())
