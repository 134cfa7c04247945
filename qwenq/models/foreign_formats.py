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
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.source import TensorInfo, TensorSource

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of a word that holds column 0, 1, … of its eight."""
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ForeignFormat:
    """How the weights of a checkpoint were quantised by another tool.

    Attributes:
        name: for people, such as "AWQ Int4, groups of 128".
        precision: for rows and tables, such as ``awq-int4``.
        bits: of a weight.
        suffixes: of the tensors that stand for a weight; the first tells that a module is quantised.
        shape: (source, module) → [out, in] of its weight, from headers.
        dequantise: (source, module) → the weight in float32.
    """

    name: str
    precision: str
    bits: int
    suffixes: tuple[str, ...]
    shape: Callable[[TensorSource, str], tuple[int, ...]]
    dequantise: Callable[[TensorSource, str], Tensor]


class ForeignSource:
    """A checkpoint of another tool that reads like a plain one: ``X.weight`` in place of what stands for it.

    Args:
        stored: the tensors under their names in the files.
        found: their format.
        dtype: of the weights that are shown.
    """

    def __init__(self, stored: TensorSource, found: ForeignFormat, dtype: torch.dtype) -> None:
        self._stored, self._format, self._dtype = stored, found, dtype
        first = f".{found.suffixes[0]}"
        self._modules = {
            f"{name.removesuffix(first)}.weight": name.removesuffix(first)
            for name in stored.names()
            if name.endswith(first)
        }
        parts = {f"{m}.{suffix}": f"{m}.weight" for m in self._modules.values() for suffix in found.suffixes}
        self._names = list(dict.fromkeys(parts.get(name, name) for name in stored.names()))

    @property
    def format(self) -> ForeignFormat:
        """Return how the weights were quantised."""
        return self._format

    @property
    def stored(self) -> TensorSource:
        """Return the tensors as they lie in the files."""
        return self._stored

    @property
    def modules(self) -> list[str]:
        """Return the names of the quantised modules."""
        return list(self._modules.values())

    def names(self) -> Iterable[str]:
        """Return all names, in file order."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype, without dequantising."""
        if name not in self._modules:
            return self._stored.info(name)
        return TensorInfo(self._format.shape(self._stored, self._modules[name]), self._dtype)

    def read(self, name: str) -> Tensor:
        """Return a tensor; a quantised weight as [out, in], computed in float32 and rounded once.

        Raises:
            ModelError: tensors of a module are missing or their shapes do not fit each other.
        """
        if name not in self._modules:
            return self._stored.read(name)
        module = self._modules[name]
        try:
            return self._format.dequantise(self._stored, module).to(self._dtype)
        except RuntimeError as error:  # shapes that cannot be multiplied or reshaped
            raise ModelError(
                f"the tensors of this module do not fit each other: {error}",
                where=module,
                hint="config.json and the weights are not of one model: copy the folder again",
            ) from error


def foreign_format(config: Mapping[str, Any], where: Path) -> ForeignFormat | None:
    """Return the format of another tool that config.json names; None: plain weights or GPTQ.

    Raises:
        UnsupportedError: a method or a variant that is not read here; names it.
        ModelError: settings that make no sense.
    """
    keys = config.get("quantization_config")
    if not isinstance(keys, Mapping):
        return None
    method = str(keys.get("quant_method", "gptq")).lower()
    readers = {"awq": _awq, "compressed-tensors": _compressed_tensors, "fp8": _fp8}
    if method in readers:
        return readers[method](keys, where)
    if method in ("gptq", "auto-round", "autoround"):
        return None
    raise UnsupportedError(
        f"the model is quantised with {method[:40]!r}, which is not read",
        where=where,
        hint=f"read are GPTQ, AutoRound in GPTQ's layout, and {', '.join(readers)}",
    )


def open_foreign(config: Mapping[str, Any], source: TensorSource, where: Path) -> ForeignSource | None:
    """Return a checkpoint of another tool that reads like a plain one; None: plain weights or GPTQ.

    Weights are shown in float32, which holds every product of an integer and a scale exactly.

    Args:
        config: config.json.
        source: the tensors under their names in the files.
        where: for messages.

    Raises:
        UnsupportedError, ModelError: see ``foreign_format``; or no tensor of that format is there.
    """
    found = foreign_format(config, where)
    if found is None:
        return None
    opened = ForeignSource(source, found, torch.float32)
    if not opened.modules:
        raise ModelError(
            f"config.json names {found.name}, and no tensor has that form",
            where=where,
            hint="config.json and the weights are not of one model: copy the folder again",
        )
    return opened


def unpack_int32(words: Tensor, bits: int, count: int) -> Tensor:
    """Return integers of ``bits`` from int32 words, uint8 [rows, count]; the lowest bits come first.

    Args:
        words: int32 [rows, ceil(count · bits / 32)]; an integer may lie across two words.
        bits: 1 to 8.
        count: integers of a row.
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        whole = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)  # [rows, words, 32 / bits]
        return whole.to(torch.uint8).reshape(len(words), -1)[:, :count]
    shifts = torch.arange(32, dtype=torch.int32)
    stream = (words.unsqueeze(-1) >> shifts) & 1  # [rows, words, 32]
    stream = stream.reshape(len(words), -1)[:, : count * bits].reshape(len(words), count, bits)
    return (stream << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32).to(torch.uint8)


def _awq(keys: Mapping[str, Any], where: Path) -> ForeignFormat:
    bits, group = _integer(keys, "bits", where), _integer(keys, "group_size", where)
    version = str(keys.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise UnsupportedError(
            f"AWQ of {bits} bits in its {version} layout is not read",
            where=where,
            hint="read is the layout gemm of 4 bits, which AutoAWQ and llm-compressor's exports have",
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

    name = f"AWQ Int4, {'one scale a row' if group == -1 else f'groups of {group}'}"
    return ForeignFormat(name, "awq-int4", bits, ("qweight", "qzeros", "scales"), shape, dequantise)


def _awq_nibbles(words: Tensor) -> Tensor:
    """Return uint8 [rows, 8 · words] in the order of the columns."""
    shifts = torch.tensor([4 * nibble for nibble in _AWQ_ORDER], dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(1)


def _compressed_tensors(keys: Mapping[str, Any], where: Path) -> ForeignFormat:
    given = keys.get("config_groups")
    groups = (
        [group for group in given.values() if isinstance(group, Mapping)]
        if isinstance(given, Mapping)
        else []
    )
    schemes = [group["weights"] for group in groups if isinstance(group.get("weights"), Mapping)]
    if not schemes:
        raise ModelError(
            "config_groups has no scheme for weights", where=where, hint="copy config.json again"
        )
    settings = {(s.get("num_bits"), s.get("type"), bool(s.get("symmetric", True))) for s in schemes}
    layout = str(keys.get("format", groups[0].get("format")))
    if len(settings) > 1:
        raise UnsupportedError(
            "several schemes for weights in one checkpoint of compressed-tensors are not read",
            where=where,
            hint="start from the model that was quantised",
        )
    ((bits, kind, symmetric),) = settings
    if not isinstance(bits, int) or kind not in ("int", "float"):
        raise ModelError(f"weights of {bits!r} bits, {kind!r}", where=where, hint="copy config.json again")
    if layout == "pack-quantized" and kind == "int" and 1 <= bits <= 8:
        return _packed(bits, symmetric)
    if layout in ("int-quantized", "float-quantized", "naive-quantized") and bits == 8:
        return _eight_bits("Int8" if kind == "int" else "FP8")
    raise UnsupportedError(
        f"compressed-tensors' format {layout!r} of {bits} bits is not read",
        where=where,
        hint="read are pack-quantized, int-quantized and float-quantized",
    )


def _packed(bits: int, symmetric: bool) -> ForeignFormat:
    def shape(source: TensorSource, module: str) -> tuple[int, ...]:
        rows, columns = source.read(f"{module}.weight_shape").tolist()
        return int(rows), int(columns)

    def dequantise(source: TensorSource, module: str) -> Tensor:
        rows, columns = shape(source, module)
        values = unpack_int32(source.read(f"{module}.weight_packed"), bits, columns).float()  # [out, in]
        scales = source.read(f"{module}.weight_scale").float()  # [out, groups]
        stored = set(source.names())
        if symmetric:
            zeros = torch.full_like(scales, float(1 << (bits - 1)))
        else:
            packed = source.read(f"{module}.weight_zero_point")  # [out · bits / 32, groups]
            zeros = unpack_int32(packed.t().contiguous(), bits, rows).t().float()  # [out, groups]
        count = scales.shape[1]
        if f"{module}.weight_g_idx" in stored:
            group = source.read(f"{module}.weight_g_idx").long()
        else:
            group = torch.arange(columns) // (columns // count)
        return (values - zeros[:, group]) * scales[:, group]

    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    return ForeignFormat(f"compressed-tensors Int{bits}", f"ct-int{bits}", bits, suffixes, shape, dequantise)


def _eight_bits(kind: str) -> ForeignFormat:
    def shape(source: TensorSource, module: str) -> tuple[int, ...]:
        return source.info(f"{module}.weight").shape

    def dequantise(source: TensorSource, module: str) -> Tensor:
        values = source.read(f"{module}.weight")
        if values.dtype not in (*_FP8, torch.int8):
            raise ModelError(
                f"{module}.weight is {values.dtype}, no weight of 8 bits",
                where=module,
                hint="config.json and the weights are not of one model: copy the folder again",
            )
        scales = source.read(f"{module}.weight_scale").float()
        stored = set(source.names())
        if f"{module}.weight_zero_point" in stored:
            offset = source.read(f"{module}.weight_zero_point").float()
            return _by_block(values.float(), scales, offset)
        return _by_block(values.float(), scales, None)

    suffixes = ("weight_scale", "weight", "weight_zero_point")
    return ForeignFormat(f"compressed-tensors {kind}", f"ct-{kind.lower()}", 8, suffixes, shape, dequantise)


def _fp8(keys: Mapping[str, Any], where: Path) -> ForeignFormat:
    block = keys.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise UnsupportedError(
            f"FP8 with weight_block_size {block!r} is not read",
            where=where,
            hint="read are blocks of two sizes, such as [128, 128]",
        )

    def shape(source: TensorSource, module: str) -> tuple[int, ...]:
        return source.info(f"{module}.weight").shape

    def dequantise(source: TensorSource, module: str) -> Tensor:
        values = source.read(f"{module}.weight")  # float8 [out, in]
        scales = source.read(f"{module}.weight_scale_inv").float()  # [out / rows, in / columns], rounded up
        rows, columns = values.shape
        wide = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        return values.float() * wide

    suffixes = ("weight_scale_inv", "weight")
    return ForeignFormat(f"FP8, blocks of {block[0]} × {block[1]}", "fp8", 8, suffixes, shape, dequantise)


def _by_block(values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Return (values − zeros) · scales, where scales are one, one a row, or [out, groups]."""
    rows, columns = values.shape
    if scales.ndim < 2 or scales.shape[1] == 1:
        by_row = scales.reshape(-1, 1)
        return ((values - zeros.reshape(-1, 1)) if zeros is not None else values) * by_row
    size = columns // scales.shape[1]
    grouped = values.view(rows, scales.shape[1], size)
    if zeros is not None:
        grouped = grouped - zeros.unsqueeze(-1)
    return (grouped * scales.unsqueeze(-1)).flatten(1)


def _integer(keys: Mapping[str, Any], key: str, where: Path) -> int:
    value = keys.get(key, keys.get({"bits": "w_bit", "group_size": "q_group_size"}[key]))
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 1 << 20:
        raise ModelError(
            f"quantization_config.{key} is {value!r}", where=where, hint="copy config.json again"
        )
    return value
