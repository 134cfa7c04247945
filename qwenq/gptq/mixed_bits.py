"""Choose 4 or 8 bits for each group of linears, so that a model fits a size at the least KL divergence.

A group is what engines run as one layer and so has the same bits: q, k and v of a block, its gate and up, all
of its experts. Each group is rounded to 4 bits alone, in a model that is otherwise the base, and the mean KL
divergence from the base over some calibration tokens is its sensitivity. These errors are small and nearly
independent, so their divergences add up; that of 8 bits, 1/256 of it as the squared error is, is left out.
Which groups have 8 bits is then a knapsack, solved exactly for what was measured.

Weights are rounded to nearest on the grid that GPTQ would take: the order of the groups is what counts, and
it needs no Hessian. A group's error runs through the blocks behind it, one of them in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from qwenq.compute.grid import round_to_nearest
from qwenq.events import Listener, counted, silent
from qwenq.gptq.settings import Settings, quantised_linears
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.gptq_config import engine_layer, packed_bytes
from qwenq.models.transformers_model import Hook, hooked
from qwenq.stopping import stop_here
from qwenq.storage import atomic_write_json

FEW, MANY = 4, 8  # bits of a group
TOKENS = {"cpu": 512, "cuda": 4096}  # calibration tokens that sensitivities are measured on, by device
SLAB = 1 << 23  # elements of logits that are compared at a time
CELLS = 50_000  # of the knapsack: bytes are counted in units that make no more of them
CURVE = 24  # sizes that the curve is computed for


@dataclass(frozen=True)
class Group:
    """Linears of a block that have the same bits."""

    layer: int  # the block
    name: str  # of the engines' layer, within the block
    modules: tuple[str, ...]  # within the block
    elements: int  # weights of all modules
    few_bytes: int  # of their tensors in 4 bits
    many_bytes: int  # of their tensors in 8 bits


@dataclass(frozen=True)
class MixedBits:
    """A choice of bits."""

    groups: tuple[Group, ...]  # in the model's order
    divergences: tuple[float, ...]  # of each group in 4 bits alone, in nats a token
    chosen: tuple[bool, ...]  # whether a group has 8 bits
    tokens: int  # that the divergences were measured on
    fixed: int  # bytes of all other tensors of the model
    # (bytes of the whole model, least sum of the divergences that remain)
    curve: tuple[tuple[int, float], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole model."""
        sizes = zip(self.groups, self.chosen, strict=True)
        return self.fixed + sum(group.many_bytes if many else group.few_bytes for group, many in sizes)

    @property
    def block_bits(self) -> tuple[tuple[str, int], ...]:
        """Return the modules in 8 bits by full name, as ``Settings`` takes them."""
        raised = (group for group, many in zip(self.groups, self.chosen, strict=True) if many)
        return tuple(
            (f"model.layers.{group.layer}.{name}", MANY) for group in raised for name in group.modules
        )

    @property
    def remaining(self) -> float:
        """Return the sum of the divergences of the groups in 4 bits."""
        return sum(kl for kl, many in zip(self.divergences, self.chosen, strict=True) if not many)

    @property
    def sentence(self) -> str:
        """Return what was chosen, for the user."""
        return (
            f"{sum(self.chosen)} of {len(self.groups)} groups of linear layers have {MANY} bits: "
            f"{self.nbytes / 1e6:,.1f} MB; the KL divergences that the groups cost in {FEW} bits, each "
            f"rounded alone, fall from {sum(self.divergences):.4f} to {self.remaining:.4f} in all"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for the manifest."""
        each = zip(self.groups, self.divergences, self.chosen, strict=True)
        return {
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "remaining": self.remaining,
            "groups": [
                {
                    "name": f"model.layers.{group.layer}.{group.name}",
                    "kl": kl,
                    "bits": MANY if many else FEW,
                    "bytes": [group.few_bytes, group.many_bytes],
                }
                for group, kl, many in each
            ],
            "curve": [list(point) for point in self.curve],
        }


def groups_of(decoder: BlockwiseDecoder, settings: Settings) -> list[Group]:
    """Return the groups whose bits are open: those of linears that no rule of ``module_bits`` names."""
    found = []
    for layer, block in enumerate(decoder.blocks):
        members: dict[str, dict[str, nn.Linear]] = {}
        for name, linear in quantised_linears(block, settings).items():
            if not settings.has_rule(name):
                members.setdefault(engine_layer(name), {})[name] = linear
        for shared, linears in members.items():
            few, many = (_packed(linears.values(), bits, settings) for bits in (FEW, MANY))
            elements = sum(linear.weight.numel() for linear in linears.values())
            found.append(Group(layer, shared, tuple(linears), elements, few, many))
    return found


def _packed(linears: Iterable[nn.Linear], bits: int, settings: Settings) -> int:
    sides = ((linear.out_features, linear.in_features) for linear in linears)
    return sum(packed_bytes(rows, columns, bits, settings.group_size) for rows, columns in sides)


def choose_bits(
    groups: Sequence[Group], divergences: Sequence[float], allowed: int, fixed: int, tokens: int
) -> MixedBits:
    """Return the groups in 8 bits that leave the least divergence within a number of bytes.

    Args:
        groups, divergences: from ``groups_of`` and ``measure``.
        allowed: bytes that all groups together may take; at least those of 4 bits.
        fixed: bytes of all other tensors.
        tokens: that were measured on.
    """
    costs = [group.many_bytes - group.few_bytes for group in groups]
    least = sum(group.few_bytes for group in groups)
    unit = max(math.gcd(*costs), -(-sum(costs) // CELLS))
    cells = [-(-cost // unit) for cost in costs]
    gains, taken = _knapsack(cells, divergences, sum(cells))
    chosen = _backtrack(cells, taken, max(0, allowed - least) // unit)
    whole = sum(divergences)
    places = np.unique(np.linspace(0, sum(cells), CURVE).astype(int))
    curve = tuple((fixed + least + int(at) * unit, max(0.0, whole - float(gains[at]))) for at in places)
    return MixedBits(tuple(groups), tuple(divergences), chosen, tokens, fixed, curve)


def _knapsack(
    cells: Sequence[int], gains: Sequence[float], capacity: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the best sum for each capacity, and whether an item is in the best of those up to it."""
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(cells), capacity + 1), dtype=bool)
    for item, (cost, gain) in enumerate(zip(cells, gains, strict=True)):
        with_item = best[: capacity + 1 - cost] + gain
        taken[item, cost:] = with_item > best[cost:]
        best[cost:] = np.maximum(best[cost:], with_item)
    return best, taken


def _backtrack(cells: Sequence[int], taken: NDArray[np.bool_], capacity: int) -> tuple[bool, ...]:
    """Return which items are in the best sum for a capacity."""
    left, chosen = min(capacity, taken.shape[1] - 1), [False] * len(cells)
    for item in reversed(range(len(cells))):
        if taken[item, left]:
            chosen[item] = True
            left -= cells[item]
    return tuple(chosen)


def sample_of(tokens: Tensor, device: torch.device) -> Tensor:
    """Return the first calibration tokens, on which sensitivities are measured: [sequences, tokens]."""
    wanted = TOKENS.get(device.type, TOKENS["cpu"])
    return tokens[: max(1, wanted // tokens.shape[1]), :wanted]


def measure(
    decoder: BlockwiseDecoder,
    tokens: Tensor,
    settings: Settings,
    groups: Sequence[Group],
    file: Path,
    facts: dict[str, Any],
    listener: Listener = silent,
) -> list[float]:
    """Return the KL divergence from the base of each group in 4 bits, everything else as it is.

    What is measured is kept block by block: a stop (SIGTERM) loses one, and a file with the same facts, those
    that decide the result, is gone on with.

    Args:
        tokens: int64 [sequences, tokens], from ``sample_of``.
        settings: group size, symmetry and scale search.
        file, facts: what is kept, and of what.
    """
    known, layers = _read(file, facts), range(len(decoder.names))
    if not {_key(group) for group in groups} <= known.keys():
        with torch.inference_mode(), counted(listener, "measuring sensitivity", "layers") as progress:
            (hidden,) = decoder.embed([tokens])
            (last,) = _advance(decoder, layers, [hidden])
            for index in layers:
                own = [group for group in groups if group.layer == index and _key(group) not in known]
                hidden, rounded = _run_with_each_rounded(decoder, index, hidden, own, settings)
                if own:
                    rounded = _advance(decoder, layers[index + 1 :], rounded)
                    known |= zip(map(_key, own), _divergences(decoder, last, rounded), strict=True)
                    atomic_write_json(file, {"facts": facts, "kl": known})
                    stop_here()
                progress(index + 1, len(layers))
    return [known[_key(group)] for group in groups]


def _advance(decoder: BlockwiseDecoder, layers: Iterable[int], streams: list[Tensor]) -> list[Tensor]:
    """Run hidden states through some blocks."""
    for index in layers:
        with decoder.block(index) as block:
            streams = [decoder.forward(block, states) for states in streams]
    return streams


def _key(group: Group) -> str:
    return f"{group.layer}.{group.name}"


def _read(file: Path, facts: dict[str, Any]) -> dict[str, float]:
    """Return what an earlier run with the same facts has measured."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["facts"] == json.loads(json.dumps(facts)):
            return {str(key): float(value) for key, value in content["kl"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # missing, damaged or another run's: measured again
    return {}


def _run_with_each_rounded(
    decoder: BlockwiseDecoder, index: int, hidden: Tensor, groups: Sequence[Group], settings: Settings
) -> tuple[Tensor, list[Tensor]]:
    """Run a block as it is, and once for each group with that group's weights rounded."""
    with decoder.block(index) as block:
        squares: dict[str, Tensor] = {}
        linears = {name: block.get_submodule(name) for group in groups for name in group.modules}
        with hooked(linears, lambda name: _squares(squares, name)):
            output = decoder.forward(block, hidden)
        rounded = []
        for group in groups:
            plain = {name: linears[name].weight for name in group.modules}
            for name in group.modules:
                full = decoder.checkpoint.read(f"{decoder.names[index]}.{name}.weight")
                weight = full.to(decoder.device, torch.float32)
                importance = squares.get(name, weight.new_ones(weight.shape[1]))
                nearest = round_to_nearest(
                    weight, FEW, settings.group_size, sym=settings.sym, search=settings.scale_search,
                    importance=importance,
                )  # fmt: skip
                linears[name].weight = nn.Parameter(nearest.to(decoder.dtype), requires_grad=False)
            rounded.append(decoder.forward(block, hidden))
            for name, stored in plain.items():
                linears[name].weight = stored
    return output, rounded


def _squares(found: dict[str, Tensor], name: str) -> Hook:
    """Return a hook that keeps the mean square of each input of a linear: [in], the Hessian's diagonal."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten(0, -2)  # [tokens, in]
        if len(rows):  # else an expert that no token is routed to
            found[name] = rows.float().square().mean(0)

    return hook


def _divergences(decoder: BlockwiseDecoder, base: Tensor, streams: Sequence[Tensor]) -> list[float]:
    """Return the mean KL divergence of hidden states behind the last block from the base's."""
    sums = [0.0] * len(streams)
    slab = max(1, SLAB // decoder.vocabulary)
    with decoder.head() as head:
        parts = zip(*(states.flatten(0, 1).split(slab) for states in (base, *streams)), strict=True)
        for expected, *others in parts:  # [slab, hidden] each
            log_p = head(expected).log_softmax(-1)
            for at, states in enumerate(others):
                log_q = head(states).log_softmax(-1)
                sums[at] += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    rows = base.shape[0] * base.shape[1]
    return [total / rows for total in sums]
