"""Weights for the decoder, out of a checkpoint: checked, dequantised where packed, fused, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwenq.errors import ModelError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.config import quantization_of
from qwenq.models.gptq_format import DequantisedSource, QuantConfig, validate_quantised
from qwenq.models.integrity import check_finite
from qwenq.models.shapes import ModelShape
from qwenq.models.source import TensorSource
from qwenq.runtime.linear import Dense, Kernel

_HINT = "config.json and the weights are not of one model, or a shard is missing: copy the folder again"


def readable(checkpoint: Checkpoint, dtype: torch.dtype) -> TensorSource:
    """The checkpoint's tensors as plain weights; packed ones are dequantised to ``dtype`` when read.

    Raises:
        ModelError: a quantised module is incomplete or contradicts its settings.
        UnsupportedError: quantised by another method than GPTQ.
    """
    if quantization_of(checkpoint.config) is None:
        return checkpoint.source
    quant = QuantConfig.read(checkpoint.config)
    validate_quantised(checkpoint.source, quant)
    return DequantisedSource(checkpoint.source, quant, dtype)


def check_tensors(source: TensorSource, shape: ModelShape, tied: bool) -> None:
    """Every tensor that the config asks for is there in its shape, and the blocks hold no other.

    Raises:
        ModelError: names the first tensor that is missing, surplus, or of another shape.
    """
    names = set(source.names())
    expected = {tensor.name: tensor.shape for tensor in shape.tensors()}
    if not tied:
        expected["lm_head.weight"] = (shape.vocab, shape.hidden)
    else:
        expected.pop("lm_head.weight", None)
    for name, wanted in expected.items():
        if name not in names:
            raise ModelError(f"the tensor {name} is missing", where=name, hint=_HINT)
        if (found := source.info(name).shape) != wanted:
            raise ModelError(
                f"{name} is {list(found)}, but config.json makes it {list(wanted)}", where=name, hint=_HINT
            )
    for name in sorted(names - expected.keys()):
        if name.startswith("model.layers.") and not name.endswith(".rotary_emb.inv_freq"):
            raise ModelError(f"{name} has no place in this architecture", where=name, hint=_HINT)


class Weights:
    """Reads a checkpoint's tensors onto a device, in one dtype.

    Raises:
        ModelError: a tensor is missing, surplus, or of another shape than config.json says.
        CorruptFileError: on reading, a tensor with NaN or Inf.
    """

    def __init__(
        self, checkpoint: Checkpoint, shape: ModelShape, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._source = readable(checkpoint, dtype)
        self._folder, self._device, self._dtype = checkpoint.folder, device, dtype
        self._packed = {name for name in checkpoint.names() if name.endswith(".qweight")}
        self._names = set(self._source.names())
        check_tensors(self._source, shape, checkpoint.tied)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._read(name).to(self._device, self._dtype)

    def linear(self, *modules: str) -> Kernel:
        """The modules as one linear layer, their outputs one after the other."""
        weight = self._stacked([f"{module}.weight" for module in modules])
        biases = [f"{module}.bias" for module in modules]
        bias = self._stacked(biases) if biases[0] in self._names else None
        packed = f"{modules[0]}.qweight" in self._packed
        return Dense(weight, bias, "dequantise" if packed else "dense")

    def _stacked(self, names: Sequence[str]) -> Tensor:
        if len(names) == 1:
            return self.tensor(names[0])
        return torch.cat([self._read(name).to(self._dtype) for name in names]).to(self._device)

    def _read(self, name: str) -> Tensor:
        return check_finite(name, self._source.read(name), self._folder)
