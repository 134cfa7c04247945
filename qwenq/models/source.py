"""Where tensors come from: anything that lists names and reads one tensor at a time.

A checkpoint is a config and a source. Sources nest: a safetensors folder, the Qwen2 view of a Qwen v1
folder, the dequantised view of a GPTQ folder all look the same to whoever reads from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor, without its bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorSource(Protocol):
    """Lazy access to named tensors. ``read`` raises ``ModelError`` for an unknown name."""

    def names(self) -> Iterable[str]:
        """All tensor names, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype from the header alone."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype."""
        ...


@runtime_checkable
class StoredInFiles(Protocol):
    """A source whose tensors are what some files hold: as long as those stay the same, so do they."""

    @property
    def files(self) -> Sequence[Path]:
        """All of them; empty where that is not known."""
        ...


@runtime_checkable
class MadeFromFacts(Protocol):
    """A source whose tensors follow from something short: it need not be read to be known."""

    @property
    def decided_by(self) -> Mapping[str, Any]:
        """All that the values follow from, as JSON can hold it."""
        ...


@runtime_checkable
class ReadsParts(Protocol):
    """A source that reads a part of a tensor without the rest of it."""

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """``read(name)[index]``: one step along the first dimension."""
        ...
