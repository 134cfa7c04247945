"""Hold GPTQ's settings, check them against a model, and describe them in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from qwenq.compute.grid import ScaleSearch
from qwenq.errors import UnsupportedError, UsageError
from qwenq.gptq.coordinate_descent import SWEEPS
from qwenq.models.block_shapes import AUTOMATIC_BITS
from qwenq.models.gptq_config import CheckpointFormat
from qwenq.models.shapes import GROUP_SIZES, fitting_group_sizes
from qwenq.models.transformers_model import linears_of

if TYPE_CHECKING:
    from qwenq.models.blocks import BlockwiseDecoder
    from qwenq.recipe import QuantizeRecipe

UNQUANTISED = 16  # bits, in ``module_bits``, of modules that are left as they are


@dataclass(frozen=True)
class Settings:
    """Settings of the algorithm, from the recipe's ``[quantize]``."""

    bits: int  # of all modules that no pattern of ``module_bits`` matches
    group_size: int  # -1: one group a row
    sym: bool
    act_order: bool
    scale_search: ScaleSearch
    damp: float
    asymmetric_calibration: float  # 0 … 1, the strength of ``shift_targets``
    coordinate_descent: bool
    # (pattern, bits) of modules that differ from the rest; 16: they are not quantised
    module_bits: tuple[tuple[str, int], ...] = ()
    # (full name, bits) of modules that differ from those of the same name in other blocks
    block_bits: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_recipe(cls, recipe: QuantizeRecipe, module_bits: tuple[tuple[str, int], ...] = ()) -> Settings:
        """Return the settings of a recipe; the group size is chosen by the widths that these leave."""
        return cls(
            bits=recipe.bits,
            group_size=-1,
            sym=recipe.sym,
            act_order=recipe.act_order == "static",
            scale_search=recipe.scale_search,
            damp=recipe.damp,
            asymmetric_calibration=recipe.asymmetric_calibration,
            coordinate_descent=recipe.coordinate_descent,
            module_bits=module_bits,
        )

    def bits_of(self, module: str) -> int:
        """Return the bits of a module by its name in a block: those of the first pattern found in it."""
        return next((bits for pattern, bits in self.module_bits if re.search(pattern, module)), self.bits)

    def has_rule(self, module: str) -> bool:
        """Return whether ``module_bits`` names a module, by its name in a block."""
        return any(re.search(pattern, module) for pattern, _ in self.module_bits)

    def of_block(self, prefix: str) -> Settings:
        """Return the settings of one block, by its full name: what ``block_bits`` says is a rule in them."""
        own = [(name, bits) for name, bits in self.block_bits if name.startswith(f"{prefix}.")]
        rules = tuple((f"^{re.escape(name.removeprefix(f'{prefix}.'))}$", bits) for name, bits in own)
        return replace(self, module_bits=(*rules, *self.module_bits), block_bits=())

    @property
    def checkpoint_format(self) -> CheckpointFormat:
        """Return how zero points are stored: free ones as they are, as GPTQModel refuses them minus one."""
        return "gptq" if self.sym else "gptq_v2"


def describe(settings: Settings) -> str:
    """Return all settings in one line for the user."""
    searches = {
        "hessian": "scale search weighted by the Hessian's diagonal",
        "mse": "scale search by unweighted error",
        "none": "scales by min/max",
    }
    return " · ".join(
        [
            f"Int{settings.bits}",
            "symmetric" if settings.sym else "asymmetric (format gptq_v2, which some kernels do not load)",
            "act-order, static groups" if settings.act_order else "no act-order",
            searches[settings.scale_search],
            f"asymmetric calibration {settings.asymmetric_calibration:g} (GPTAQ)"
            if settings.asymmetric_calibration
            else "no asymmetric calibration",
            f"coordinate descent, {SWEEPS} sweeps"
            if settings.coordinate_descent
            else "no coordinate descent",
            f"damping {settings.damp:g}",
        ]
    )


def choose_group_size(wanted: int | str, widths: dict[str, int]) -> tuple[int, str]:
    """Return the group size, and a line that gives the reason.

    Args:
        wanted: "auto", -1, or a number that divides every width.
        widths: input width of every linear that is quantised.
    """
    if wanted == "auto":
        if not (fitting := fitting_group_sizes(widths.values())):
            raise _indivisible(GROUP_SIZES[-1], widths)
        tried = ", ".join(map(str, GROUP_SIZES))
        return fitting[0], f"group size {fitting[0]}: the largest of {tried} that divides every input width"
    size = int(wanted)
    if size != -1 and any(width % size for width in widths.values()):
        raise _indivisible(size, widths)
    return size, "group size -1: one scale per output row" if size == -1 else f"group size {size}: as asked"


def _indivisible(size: int, widths: dict[str, int]) -> UsageError:
    name, width = next((name, width) for name, width in widths.items() if width % size)
    fitting = map(str, fitting_group_sizes(widths.values()))
    return UsageError(
        f"group size {size} does not divide the {width} input columns of {name}",
        where="--group-size",
        hint=f"use {' or '.join([*fitting, '-1 (one scale per row)'])}",
    )


def quantised_linears(block: nn.Module, settings: Settings) -> dict[str, nn.Linear]:
    """Return the linears of a block that are quantised, by their names in it."""
    linears = linears_of(block).items()
    return {name: linear for name, linear in linears if settings.bits_of(name) < UNQUANTISED}


def every_linear(decoder: BlockwiseDecoder, settings: Settings) -> dict[str, nn.Linear]:
    """Return the linears that are quantised in any block, by their names in it."""
    blocks = decoder.kinds.values()
    return {name: linear for block in blocks for name, linear in quantised_linears(block, settings).items()}


def kept_parameters(decoder: BlockwiseDecoder, settings: Settings) -> Iterator[dict[str, str]]:
    """Yield what of each block is not quantised, with the reason: the decoder's or the recipe's."""
    for block, kept in zip(decoder.blocks, decoder.kept(), strict=True):
        asked = (name for name in linears_of(block) if settings.bits_of(name) == UNQUANTISED)
        yield kept | {f"{name}.weight": "as module_bits says" for name in asked}


def check_packable(decoder: BlockwiseDecoder, settings: Settings) -> None:
    """Refuse, before any work, a linear that no GPTQ file can hold: 32 / bits integers make a word."""
    for name, linear in every_linear(decoder, settings).items():
        bits = settings.bits_of(name)
        per_word = 32 // bits
        if linear.in_features % per_word or linear.out_features % per_word:
            raise UnsupportedError(
                f"{name} is {linear.out_features} × {linear.in_features}; the GPTQ layout at {bits} bits "
                f"needs multiples of {per_word}",
                where=decoder.checkpoint.folder,
                hint="pad these widths with zeros first, or try --bits 8"
                if bits == 4 and not (linear.in_features % 4 or linear.out_features % 4)
                else "pad these widths with zeros first",
            )


def module_bits(
    decoder: BlockwiseDecoder, wanted: Mapping[str, int] | str, common: int
) -> tuple[tuple[str, int], ...]:
    """Return the patterns of modules whose bits differ from the ``common`` ones, as ``Settings`` takes them.

    Of ``wanted``, pattern → bits, each has to be found in a name; "auto" is ``AUTOMATIC_BITS``, as far as the
    model has such modules and they are more than the others'.
    """
    names = {name for block in decoder.kinds.values() for name in linears_of(block)}
    rules = AUTOMATIC_BITS if isinstance(wanted, str) else wanted
    found = []
    for pattern, bits in rules.items():
        try:
            matches = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a pattern: {error}", where="--module-bits") from error
        if not matches and rules is wanted:
            raise UsageError(
                f"{pattern!r} is found in the name of no linear layer of a block",
                where="--module-bits",
                hint=f"names are {', '.join(sorted(names)[:8])}{', …' if len(names) > 8 else ''}",
            )
        if matches and (rules is wanted or bits > common):
            found.append((pattern, bits))
    _require_equal_experts(names, found, common)
    if all(
        any(bits == UNQUANTISED and re.search(pattern, name) for pattern, bits in found) for name in names
    ):
        raise UsageError(
            "no linear layer would be quantised", where="--module-bits", hint="leave out a pattern"
        )
    return tuple(found)


def _require_equal_experts(names: Iterable[str], rules: Sequence[tuple[str, int]], common: int) -> None:
    """Refuse experts of a block with different bits: engines keep all of them in one tensor."""
    widths: dict[str, set[int]] = {}
    for name in names:
        experts, found, _ = name.rpartition(".experts.")
        if found:
            bits = next((bits for pattern, bits in rules if re.search(pattern, name)), common)
            widths.setdefault(experts, set()).add(bits)
    if any(len(found) > 1 for found in widths.values()):
        raise UsageError(
            "the experts of a block would have different bits, which no engine loads",
            where="--module-bits",
            hint='give all of them the same, with the pattern "experts"',
        )
