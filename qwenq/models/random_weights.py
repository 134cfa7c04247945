"""Make models with seeded random weights: for speed and memory, where real weights cannot be had.

Every tensor depends on the seed and its own name alone, so that a checkpoint can be written, or read, one
tensor at a time in any order. Norms are ones; everything else is normal with the config's
``initializer_range``. config.json carries ``qwenq_random_weights``, and commands about accuracy refuse it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenq.errors import ModelError, UsageError
from qwenq.models import catalogue
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.folders import local_path, new_folder
from qwenq.models.quantized_folder import require_free
from qwenq.models.safetensors_files import write_shards
from qwenq.models.shapes import ModelShape
from qwenq.models.source import TensorInfo
from qwenq.storage import atomic_write_json

RANDOM_KEY = "qwenq_random_weights"
"""Key of config.json that marks such a model: ``{"seed": …}``."""

_STREAM = 1
"""Counts up when the same seed would draw other values; reports and resumed runs name models by it."""
_CHUNK = 1 << 20  # elements drawn at once, whatever the tensor
_DTYPES = ("bfloat16", "float16", "float32")
_BITS_OF = {2: torch.int16, 4: torch.int32}


def is_random(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json belongs to a model with random weights."""
    return RANDOM_KEY in config


def refuse_random(config: dict[str, Any], what: str) -> None:
    """Raise where ``what`` (such as "accuracy") would be measured on random weights."""
    if is_random(config):
        raise UsageError(
            f"this model has random weights: {what} would mean nothing",
            where=f"config.json: {RANDOM_KEY}",
            hint="name a model with real weights; random ones serve speed and memory only",
        )


class RandomSource:
    """The tensors of a model that exists nowhere: each is made when it is read.

    The same seed, name and device type give the same values; on another device they differ.
    """

    def __init__(
        self,
        shape: ModelShape,
        seed: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        std: float = 0.02,
        device: str | torch.device = "cpu",
    ) -> None:
        self._infos = {name: TensorInfo(size, dtype) for name, size in shape.tensors().items()}
        self.seed, self.std, self.device = seed, std, torch.device(device)
        self.decided_by = {"stream": _STREAM, "seed": seed, "std": std, "device": self.device.type}

    def names(self) -> Iterable[str]:
        """Return all tensor names, in layer order."""
        return self._infos.keys()

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a tensor, which is not made for that."""
        if name not in self._infos:
            raise ModelError(f"this model has no tensor {name}", where=name)
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """Make the tensor, on the device of this source."""
        info = self.info(name)
        if name.endswith("norm.weight"):
            return torch.ones(info.shape, dtype=info.dtype, device=self.device)
        seed = tensor_seed(self.seed, name)
        if self.device.type == "cpu":
            return _normal_on_cpu(info, seed, self.std)
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.empty(info.shape, dtype=info.dtype, device=self.device).normal_(
            0.0, self.std, generator=generator
        )


def _normal_on_cpu(info: TensorInfo, seed: int, std: float) -> torch.Tensor:
    """Draw normal values by inverse transform of 16 random bits each: four for one 64-bit word.

    Chunks have streams of their own and are made on all cores, so that a large model is written about as fast
    as the disk takes it; torch's generator is serial. numpy promises that SFC64's streams never change.
    """
    quantiles = _quantiles(std, info.dtype).numpy()
    flat = torch.empty(info.numel, dtype=info.dtype)
    target = flat.view(_BITS_OF[info.dtype.itemsize]).numpy()

    def fill(start: int) -> None:
        part = target[start : start + _CHUNK]
        words = np.random.SFC64([seed, start // _CHUNK]).random_raw(-(-part.size // 4))
        part[:] = quantiles[words.astype("<u8", copy=False).view(np.uint16)[: part.size]]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, info.numel, _CHUNK)))
    return flat.reshape(info.shape)


@cache
def _quantiles(std: float, dtype: torch.dtype) -> torch.Tensor:
    """Return 65536 equally likely values of a normal distribution, ascending, as the bits of ``dtype``."""
    probabilities = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    values: torch.Tensor = torch.special.ndtri(probabilities)
    return values.mul_(std).to(dtype).view(_BITS_OF[dtype.itemsize])


def tensor_seed(seed: int, name: str) -> int:
    """Return 63 bits that depend on the seed and the tensor's name, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_checkpoint(
    name_or_config: str | dict[str, Any],
    seed: int = 0,
    dtype: str = "bfloat16",
    *,
    layers: int | None = None,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Make a checkpoint that lies on no disk, of a catalogue name or a config.json; its config is marked.

    ``layers`` overrides the depth.
    """
    config = catalogue.config_for(name_or_config) if isinstance(name_or_config, str) else dict(name_or_config)
    if dtype not in _DTYPES:
        raise UsageError(f"{dtype!r} is not a dtype for weights", hint=f"use {', '.join(_DTYPES)}")
    if layers is not None:
        if layers < 1:
            raise UsageError(f"a model of {layers} layers cannot be made", hint="give at least 1")
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)
    config |= {"torch_dtype": dtype, RANDOM_KEY: {"seed": seed}}
    std = config.get("initializer_range", 0.02)
    shape = ModelShape.from_config(config)
    source = RandomSource(shape, seed, getattr(torch, dtype), std=std, device=device)
    return Checkpoint(Path("random-weights"), config, source, on_disk=False)


def write_random_checkpoint(
    name_or_config: str | dict[str, Any],
    folder: Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    *,
    layers: int | None = None,
    max_bytes: int = 5_000_000_000,
) -> Checkpoint:
    """Write a model with random weights to a new folder, one tensor in memory at a time.

    ``name_or_config`` is a catalogue name or a config.json, whose depth ``layers`` overrides; a file holds
    ``max_bytes`` of tensors.
    """
    require_free(local_path(folder, "the folder"), "DST")
    made = random_checkpoint(name_or_config, seed, dtype, layers=layers)
    entries = [(name, made.info(name)) for name in made.names()]
    with new_folder(folder) as new:
        write_shards(new, entries, made.read, max_bytes)
        atomic_write_json(new / "config.json", made.config)
    return open_checkpoint(folder)
