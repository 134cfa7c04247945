"""Read weights that other tools quantised as the plain weights they stand for.

AWQ, compressed-tensors (packed integers, 8-bit integers, FP8) and FP8 by blocks are dequantised exactly, one
tensor at a time: such a model is evaluated, compared and quantised anew like any other. The formats:

- ``awq`` (GEMM): ``qweight`` int32 [in, out/8], ``qzeros`` int32 [groups, out/8], ``scales`` [groups, out];
  the eight nibbles of a word are columns 0, 2, 4, 6, 1, 3, 5, 7. ``W[o, i] = (q − z) s``.
- ``compressed-tensors``, ``pack-quantized``: ``weight_packed`` int32 [out, in·bits/32], integers offset by
  2^(bits−1); ``weight_scale`` [out, groups]; ``weight_zero_point`` packed along the outputs;
  ``weight_shape``; ``weight_g_idx``.
- ``compressed-tensors``, ``int-quantized`` or ``float-quantized``: ``weight`` int8 or float8,
  ``weight_scale``.
- ``fp8`` (DeepSeek, Qwen): ``weight`` float8 [out, in], ``weight_scale_inv`` by ``weight_block_size``.

AutoRound writes AWQ's tensors or GPTQ's (``models.autoround``); the latter are opened as GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.autoround import METHODS, is_awq_packed, require_weights_only
from qwenq.models.gptq_format import from_int32
from qwenq.models.source import OTHER_MODEL, TensorInfo, TensorSource, WeightsView

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Nibble of a word that holds column 0, 1, … of its eight."""
_ONE_BYTE = {"int-quantized", "float-quantized", "naive-quantized"}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ForeignFormat:
    """How the weights of a checkpoint were quantised by another tool."""

    name: str  # for people, such as "AWQ Int4, groups of 128"
    precision: str  # for rows and tables, such as ``awq-int4``
    bits: int  # of a weight; where there are several widths, that of most modules
    # of the tensors that stand for a weight; the first tells that a module is quantised
    suffixes: tuple[str, ...]
    # (source, module) → [out, in] of its weight, from headers
    shape: Callable[[TensorSource, str], tuple[int, ...]]
    dequantise: Callable[[TensorSource, str], Tensor]  # (source, module) → the weight in float32
    group_size: int = -1  # input columns that share a scale; -1: all of them, or blocks of another form
    symmetric: bool = True  # whether zero points are in the middle
    integers: bool = True  # whether weights are integers, and no floats
    activations: bool = False  # whether the engines that it was made for quantise activations, too


class ForeignSource(WeightsView):
    """A checkpoint of another tool that reads like a plain one; weights are rounded once, to ``dtype``."""

    def __init__(self, stored: TensorSource, found: ForeignFormat, dtype: torch.dtype) -> None:
        super().__init__(stored, found.suffixes)
        self.format, self._dtype = found, dtype

    @property
    def notice(self) -> str:
        """Return a line for the user: what it is, how it is read, and what is left out by that."""
        left_out = "; engines quantise its activations, too, which is not done here"
        return (
            f"quantised by another tool, {self.format.name}: read as the weights it stands for"
            f"{left_out if self.format.activations else ''}"
        )

    def weight_info(self, module: str) -> TensorInfo:
        """Return shape and dtype from the headers."""
        with _fitting(module):
            return TensorInfo(self.format.shape(self.stored, module), self._dtype)

    def weight(self, module: str) -> Tensor:
        """Dequantise the weight of a module in float32."""
        with _fitting(module):
            return self.format.dequantise(self.stored, module).to(self._dtype)


@contextmanager
def _fitting(module: str) -> Iterator[None]:
    """Turn what shapes raise that cannot be multiplied, reshaped or indexed into a message."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"the tensors of this module do not fit each other: {error}",
            where=module,
            hint=OTHER_MODEL,
        ) from error


def foreign_format(config: Mapping[str, Any], where: Path) -> ForeignFormat | None:
    """Return the format of another tool that config.json names; None: plain weights or GPTQ."""
    keys = config.get("quantization_config")
    if not isinstance(keys, Mapping):
        return None
    method = str(keys.get("quant_method", "gptq")).lower()
    readers = {"awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
    if method in readers:
        return readers[method](keys, where)
    if method in METHODS and is_awq_packed(keys):
        require_weights_only(keys, where)
        return _awq(keys, where)
    if method == "gptq" or method in METHODS:
        return None
    raise UnsupportedError(
        f"the model is quantised with {method[:40]!r}, which is not read",
        where=where,
        hint=f"supported: gptq, auto-round, {', '.join(readers)}",
    )


def open_foreign(config: Mapping[str, Any], source: TensorSource, where: Path) -> ForeignSource | None:
    """Return a checkpoint of another tool that reads like a plain one; None: plain weights or GPTQ.

    Weights are shown in float32, which holds every product of an integer and a scale exactly.
    """
    found = foreign_format(config, where)
    if found is None:
        return None
    opened = ForeignSource(source, found, torch.float32)
    if not opened.modules:
        raise ModelError(
            f"config.json names {found.name}, and no tensor has that form", where=where, hint=OTHER_MODEL
        )
    return opened


def _awq(keys: Mapping[str, Any], where: Path) -> ForeignFormat:
    bits, group = _integer(keys, "bits", where), _integer(keys, "group_size", where)
    version = str(keys.get("version") or keys.get("format") or "gemm").lower()  # AutoAWQ's, GPTQModel's
    if bits != 4 or version != "gemm":
        raise UnsupportedError(
            f"AWQ of {bits} bits in its {version} layout is not read",
            where=where,
            hint="supported: the layout gemm of 4 bits, which AutoAWQ and AutoRound write",
        )

    def shape(source: TensorSource, module: str) -> tuple[int, ...]:
        inputs, words = source.info(f"{module}.qweight").shape
        return words * 8, inputs

    def dequantise(source: TensorSource, module: str) -> Tensor:
        integers = _awq_nibbles(source.read(f"{module}.qweight"))  # [in, out]
        zeros = _awq_nibbles(source.read(f"{module}.qzeros"))  # [groups, out]
        scales = source.read(f"{module}.scales").float()  # [groups, out]
        size = len(integers) // len(scales)
        grouped = integers.view(len(scales), size, -1).float() - zeros.unsqueeze(1).float()
        return (grouped * scales.unsqueeze(1)).flatten(0, 1).t().contiguous()  # [out, in]

    return ForeignFormat(
        name=f"AWQ Int4, {_groups(group)}",
        precision="awq-int4",
        bits=bits,
        group_size=group,
        symmetric=keys.get("zero_point", not keys.get("sym", False)) is False,
        suffixes=("qweight", "qzeros", "scales"),
        shape=shape,
        dequantise=dequantise,
    )


def _awq_nibbles(words: Tensor) -> Tensor:
    """Return uint8 [rows, 8 · words] in the order of the columns."""
    return from_int32(words, 4).view(len(words), -1, 8)[..., _AWQ_ORDER].flatten(1)


def _compressed_tensors(keys: Mapping[str, Any], where: Path) -> ForeignFormat:
    schemes, activations = _schemes(keys, where)
    layouts = {str(scheme["format"]) for scheme in schemes}
    kinds = {str(scheme.get("type", "int")) for scheme in schemes}
    widths = sorted({_width(scheme.get("num_bits"), where) for scheme in schemes})
    if layouts == {"pack-quantized"} and kinds == {"int"} and widths[-1] <= 8:
        return _packed(schemes, activations)
    if layouts <= _ONE_BYTE and len(kinds) == 1 and widths == [8]:
        return _eight_bits(schemes[0], activations)
    raise UnsupportedError(
        f"compressed-tensors' {' and '.join(map(repr, sorted(layouts)))} of "
        f"{' and '.join(map(str, widths))} bits is not read",
        where=where,
        hint="supported: pack-quantized (integers to 8 bits), and int-quantized or float-quantized of 8 bits",
    )


def _width(bits: Any, where: Path) -> int:
    if isinstance(bits, int) and 1 <= bits <= 16:
        return bits
    raise ModelError(
        f"config_groups has weights of {bits!r} bits", where=where, hint="copy config.json again"
    )


def _schemes(keys: Mapping[str, Any], where: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the settings of weights by group, the commonest last, and whether activations have any."""
    sparsity, transform = (
        found if isinstance(found := keys.get(key), Mapping) else {}
        for key in ("sparsity_config", "transform_config")
    )
    if sparsity.get("format", "dense") != "dense" or transform.get("config_groups"):
        kind = "rotated" if transform.get("config_groups") else "sparse"
        raise UnsupportedError(
            f"compressed-tensors with weights that are {kind}, too, is not read",
            where=where,
            hint="start from the model that was quantised",
        )
    given = keys.get("config_groups")
    groups = [
        group
        for group in (given.values() if isinstance(given, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]
    if not groups:
        raise ModelError(
            "config_groups has no scheme for weights", where=where, hint="copy config.json again"
        )
    groups.sort(key=lambda group: group.get("targets") == ["Linear"])
    common = keys.get("format", "mixed-precision")
    schemes = [
        {**group["weights"], "format": group.get("format") if common == "mixed-precision" else common}
        for group in groups
    ]
    return schemes, any(group.get("input_activations") for group in groups)


def _packed(schemes: list[dict[str, Any]], activations: bool) -> ForeignFormat:
    """Return the format of packed integers; each module's tensors tell its width and its groups."""
    widths = {scheme["num_bits"] for scheme in schemes}
    symmetric = all(scheme.get("symmetric", True) for scheme in schemes)

    def shape(source: TensorSource, module: str) -> tuple[int, ...]:
        rows, columns = map(int, source.read(f"{module}.weight_shape").tolist())
        height, words = source.info(f"{module}.weight_packed").shape
        if rows != height or not 0 < columns <= words * 32:
            raise ValueError(f"weight_shape is {[rows, columns]}, weight_packed {[height, words]}")
        return rows, columns

    def dequantise(source: TensorSource, module: str) -> Tensor:
        rows, columns = shape(source, module)
        words = source.read(f"{module}.weight_packed")
        bits = words.shape[1] * 32 // columns
        if bits not in widths:
            raise ModelError(
                f"its weights have {bits} bits, and config.json has {', '.join(map(str, sorted(widths)))}",
                where=module,
                hint=OTHER_MODEL,
            )
        values = from_int32(words, bits)[:, :columns].float()  # [out, in]
        scales = source.read(f"{module}.weight_scale").float()  # [out, groups]
        stored = set(source.names())
        if not symmetric and f"{module}.weight_zero_point" in stored:
            packed = source.read(f"{module}.weight_zero_point")  # [out · bits / 32, groups]
            zeros = from_int32(packed.t(), bits)[:, :rows].t().float()  # [out, groups]
        else:
            zeros = torch.full_like(scales, float(1 << (bits - 1)))
        count = scales.shape[1]
        if f"{module}.weight_g_idx" in stored:
            group = source.read(f"{module}.weight_g_idx").long()
        else:
            group = torch.arange(columns) // (columns // count)
        return (values - zeros[:, group]) * scales[:, group]

    most = schemes[-1]
    bits, group_size = most["num_bits"], most.get("group_size") or -1
    others = "".join(f" and Int{other}" for other in sorted(widths - {bits}))
    return ForeignFormat(
        name=f"compressed-tensors Int{bits}{others}, {_groups(group_size)}",
        precision=f"ct-int{bits}",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activations=activations,
        suffixes=("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        shape=shape,
        dequantise=dequantise,
    )


def _eight_bits(scheme: Mapping[str, Any], activations: bool) -> ForeignFormat:
    """Return the format of weights that are stored as int8 or float8."""
    kind = "Int8" if scheme.get("type", "int") == "int" else "FP8"

    def dequantise(source: TensorSource, module: str) -> Tensor:
        values = source.read(f"{module}.weight")
        if values.dtype not in (*_FP8, torch.int8):
            raise ModelError(
                f"{module}.weight is {values.dtype}, no weight of 8 bits", where=module, hint=OTHER_MODEL
            )
        values, scales = values.float(), source.read(f"{module}.weight_scale").float()
        if f"{module}.weight_zero_point" in set(source.names()):
            values = _by_group(torch.sub, values, source.read(f"{module}.weight_zero_point").float())
        return _by_group(torch.mul, values, scales)

    group_size = scheme.get("group_size") or -1
    return ForeignFormat(
        name=f"compressed-tensors {kind}",
        precision=f"ct-{kind.lower()}",
        bits=8,
        group_size=group_size,
        symmetric=bool(scheme.get("symmetric", True)),
        integers=kind == "Int8",
        activations=activations,
        suffixes=("weight_scale", "weight", "weight_zero_point"),
        shape=_weight_shape,
        dequantise=dequantise,
    )


def _fp8(keys: Mapping[str, Any], where: Path) -> ForeignFormat:
    block = keys.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise UnsupportedError(
            f"FP8 with weight_block_size {block!r} is not read",
            where=where,
            hint="supported: blocks of two sizes, such as [128, 128]",
        )

    def dequantise(source: TensorSource, module: str) -> Tensor:
        values = source.read(f"{module}.weight")  # float8 [out, in]
        scales = source.read(f"{module}.weight_scale_inv").float()  # [out / rows, in / columns], rounded up
        rows, columns = values.shape
        wide = scales[torch.arange(rows) // block[0]][:, torch.arange(columns) // block[1]]
        return values.float() * wide

    return ForeignFormat(
        name=f"FP8, blocks of {block[0]} × {block[1]}",
        precision="fp8",
        bits=8,
        integers=False,
        activations=keys.get("activation_scheme") is not None,
        suffixes=("weight_scale_inv", "weight"),
        shape=_weight_shape,
        dequantise=dequantise,
    )


def _groups(size: int) -> str:
    return "whole rows" if size == -1 else f"groups of {size}"


def _weight_shape(source: TensorSource, module: str) -> tuple[int, ...]:
    return source.info(f"{module}.weight").shape


def _by_group(operation: Callable[[Tensor, Tensor], Tensor], values: Tensor, of_groups: Tensor) -> Tensor:
    """Apply an operation to values [out, in] and one number, one a row, or [out, groups]."""
    if of_groups.ndim < 2 or of_groups.shape[1] == 1:
        return operation(values, of_groups.reshape(-1, 1))
    grouped = values.view(len(values), of_groups.shape[1], -1)
    return operation(grouped, of_groups.unsqueeze(-1)).flatten(1)


def _integer(keys: Mapping[str, Any], key: str, where: Path) -> int:
    value = keys.get(key, keys.get({"bits": "w_bit", "group_size": "q_group_size"}[key]))
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 1 << 20:
        raise ModelError(
            f"quantization_config.{key} is {value!r}", where=where, hint="copy config.json again"
        )
    return value
