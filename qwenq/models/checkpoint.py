"""A checkpoint: a folder, its config, and a lazy source of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.models.source import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest.

    Attributes:
        folder: where the files lie.
        config: config.json, in the layout of the architecture that is run (Qwen v1 is seen as Qwen2).
        source: the tensors, under the names of that architecture.
    """

    folder: Path
    config: dict[str, Any]
    source: TensorSource

    def names(self) -> Iterable[str]:
        """All tensor names, in file order."""
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, from the header alone."""
        return self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype."""
        return self.source.read(name)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over names, shapes, dtypes and bytes of all weights, and the config."""
        raise NotImplementedError
