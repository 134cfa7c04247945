"""Round a model to 4 or 8 bits as it is read, to measure speed and memory without quantising it first.

How fast integers are multiplied does not depend on which integers they are, so each module is rounded to
nearest. Its answers are worse than those of a GPTQ model. Of a model with random weights the integers
themselves are drawn: nothing is rounded, and on a GPU nothing is moved there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import LAYER_PARTS, QuantConfig
from qwenq.models.gptq_format import PackedLinear, pack, pack_zeros, trivial_g_idx
from qwenq.models.random_weights import RandomSource, tensor_seed
from qwenq.models.shapes import ModelShape
from qwenq.models.source import TensorInfo, TensorSource


def group_size_for(shape: ModelShape) -> int:
    """Return the group size of ``auto``; -1, whole rows, where no size divides them."""
    try:
        return shape.auto_group_size()
    except UsageError:
        return -1


def rounded(checkpoint: Checkpoint, bits: int) -> Checkpoint:
    """Return the checkpoint with the linears of its blocks rounded when read: symmetric, AutoGPTQ's layout.

    Linear attention has 8 bits, as after ``qwenq quantize``.
    """
    shape = ModelShape.from_config(checkpoint.config)
    group_size = group_size_for(shape)
    shape.quantised_bytes(bits, group_size)  # raises where the sizes do not fit
    own = {linear.name: linear.bits(bits) for linear in shape.linears() if linear.bits(bits) != bits}
    dynamic = {rf"+:.*\.{re.escape(name)}$": {"bits": width} for name, width in own.items()}
    quant = QuantConfig(bits=bits, group_size=group_size, dynamic=dynamic)
    config = {**checkpoint.config, "quantization_config": quant.to_config_json()}
    modules = {
        f"model.layers.{layer}.{name}": replace(quant, bits=linear.bits(bits), dynamic={})
        for block in shape.blocks
        for linear in block.linears
        for layer in block.layers
        for name in linear.names()
    }
    source = checkpoint.source
    if isinstance(source, RandomSource):
        return replace(checkpoint, config=config, source=DrawnSource(source, modules))
    return replace(checkpoint, config=config, source=RoundedSource(source, modules))


class RoundedSource:
    """A plain source that reads like a GPTQ folder."""

    def __init__(self, source: TensorSource, modules: dict[str, QuantConfig]) -> None:
        self._source, self._modules = source, modules
        self._held: tuple[str, PackedLinear] | None = None  # the module that is being read

    def names(self) -> Iterable[str]:
        """Yield all tensor names; four in place of each rounded weight."""
        for name in self._source.names():
            module = name.removesuffix(".weight")
            if module in self._modules:
                yield from (f"{module}.{part}" for part in LAYER_PARTS)
            else:
                yield name

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype, without rounding anything."""
        module, _, part = name.rpartition(".")
        if module not in self._modules or part not in LAYER_PARTS:
            return self._source.info(name)
        shapes = self._modules[module].packed_shapes(*self._source.info(f"{module}.weight").shape)
        return TensorInfo(shapes[part], torch.float16 if part == "scales" else torch.int32)

    def read(self, name: str) -> Tensor:
        """Return one tensor, on the CPU."""
        module, _, part = name.rpartition(".")
        if module not in self._modules or part not in LAYER_PARTS:
            return self._source.read(name)
        quant = self._modules[module]
        if part == "g_idx":
            return trivial_g_idx(self.info(name).shape[0], quant.group_size)
        if part == "qzeros":  # of a symmetric model: known without a look at the weights
            rows, columns = self._source.info(f"{module}.weight").shape
            groups, middle = quant.groups(columns), 1 << (quant.bits - 1)
            return pack_zeros(torch.full((rows, groups), middle, dtype=torch.uint8), quant.bits)
        if self._held is None or self._held[0] != module:
            self._held = (module, _pack(self._source.read(f"{module}.weight"), quant))
        found: Tensor = getattr(self._held[1], part)
        return found


class DrawnSource(RoundedSource):
    """Packed weights that were never anything else: words of random bits, scales of either sign.

    The integers are uniform over all their values, and scales give the weights the standard deviation of the
    random model. Tensors are on the device of the random source.
    """

    def __init__(self, source: RandomSource, modules: dict[str, QuantConfig]) -> None:
        super().__init__(source, modules)
        self._random = source

    def read(self, name: str) -> Tensor:
        """Draw one tensor; it follows from the seed and its name alone."""
        module, _, part = name.rpartition(".")
        device = self._random.device
        if module not in self._modules or part not in ("qweight", "scales"):
            return super().read(name).to(device)
        info = self.info(name)
        generator = torch.Generator(device).manual_seed(tensor_seed(self._random.seed, name))
        if part == "qweight":
            words = torch.empty(info.shape, dtype=torch.int32, device=device)
            return words.random_(-(2**31), 2**31 - 1, generator=generator)
        levels = 2 ** self._modules[module].bits  # a uniform integer deviates by levels / sqrt(12)
        signs = torch.empty(info.shape, device=device).bernoulli_(0.5, generator=generator) * 2 - 1
        scales: Tensor = (signs * (self._random.std * 12**0.5 / levels)).to(info.dtype)
        return scales


def _pack(weight: Tensor, quant: QuantConfig) -> PackedLinear:
    """Pack floats [out, in] with scale = largest of a group / (2^(bits-1) - 1)."""
    bits, middle = quant.bits, 1 << (quant.bits - 1)
    out, width = weight.shape
    grouped = weight.float().reshape(out, quant.groups(width), -1)  # [out, groups, group_size]
    smallest = torch.finfo(torch.float16).smallest_normal
    scales = (grouped.abs().amax(-1) / (middle - 1)).clamp_min(smallest).half().float()
    integers = (grouped / scales[..., None]).round_().add_(middle).clamp_(0, 2 * middle - 1)
    integers = integers.reshape(out, width).to(torch.uint8)  # [out, in]
    zeros = torch.full_like(scales, middle, dtype=torch.uint8)
    return pack(integers.cpu(), scales.cpu(), zeros.cpu(), bits)
