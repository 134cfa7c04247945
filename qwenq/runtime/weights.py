"""Read a checkpoint's weights for the engines: checked, fused, in the chosen kernel, on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.gptq_format import (
    DequantisedSource,
    PackedLinear,
    check_g_idx,
    check_symmetric_zeros,
    packed_modules,
    read_packed,
)
from qwenq.models.integrity import check_finite
from qwenq.models.shapes import ModelShape
from qwenq.models.source import OTHER_MODEL, TensorSource, require_tensors
from qwenq.runtime.linear import Dense, Linear, LinearShape, Requirements, SideBySide, stacked
from qwenq.runtime.memory import require
from qwenq.runtime.quantised_linear import choose


def _quantised_layers(source: TensorSource, quant: QuantConfig) -> tuple[LinearShape, ...]:
    """Return the sizes of every quantised module, in file order; check headers against the settings."""
    layers, names = [], set(source.names())
    for module in packed_modules(source, quant):
        own = quant.of(module)
        words, out_features = source.info(f"{module}.qweight").shape
        in_features = words * 32 // own.bits
        even = own.group_size == -1 or in_features % own.group_size == 0
        if even and f"{module}.g_idx" in names:
            g_idx = source.read(f"{module}.g_idx")
            check_g_idx(g_idx, module, quant)
            counts = torch.bincount(g_idx, minlength=own.groups(in_features))
            even = bool((counts == counts[0]).all())
        layers.append(LinearShape(module, in_features, out_features, even))
    return tuple(layers)


def _requirements(
    layers: Sequence[LinearShape], quant: QuantConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Requirements]:
    """Return what each module requires: one object for all with the same bits and group size."""
    alike: dict[tuple[int, int], list[LinearShape]] = {}
    for layer in layers:
        own = quant.of(layer.name)
        alike.setdefault((own.bits, own.group_size), []).append(layer)
    return {
        layer.name: need
        for (bits, size), some in alike.items()
        for need in [Requirements(bits, size, quant.checkpoint_format, device, dtype, tuple(some))]
        for layer in some
    }


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read yet, with the interface of safetensors' slices that transformers reads."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def get_shape(self) -> list[int]:
        """Return the shape, before anything is read."""
        return list(self.shape)

    def __getitem__(self, part: Any) -> Tensor:
        return self.read()[part].clone()  # the rest of it is freed


@dataclass(frozen=True, eq=False)
class Rows:
    """Outputs of a linear module, int64 [chosen], in this order; None: all, as they come."""

    module: str
    order: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return these rows of the module's weight or bias."""
        return tensor if self.order is None else tensor[self.order]


class Weights:
    """Reads a checkpoint's tensors onto a device, in one dtype; packed linears become the chosen kernel.

    Attributes:
        kernel: name of what runs the linear layers.
        notes: faster kernels that are not used, and why.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        kernel: str = "auto",
        processes: int = 1,
    ) -> None:
        self._source = self._packed_source = checkpoint.source
        self._folder, self._device, self._dtype = checkpoint.folder, device, dtype
        self._processes = processes
        self.kernel, self.notes = "dense", tuple[str, ...]()
        self.quantised: frozenset[str] = frozenset()
        if not is_quantised(checkpoint.config):
            if kernel != "auto":
                raise UnsupportedError(
                    f"the kernel {kernel} multiplies packed integers, and this model is not quantised",
                    where="--kernel",
                    hint="leave --kernel out, or quantise the model first",
                )
            self._names = set(self._source.names())
            self._require_memory()
            return
        quant = self._quant = QuantConfig.read(checkpoint.config, checkpoint.folder / "config.json")
        self._stored = frozenset(checkpoint.source.names())
        layers = _quantised_layers(checkpoint.source, quant)
        self._source = DequantisedSource(checkpoint.source, quant, dtype, checkpoint.config)
        self._names = set(self._source.names())
        self._needs = _requirements(layers, quant, device, dtype)
        choices = {need: choose(kernel, need) for need in dict.fromkeys(self._needs.values())}
        self._kernels = {need: chosen for need, (chosen, _) in choices.items()}
        self.kernel = " + ".join(dict.fromkeys(chosen.name for chosen in self._kernels.values()))
        self.notes = tuple(dict.fromkeys(note for _, notices in choices.values() for note in notices))
        self.quantised = frozenset(layer.name for layer in layers)
        self._require_memory()

    def _require_memory(self) -> None:
        """Refuse a model whose weights alone are more than what is free."""
        dense = self.kernel == "dequantise" or not self.quantised
        needed = 0
        for name in self._names:
            module, size = name.removesuffix(".weight"), float(self._dtype.itemsize)
            if module in self.quantised and self._kernels[self._needs[module]].name != "dequantise":
                size = self._needs[module].bits / 8
            needed += int(math.prod(self._source.info(name).shape) * size)
        form = str(self._dtype).removeprefix("torch.")
        if not dense:
            widths = sorted({need.bits for need in self._needs.values()})
            form = f"{' and '.join(map(str, widths))} bits"
        hint = "use --dtype bfloat16, a quantised model, a smaller one, or another --device"
        require(needed // self._processes, self._device, f"the model's weights in {form}", hint)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors; a quantised weight has that of the weight it stands for."""
        return frozenset(self._names)

    def check(self, shape: ModelShape, tied: bool) -> None:
        """Check that every tensor of the config is there in its shape, and that the blocks hold no other."""
        expected = shape.tensors()
        expected.pop("lm_head.weight", None)
        if not tied:
            expected["lm_head.weight"] = (shape.vocab, shape.hidden)
        require_tensors(self._source, expected, self._folder)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor onto the device, in the dtype of the activations or in another."""
        return self._read(name).to(self._device, dtype or self._dtype)

    def plain(self) -> dict[str, Tensor]:
        """Return all tensors by name; in the place of a packed weight, one number expanded to its shape."""
        packed = {f"{module}.weight" for module in self.quantised}
        placeholder = torch.zeros((), dtype=self._dtype)
        return {
            name: placeholder.expand(self._source.info(name).shape) if name in packed else self._read(name)
            for name in self._names
        }

    def lazy(self) -> dict[str, LazyTensor]:
        """Return all plain tensors by name, each read when it is used: the whole model is never in memory."""
        return {
            name: LazyTensor(self._source.info(name).shape, partial(self._read, name)) for name in self._names
        }

    def linear(self, *modules: str | Rows) -> Linear:
        """Return modules, or rows of them, as one linear layer, their outputs one after the other."""
        parts = [Rows(part) if isinstance(part, str) else part for part in modules]
        packed = [part.module for part in parts if part.module in self.quantised]
        if not packed:
            return Dense(self._stacked("weight", parts), self._bias(parts))
        needs = {self._needs[module] for module in packed}
        if len(packed) == len(parts) and len(needs) == 1:
            (need,) = needs
            if (whole := stacked([self._packed(part) for part in parts])) is not None:
                return self._kernels[need](whole, need, self._bias(parts))
        return SideBySide([self.linear(part) for part in parts])

    def _packed(self, part: Rows) -> PackedLinear:
        module = part.module
        packed = read_packed(self._packed_source, module, self._quant, self._stored)
        # Values are checked here, where they are read anyway.
        check_finite(f"{module}.scales", packed.scales, self._folder)
        if not bool(packed.scales.any()):
            raise CorruptFileError(
                f"{module}.scales holds nothing but zeros",
                where=self._folder,
                hint="the file has a hole: compare its checksum with the publisher's, copy it again",
            )
        check_g_idx(packed.g_idx, module, self._quant)
        if self._quant.of(module).sym:
            check_symmetric_zeros(packed.qzeros, module, self._quant)
        if part.order is None:
            return packed
        return packed.outputs(part.order, self._quant.of(module).bits, self._quant.checkpoint_format)

    def _bias(self, parts: Sequence[Rows]) -> Tensor | None:
        return self._stacked("bias", parts) if f"{parts[0].module}.bias" in self._names else None

    def _stacked(self, kind: str, parts: Sequence[Rows]) -> Tensor:
        each = [part.of(self._read(f"{part.module}.{kind}").to(self._dtype)) for part in parts]
        return (each[0] if len(each) == 1 else torch.cat(each)).to(self._device)

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        if not tensor.is_floating_point():
            raise ModelError(
                f"{name} is {tensor.dtype}, and a weight is a float", where=name, hint=OTHER_MODEL
            )
        return check_finite(name, tensor, self._folder)
