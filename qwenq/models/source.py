"""Define where tensors come from, and check them against those that a config asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qwenq.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

OTHER_MODEL = "config.json and the weights are not of one model, or a shard is missing: copy the folder again"
"""What to do where tensors and config.json disagree."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, from a file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Return number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class TensorSource(Protocol):
    """Lazy access to named tensors. ``read`` raises ``ModelError`` for an unknown name."""

    def names(self) -> Iterable[str]:
        """Return all tensor names, in file order."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header alone."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU, in its stored dtype."""
        ...


@runtime_checkable
class StoredInFiles(Protocol):
    """A source whose tensors are what some files hold: as long as those stay the same, so do they."""

    @property
    def files(self) -> Sequence[Path]:
        """Return all of them; empty where that is not known."""
        ...


@runtime_checkable
class MadeFromFacts(Protocol):
    """A source whose tensors follow from something short: it need not be read to be known."""

    @property
    def decided_by(self) -> Mapping[str, Any]:
        """Return all that the values follow from, as JSON can hold it."""
        ...


@runtime_checkable
class ReadsParts(Protocol):
    """A source that reads a part of a tensor without the rest of it."""

    def read_part(self, name: str, index: int) -> torch.Tensor:
        """Return ``read(name)[index]``: one step along the first dimension."""
        ...


def require_tensors(
    source: TensorSource, expected: Mapping[str, Sequence[int]], where: str | Path | None
) -> None:
    """Check that a source has the tensors that its config.json asks for, and no others in its blocks.

    Only names and headers are read.

    Args:
        source: of the tensors. Biases of zeros that it hides from its names, but reads, count as there.
        expected: shapes by name.
        where: the model's folder.

    Raises:
        ModelError: names the first tensor that is missing, of another shape, or unknown to the architecture.
    """
    names = set(source.names())
    for name, shape in expected.items():
        try:
            found = source.info(name).shape if name in names or name.endswith(".bias") else None
        except (ModelError, KeyError):
            found = None
        require_shape(name, found, shape, where)
    for name in sorted(names - expected.keys()):
        if name.startswith("model.layers.") and not name.endswith(".rotary_emb.inv_freq"):
            raise ModelError(f"{name} has no place in this architecture", where=where, hint=OTHER_MODEL)


def require_shape(
    name: str, found: Sequence[int] | None, expected: Sequence[int], where: str | Path | None
) -> None:
    """Check one tensor's shape against what config.json asks for."""
    if found is None:
        raise ModelError(f"the tensor {name} is missing", where=where, hint=OTHER_MODEL)
    if tuple(found) != tuple(expected):
        raise ModelError(
            f"{name} has shape {tuple(found)}, config.json asks for {tuple(expected)}",
            where=where,
            hint=OTHER_MODEL,
        )
