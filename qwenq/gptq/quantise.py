"""The pipeline: one decoder layer at a time: load, measure, solve, pack, write, forget."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwenq.compute.columns import fallback_reason
from qwenq.compute.products import unsupported_reason
from qwenq.distributed import ALONE, Team
from qwenq.errors import CalibrationError, QuantisationError, UnsupportedError, UsageError
from qwenq.gptq.drift import drift
from qwenq.gptq.experts import ExpertInput, expert_problem
from qwenq.gptq.hessian import hessian
from qwenq.gptq.layer_store import LayerStore
from qwenq.gptq.module import ModuleStats, QuantisedLinear, quantise_group
from qwenq.gptq.rows import Settings
from qwenq.gptq.walk import Routing, shared_inputs, walk
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.kept import linears_of
from qwenq.models.packing import PackedLinear, dequantise, pack
from qwenq.models.routed_experts import Expert, Routed
from qwenq.models.shapes import GROUP_SIZES, fitting_group_sizes
from qwenq.stopping import Terminated, asked

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint

ALGORITHM = 10  # raise it when the same settings give other integers: unfinished runs are then not resumed
TOKENS_PER_BATCH = 2048  # enough for full GEMM speed; small enough that a batch's activations stay modest
LAYER_IS_STORED = "this layer is on the disk"
UNQUANTISED = 16
"""What ``module_bits`` calls the bits of modules that are left as they are."""
AUTOMATIC_BITS = {r"^linear_attn\.": 8}
"""Bits of modules where the recipe says "auto": a recurrent state carries an error from token to token."""
LAYER_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class LayerDone:
    """Progress: a layer has been quantised, or taken over from an earlier run.

    Attributes:
        index, total: which layer, of how many.
        seconds: spent on it.
        modules: statistics by module name within the block.
        resumed: it was already on disk.
    """

    index: int
    total: int
    seconds: float
    modules: dict[str, ModuleStats]
    resumed: bool

    @property
    def error(self) -> float:
        """Mean share of output energy lost over the layer's modules."""
        return sum(stats.error for stats in self.modules.values()) / max(1, len(self.modules))

    @property
    def rtn_error(self) -> float:
        """The same for round-to-nearest."""
        return sum(stats.rtn_error for stats in self.modules.values()) / max(1, len(self.modules))

    def raised_damping(self, asked: float) -> dict[float, list[str]]:
        """Modules whose Hessian needed more damping than was asked for, by how much they got."""
        raised: dict[float, list[str]] = {}
        for name, stats in self.modules.items():
            if stats.damp > asked:
                raised.setdefault(stats.damp, []).append(name)
        return raised


def choose_group_size(wanted: int | str, widths: dict[str, int]) -> tuple[int, str]:
    """The group size, and a sentence that says why.

    Args:
        wanted: "auto", -1, or a number.
        widths: input width of every linear that is quantised.

    Raises:
        UsageError: a size that does not divide every width.
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


def input_widths(linears: Mapping[str, nn.Linear]) -> dict[str, int]:
    """Input width of every linear that is quantised, by its name in a block."""
    return {name: linear.in_features for name, linear in linears.items()}


def every_linear(decoder: BlockwiseDecoder, settings: Settings) -> dict[str, nn.Linear]:
    """Return the linears that are quantised in any block, by their names in it."""
    blocks = decoder.kinds.values()
    return {name: linear for block in blocks for name, linear in _quantised(block, settings).items()}


def _quantised(block: nn.Module, settings: Settings) -> dict[str, nn.Linear]:
    linears = linears_of(block).items()
    return {name: linear for name, linear in linears if settings.bits_of(name) < UNQUANTISED}


def module_bits(
    decoder: BlockwiseDecoder, wanted: Mapping[str, int] | str, common: int
) -> tuple[tuple[str, int], ...]:
    """Return the patterns of modules with bits of their own, as ``Settings`` takes them.

    Args:
        decoder: of the model.
        wanted: pattern → bits; "auto": ``AUTOMATIC_BITS``, as far as the model has such modules and they are
        more
            than the others'.
        common: the bits of all other modules.

    Raises:
        UsageError: a pattern that is none, or that is found in the name of no linear layer.
    """
    names = {name for block in decoder.kinds.values() for name in linears_of(block)}
    rules = AUTOMATIC_BITS if isinstance(wanted, str) else wanted
    found = []
    for pattern, bits in rules.items():
        try:
            matches = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UsageError(f"{pattern!r} is no pattern: {error}", where="--module-bits") from error
        if not matches and rules is wanted:
            raise UsageError(
                f"{pattern!r} is found in the name of no linear layer of a block",
                where="--module-bits",
                hint=f"names are {', '.join(sorted(names)[:8])}{', …' if len(names) > 8 else ''}",
            )
        if matches and (rules is wanted or bits > common):
            found.append((pattern, bits))
    _require_like_experts(names, found, common)
    if all(
        any(bits == UNQUANTISED and re.search(pattern, name) for pattern, bits in found) for name in names
    ):
        raise UsageError(
            "no linear layer would be quantised", where="--module-bits", hint="leave out a pattern"
        )
    return tuple(found)


def _require_like_experts(names: Iterable[str], rules: Sequence[tuple[str, int]], common: int) -> None:
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


def kept_parameters(decoder: BlockwiseDecoder, settings: Settings) -> Iterator[dict[str, str]]:
    """What of each block is not quantised, with the reason: by the rules of ``models.kept``, or as asked."""
    for block, kept in zip(decoder.blocks, decoder.kept(), strict=True):
        asked = (name for name in linears_of(block) if settings.bits_of(name) == UNQUANTISED)
        yield kept | {f"{name}.weight": "as module_bits says" for name in asked}


def check_packable(decoder: BlockwiseDecoder, settings: Settings) -> None:
    """Refuse, before any work, a linear that no GPTQ file can hold: eight integers make a word of 32 bits.

    Raises:
        UnsupportedError: a side of a weight is not a multiple of the integers in a word.
    """
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


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        CalibrationError: an id below zero or not below ``vocabulary``.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"token {low if low < 0 else high} in the calibration set; the model knows 0 … {vocabulary - 1}",
            hint="make the calibration set again with this model's own tokenizer",
        )


def run_facts(
    checkpoint: Checkpoint,
    calibration: str,
    settings: Settings,
    decoder: BlockwiseDecoder,
    team: Team = ALONE,
) -> dict[str, Any]:
    """What decides the result of a run, for ``LayerStore``."""
    return {
        "algorithm": ALGORITHM,
        "model": checkpoint.fingerprint,
        "calibration": calibration,
        "settings": json.loads(json.dumps(asdict(settings))),  # as it is when it is read again
        "checkpoint_format": settings.checkpoint_format,
        "dtype": str(decoder.dtype),
        "device": decoder.device.type,
        "attention": decoder.attention,
        "sums": how_summed(decoder.dtype, decoder.device, team),
        "solver": how_solved(settings, decoder.device),
        "threads": torch.get_num_threads(),  # the order of float32 sums depends on it
    }


def how_summed(dtype: torch.dtype, device: torch.device, team: Team) -> str:
    """Which of the ways to sum up Hessians, whose last bits differ: exact, torch, compiled."""
    if team.launched:
        return "exact"
    return "torch" if unsupported_reason(dtype, device) else "compiled"


def how_solved(settings: Settings, device: torch.device) -> str:
    """Whose code rounds and refines, where that shows: on a CPU compiled code fits scales by sums of its own.

    Rounding alone gives the same bits by torch and by compiled code.
    """
    if device.type != "cuda" and not settings.refine:
        return "any"
    if fallback_reason(device) is not None:
        return "torch"
    return "triton" if device.type == "cuda" else "compiled"


def quantise_layers(
    decoder: BlockwiseDecoder,
    tokens: Tensor,
    settings: Settings,
    store: LayerStore | None,
    on_layer: Callable[[LayerDone], None],
    team: Team = ALONE,
) -> None:
    """Quantise every block into ``store``, each with the inputs that the quantised blocks before it produce.

    Args:
        decoder: the model, block by block.
        tokens: int64 [samples, seq_len], no padding.
        settings: GPTQ's.
        store: finished layers in it are not done again; their forward pass is. The leader's; the others have
            none.
        on_layer: called after each layer, on the leader.
        team: who takes part: each runs a share of the batches, and solves a share of the rows.

    Raises:
        QuantisationError: names the module.
        UsageError: more processes than batches.
        Terminated: SIGTERM came to any of the processes, see ``stopping.finishing``; all stop behind the
            same layer, which is stored.
    """
    check_tokens(tokens, decoder.vocabulary)
    total, finished = len(decoder.names), team.tell(store.finished() if store is not None else None)
    with torch.inference_mode():
        streams = _begin(decoder, tokens, settings, team) if finished < total else None
        for index in range(total):
            started = time.perf_counter()
            if streams is not None:  # None: all layers are done, nothing reads hidden states any more
                with decoder.block(index) as block:
                    layer = _Layer(decoder, block, index, settings, team)
                    if index < finished:
                        layer.load(store.tensors(index) if store is not None else {}, streams)
                    else:
                        layer.quantise(streams)
                        if store is not None:
                            modules = {name: stats.as_dict() for name, stats in layer.stats.items()}
                            store.save(index, layer.tensors, modules)
            if store is not None:
                stats = {name: ModuleStats(**values) for name, values in store.modules(index).items()}
                seconds = time.perf_counter() - started
                on_layer(LayerDone(index, total, seconds, stats, index < finished))
            if streams is not None:
                _stop_if_told(team)


def _stop_if_told(team: Team) -> None:
    """Stop if any process was told to: one that went on would wait for the others in vain."""
    told = torch.tensor([int(asked())])
    team.largest(told)
    if bool(told):
        raise Terminated


@dataclass
class _Streams:
    """Hidden states between two blocks, one tensor per batch.

    Attributes:
        quantised: as the quantised blocks so far produce them.
        original: as the original blocks do; none where their drift is not asked for.
        groups: linears of a block that read the same tensor, found on the first block of a kind.
    """

    quantised: list[Tensor]
    original: list[Tensor]
    groups: dict[tuple[str, ...], list[list[str]]] = field(default_factory=dict)


def _begin(decoder: BlockwiseDecoder, tokens: Tensor, settings: Settings, team: Team) -> _Streams:
    """Embed this rank's batches. Where a batch ends does not depend on who runs it."""
    batches = torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    if len(batches) < team.world:
        raise UsageError(
            f"{team.world} processes, but the calibration text is {len(batches)} batches of "
            f"{batches[0].numel()} tokens",
            where="torchrun --nproc-per-node",
            hint=f"start {len(batches)} at most, or calibrate on more text with --samples",
        )
    mine = team.share(len(batches))
    hidden = decoder.embed([batches[index] for index in mine])
    return _Streams(hidden, list(hidden) if settings.drift else [])


class _Layer:
    """One block while it is being quantised."""

    def __init__(
        self, decoder: BlockwiseDecoder, block: nn.Module, index: int, settings: Settings, team: Team
    ) -> None:
        self._linears, self._settings, self._decoder = _quantised(block, settings), settings, decoder
        self._team = team
        self._block, self._prefix = block, decoder.names[index]
        self.tensors: dict[str, Tensor] = {}
        self.stats: dict[str, ModuleStats] = {}
        self._of_block: dict[str, Tensor] = {}

    def quantise(self, streams: _Streams) -> None:
        """Solve all linears and advance the streams; ``tensors`` and ``stats`` then hold the result."""
        kind = tuple(self._linears)
        if kind not in streams.groups:
            bits_of, sample = self._settings.bits_of, streams.quantised[0][:1]
            groups = shared_inputs(self._block, self._forward, sample, bits_of)
            streams.groups[kind] = [names for names in groups if bits_of(names[0]) < UNQUANTISED]
        streams.quantised, streams.original = walk(
            self._block, self._forward, streams.quantised, streams.groups[kind], self.solve, streams.original
        )

    def load(self, tensors: dict[str, Tensor], streams: _Streams) -> None:
        """Advance the streams with the weights that an earlier run found for this block.

        Args:
            tensors: packed; the leader's, who sends the weights to the others.
            streams: of this rank.
        """
        streams.original = [self._forward(hidden) for hidden in streams.original]
        for name, linear in self._linears.items():
            weight = torch.empty_like(linear.weight.data)
            if self._team.leads:
                parts = (tensors[f"{self._prefix}.{name}.{part}"] for part in LAYER_PARTS)
                packed, bits = PackedLinear(*parts), self._settings.bits_of(name)
                weight.copy_(dequantise(packed, bits, self._settings.checkpoint_format))
            self._team.copy(weight)
            linear.weight.data = weight
        streams.quantised = [self._forward(hidden) for hidden in streams.quantised]

    def _forward(self, hidden: Tensor) -> Tensor:
        return self._decoder.forward(self._block, hidden)

    def solve(
        self, names: Sequence[str], inputs: list[Tensor], reference: list[Tensor], routing: Routing
    ) -> dict[str, Tensor]:
        """Quantise the linears ``names``, whose common input is ``inputs``: their new weights."""
        weights = {name: self._stored(name) for name in names}
        routed = [each for each in routing if each is not None]
        tokens = None
        if routed:
            count = len(inputs)
            given = ExpertInput(inputs, routed[:count], reference, routed[count:])
            pool = partial(self._pooled, names[0], given.routed)
            H, found, tokens = expert_problem(given, list(weights.values()), pool, self._team)
        else:
            H = hessian(inputs, self._team)
            found = drift(inputs, reference, list(weights.values()), H, self._team)
        try:
            own = replace(self._settings, bits=self._settings.bits_of(names[0]))
            results = quantise_group(weights, H, found, own, self._team)
        except QuantisationError as error:
            where = f"{self._prefix}.{error.where or names[0]}"
            raise QuantisationError(error.what, where=where, hint=error.hint) from error
        return {name: self._keep(name, result, tokens) for name, result in results.items()}

    def _pooled(self, name: str, routed: Sequence[Routed], step: int) -> Tensor:
        """Return the Hessian of the block's tokens at an expert's linear ``name``: of each ``step``-th one.

        The input of gate and up is the same for all experts: it is taken whole, once a layer.
        """
        path, _, leaf = name.rpartition(".")
        expert = self._block.get_submodule(path)
        if leaf == "down_proj" and isinstance(expert, Expert):
            return hessian([expert.inner(each.hidden[::step]) for each in routed], self._team)
        experts = path.rpartition(".")[0]
        if experts not in self._of_block:
            self._of_block[experts] = hessian([each.hidden for each in routed], self._team)
        return self._of_block[experts]

    def _stored(self, name: str) -> Tensor:
        """The weight as the checkpoint holds it, in float32: the block's has been rounded to its dtype."""
        weight = self._decoder.checkpoint.read(f"{self._prefix}.{name}.weight")
        return weight.to(self._decoder.device, torch.float32)

    def _keep(self, name: str, result: QuantisedLinear, tokens: int | None) -> Tensor:
        grid = result.grid
        if self._team.leads:  # who writes
            zeros = grid.zeros.to(torch.uint8).cpu()
            stored_as = self._settings.checkpoint_format
            packed = pack(result.integers.cpu(), grid.scales.cpu(), zeros, grid.bits, stored_as)
            self.tensors.update(packed.tensors(f"{self._prefix}.{name}"))
        self.stats[name] = replace(result.stats, tokens=tokens)
        return grid.values(result.integers).to(self._decoder.dtype)


def module_errors(store: LayerStore, layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Statistics of all modules, by full name, for the manifest."""
    for index in range(layers):
        for name, stats in store.modules(index).items():
            yield f"model.layers.{index}.{name}", stats


def expert_coverage(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how many calibration tokens each expert was given, for the manifest; {} without experts.

    Args:
        modules: from ``module_errors``.
    """
    tokens: dict[str, list[int]] = {}
    for name, stats in modules.items():
        if "tokens" in stats and name.endswith(".gate_proj"):
            tokens.setdefault(name.rpartition(".experts.")[0] + ".experts", []).append(stats["tokens"])
    return {"expert_tokens": tokens} if tokens else {}
