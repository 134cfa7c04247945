"""Which numbers of GPUs can share a model, and what a wider MLP would change.

Row-parallel modules (``o_proj``, ``down_proj``) are split along their inputs, so a GPU has to get whole
groups of a quantised one; heads and the MLP's channels have to be shared evenly too. Key/value heads are
shared evenly or, where there are fewer heads than GPUs, repeated evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenq.models.pad_ffn import padded_groups, padded_width
from qwenq.models.shapes import ModelShape

TENSOR_PARALLEL = (1, 2, 4, 8)
"""Numbers of GPUs that are asked about unless others are named."""


@dataclass(frozen=True)
class Split:
    """Whether ``gpus`` GPUs can share a model; ``obstacles`` is empty when they can."""

    gpus: int
    obstacles: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """True when nothing stands in the way."""
        return not self.obstacles


@dataclass(frozen=True)
class Padding:
    """What padding the MLP would change.

    Attributes:
        ffn, to: channels before and after.
        groups_before, groups_after: groups of ``down_proj``.
        parameters: elements added to the whole model.
        possible_before, possible_after: the numbers of GPUs that can share the quantised model.
    """

    ffn: int
    to: int
    groups_before: int
    groups_after: int
    parameters: int
    possible_before: tuple[int, ...]
    possible_after: tuple[int, ...]


def split(shape: ModelShape, gpus: int, group_size: int | None) -> Split:
    """Whether ``gpus`` GPUs can share a model quantised in groups; ``group_size`` None: unquantised."""
    obstacles = []
    if shape.heads % gpus:
        obstacles.append(f"{shape.heads} heads")
    if shape.kv_heads % gpus and gpus % shape.kv_heads:
        obstacles.append(f"{shape.kv_heads} key/value heads")
    if group_size is None:
        if shape.ffn % gpus:
            obstacles.append(f"{shape.ffn} FFN channels")
        return Split(gpus, tuple(obstacles))
    for module in shape.linears():
        if module.name in ("self_attn.o_proj", "mlp.down_proj"):
            groups = _groups(module.columns, group_size)
            if groups % gpus:
                obstacles.append(f"{groups} groups of {module.name.split('.')[1]}")
    return Split(gpus, tuple(obstacles))


def possible_splits(shape: ModelShape, gpus: tuple[int, ...], group_size: int | None) -> tuple[int, ...]:
    """Those of the numbers of GPUs that can share the model."""
    return tuple(count for count in gpus if split(shape, count, group_size).possible)


def padding(shape: ModelShape, group_size: int, gpus: tuple[int, ...]) -> Padding | None:
    """What the smallest padding that admits the most of these numbers of GPUs changes.

    None where no padding helps: the width fits already, or something else than the MLP stands in the way.
    """
    if group_size == -1:
        return None
    within_reach = tuple(count for count in gpus if not _beside_the_ffn(split(shape, count, group_size)))
    to = padded_width(shape.ffn, group_size, within_reach or (1,))
    if to == shape.ffn or to > 2 * shape.ffn:
        return None
    padded = shape.with_ffn(to)
    return Padding(
        ffn=shape.ffn,
        to=to,
        groups_before=_groups(shape.ffn, group_size),
        groups_after=padded_groups(to, group_size),
        parameters=padded.parameters - shape.parameters,
        possible_before=possible_splits(shape, gpus, group_size),
        possible_after=possible_splits(padded, gpus, group_size),
    )


def kv_share(shape: ModelShape, gpus: int) -> float:
    """The part of the cache that each of the GPUs holds; heads fewer than GPUs are repeated."""
    return 1 / min(gpus, shape.kv_heads)


def _beside_the_ffn(found: Split) -> tuple[str, ...]:
    return tuple(obstacle for obstacle in found.obstacles if not obstacle.endswith("down_proj"))


def _groups(width: int, group_size: int) -> int:
    return 1 if group_size == -1 else width // group_size
