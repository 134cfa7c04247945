"""Tell which numbers of GPUs can share a model, and pad its MLP so that more of them can."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenq.errors import UnsupportedError
from qwenq.events import Listener, Notice
from qwenq.models.block_shapes import ROW_PARALLEL, Linear
from qwenq.models.pad_ffn import padded_groups, padded_width, widened
from qwenq.models.shapes import ModelShape

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint
    from qwenq.recipe import QuantizeRecipe

# Row-parallel modules (``o_proj``, ``down_proj``, of each expert, too) are split along their inputs, so a GPU
# needs whole groups of a quantised one; heads and the MLP's channels are split evenly too. Key/value heads
# are split evenly or, where there are fewer heads than GPUs, replicated evenly. ``publishing.engines`` has
# the same rules for folders.


TENSOR_PARALLEL = (1, 2, 4, 8)
"""Numbers of GPUs that padding is planned for, unless others are named."""


@dataclass(frozen=True)
class Split:
    """The answer whether ``gpus`` GPUs can share a model; ``obstacles`` is empty if they can."""

    gpus: int
    obstacles: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """Tell whether there are no obstacles."""
        return not self.obstacles


@dataclass(frozen=True)
class Padding:
    """The effect of padding the MLP."""

    ffn: int  # channels before
    to: int  # and after
    groups_before: int  # of ``down_proj``
    groups_after: int
    parameters: int  # elements added to the whole model
    possible_before: tuple[int, ...]  # the numbers of GPUs that can share the quantised model
    possible_after: tuple[int, ...]


def split(shape: ModelShape, gpus: int, group_size: int | None) -> Split:
    """Find what keeps ``gpus`` GPUs from sharing a model; ``group_size`` None: unquantised."""
    obstacles = []
    if shape.heads % gpus:
        obstacles.append(f"{shape.heads} heads")
    if shape.kv_heads % gpus and gpus % shape.kv_heads:
        obstacles.append(f"{shape.kv_heads} key/value heads")
    if (linear := shape.linear_attention) is not None:
        heads = sorted({linear.key_heads, linear.value_heads})
        obstacles += [f"{count} heads of linear attention" for count in heads if count % gpus]
    for module in shape.linears():
        if module.leaf not in ROW_PARALLEL:
            continue
        if group_size is None or group_size == -1:
            if module.leaf == "down_proj" and module.columns % gpus:
                dense = module.name == "mlp.down_proj"
                channels = "FFN channels" if dense else f"channels of {_short(module)}"
                obstacles.append(f"{module.columns} {channels}")
        elif module.columns % gpus or module.columns // gpus % group_size:
            obstacles.append(f"{module.columns // group_size} groups of {_short(module)}")
    return Split(gpus, tuple(obstacles))


def _short(module: Linear) -> str:
    owner = module.name.rpartition(".")[0]
    if module.copies > 1:
        return f"an expert's {module.leaf}"
    return f"the shared expert's {module.leaf}" if owner.endswith("shared_expert") else module.leaf


def possible_splits(shape: ModelShape, gpus: tuple[int, ...], group_size: int | None) -> tuple[int, ...]:
    """Return those of the numbers of GPUs that can share the model."""
    return tuple(count for count in gpus if split(shape, count, group_size).possible)


def padding(shape: ModelShape, group_size: int, gpus: tuple[int, ...]) -> Padding | None:
    """Return the smallest padding that lets the most of these numbers of GPUs share the model.

    None where no padding helps: the width fits already, or something else than the MLP is the obstacle; and
    for experts and models with draft layers, which are not padded.
    """
    if group_size == -1 or _not_padded(shape):
        return None
    within_reach = tuple(
        count
        for count in gpus
        if all(each.endswith("down_proj") for each in split(shape, count, group_size).obstacles)
    )
    to = padded_width(shape.ffn, group_size, within_reach or (1,))
    if to == shape.ffn or to > 2 * shape.ffn:
        return None
    padded = replace(shape, ffn=to)
    return Padding(
        ffn=shape.ffn,
        to=to,
        groups_before=shape.ffn // group_size,
        groups_after=padded_groups(to, group_size),
        parameters=padded.parameters - shape.parameters,
        possible_before=possible_splits(shape, gpus, group_size),
        possible_after=possible_splits(padded, gpus, group_size),
    )


def _not_padded(shape: ModelShape) -> str | None:
    """Return why the MLP cannot be padded, None where it can."""
    if shape.experts is not None:
        return "the MLP of a mixture of experts is not padded"
    if shape.draft_layers:  # which are copied, and of which config.json says the same width
        return f"its draft layers (mtp) would keep an MLP of {shape.ffn}"
    return None


def kv_share(shape: ModelShape, gpus: int) -> float:
    """Return the part of the cache that each GPU holds; fewer heads than GPUs are replicated."""
    return 1 / min(gpus, shape.kv_heads)


def padded(
    base: Checkpoint, wanted: QuantizeRecipe, listener: Listener
) -> tuple[Checkpoint, dict[str, int] | None]:
    """Return the checkpoint with the recipe's padding, and the widths for an automatic group size.

    As in a plan the group size comes first: ``auto`` takes the one for the model without padding, and the
    width then makes its groups shareable. Otherwise a wider MLP could lead to larger groups, of which there
    are fewer. Without widths, those of the checkpoint are to be used. The listener receives what was chosen.
    """
    if wanted.pad_ffn == "none":
        return base, None
    shape = ModelShape.from_config(base.config)
    if why := _not_padded(shape):
        raise UnsupportedError(why, where="--pad-ffn", hint="leave --pad-ffn out")
    automatic = wanted.group_size == "auto"
    group_size = shape.auto_group_size() if wanted.group_size == "auto" else wanted.group_size
    to, why = _width(wanted.pad_ffn, shape, group_size)
    if group_size != -1:
        padded_groups(to, group_size)
    checkpoint = widened(base, to)
    listener(Notice(why))
    return checkpoint, {module.name: module.columns for module in shape.linears()} if automatic else None


def _width(wanted: int | str, shape: ModelShape, group_size: int) -> tuple[int, str]:
    """Return the width of the MLP, and a sentence with the reason."""
    if wanted != "auto":
        return int(wanted), f"FFN {shape.ffn} → {int(wanted)}: as asked; added channels are zero"
    found = padding(shape, group_size, TENSOR_PARALLEL)
    if found is None:
        able = _counted(possible_splits(shape, TENSOR_PARALLEL, group_size))
        return shape.ffn, f"FFN {shape.ffn} stays: no padding lets more GPUs share it than {able}"
    able = _counted(found.possible_after)
    return found.to, (
        f"FFN {found.ffn} → {found.to}: {found.groups_after} groups instead of {found.groups_before}, which "
        f"{able} GPUs can share; added channels are zero"
    )


def _counted(gpus: tuple[int, ...]) -> str:
    return ", ".join(map(str, gpus)) or "none"
