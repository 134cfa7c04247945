"""Widen the MLP of a checkpoint before it is quantised (``--pad-ffn``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenq.events import Listener, Notice
from qwenq.models.pad_ffn import padded_groups, widened
from qwenq.models.shapes import ModelShape
from qwenq.plan.tensor_parallel import TENSOR_PARALLEL, padding, possible_splits

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint
    from qwenq.recipe import QuantizeRecipe


def padded(
    base: Checkpoint, wanted: QuantizeRecipe, listener: Listener
) -> tuple[Checkpoint, dict[str, int] | None]:
    """Return the checkpoint with the recipe's padding, and the widths for an automatic group size.

    As in a plan the group size comes first: ``auto`` takes the one for the model without padding, and the
    width then makes its groups shareable. Otherwise a wider MLP could lead to larger groups, of which there
    are fewer.

    Args:
        base: the unquantised model.
        wanted: ``pad_ffn`` and ``group_size`` are used.
        listener: receives what was chosen, and why.

    Returns:
        The checkpoint, ``base`` itself where nothing is padded; and the input widths by module for an
        automatic group size, None where those of the checkpoint are to be used.

    Raises:
        UsageError: a width below the model's, above twice that, or no multiple of the group size; or no
            automatic group size fits.
    """
    if wanted.pad_ffn == "none":
        return base, None
    shape = ModelShape.from_config(base.config)
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
