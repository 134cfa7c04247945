"""Quantise a model block by block: load, measure, solve, pack, write, forget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qwenq.calibration.sequences import check_vocabulary
from qwenq.compute import cpu
from qwenq.compute.columns import fallback_reason
from qwenq.distributed import ALONE, Team
from qwenq.errors import ModelError, QuantisationError, UnsupportedError, UsageError
from qwenq.gptq.asymmetric import measure_deviation
from qwenq.gptq.experts import measure_expert
from qwenq.gptq.hessian import hessian
from qwenq.gptq.linears import ModuleStats, QuantisedLinear, quantise_group
from qwenq.gptq.sequential import Routing, run_sequential, shared_inputs
from qwenq.gptq.settings import UNQUANTISED, Settings, quantised_linears
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.gptq_config import LAYER_PARTS
from qwenq.models.gptq_format import PackedLinear, dequantise, pack
from qwenq.models.machine import resolve_device
from qwenq.models.opening import open_model
from qwenq.models.quantized_folder import LayerStore
from qwenq.models.transformers_model import Expert, Routed
from qwenq.statistics import mean_over_modules
from qwenq.stopping import Terminated, asked, finishing

if TYPE_CHECKING:
    from qwenq.models.checkpoint import Checkpoint
    from qwenq.recipe import Recipe

ALGORITHM = 12  # raise it when the same settings give other integers: unfinished runs are then not resumed
TOKENS_PER_BATCH = 2048  # enough for full GEMM speed; few enough that a batch's activations stay small
LAYER_IS_STORED = "this layer is on the disk"


@dataclass(frozen=True)
class LayerDone:
    """Progress: a layer that has been quantised, or taken over from an earlier run."""

    index: int
    total: int  # layers
    seconds: float  # spent on it
    modules: dict[str, ModuleStats]  # statistics by module name within the block
    resumed: bool  # it was already on disk

    @property
    def error(self) -> float:
        """Return the mean share of output energy lost over the layer's modules."""
        return mean_over_modules((name, stats.error) for name, stats in self.modules.items())

    @property
    def rtn_error(self) -> float:
        """Return the same for round-to-nearest."""
        return mean_over_modules((name, stats.rtn_error) for name, stats in self.modules.items())

    def raised_damping(self, asked: float) -> dict[float, list[str]]:
        """Return the modules whose Hessian needed more damping than was asked for, by the damping used."""
        raised: dict[float, list[str]] = {}
        for name, stats in self.modules.items():
            if stats.damp > asked:
                raised.setdefault(stats.damp, []).append(name)
        return raised


def run_facts(
    checkpoint: Checkpoint,
    calibration: str,
    settings: Settings,
    decoder: BlockwiseDecoder,
    team: Team = ALONE,
) -> dict[str, Any]:
    """Return what decides the result of a run, for ``LayerStore``."""
    return {
        "algorithm": ALGORITHM,
        "model": checkpoint.fingerprint,
        "calibration": calibration,
        "settings": json.loads(json.dumps(asdict(settings))),  # as it is when it is read again
        "checkpoint_format": settings.checkpoint_format,
        **computed_in(decoder, settings, team),
    }


def computed_in(decoder: BlockwiseDecoder, settings: Settings, team: Team = ALONE) -> dict[str, str | int]:
    """Return what the integers depend on besides recipe and versions: each of these rounds in another way."""
    return {
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": decoder.device.type,
        "attention": decoder.attention,
        "sums": how_summed(decoder.dtype, decoder.device, team),
        "solver": how_solved(settings, decoder.device),
        "threads": torch.get_num_threads(),  # the order of float32 sums depends on it
    }


def how_summed(dtype: torch.dtype, device: torch.device, team: Team) -> str:
    """Return the way that Hessians are summed, as the last bits depend on it: exact, torch or compiled."""
    if team.launched:
        return "exact"
    return "torch" if cpu.unsupported_input(device, dtype) else "compiled"


def how_solved(settings: Settings, device: torch.device) -> str:
    """Return what rounds and descends, where the result depends on it: any, torch, triton or compiled.

    On a CPU rounding gives the same bits by torch and by compiled code; scales are fitted by sums in other
    orders.
    """
    if device.type != "cuda" and not settings.coordinate_descent:
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
        tokens: int64 [samples, seq_len], no padding.
        store: of rank 0, None on others. Layers that it has are not solved again; their forward pass is run.
        on_layer: called after each layer, on rank 0.
        team: the ranks: each runs a share of the batches, and solves a share of the rows.

    Raises:
        QuantisationError: names the module.
        Terminated: any of the processes received SIGTERM, see ``stopping.finishing``; all stop after the same
            layer, which is stored.
    """
    check_vocabulary(tokens, decoder.vocabulary, "the calibration set")
    total = len(decoder.names)
    finished = team.broadcast_object(store.finished() if store is not None else None)
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
                _stop_together(team)


def _stop_together(team: Team) -> None:
    """Stop all processes where one has received SIGTERM: the others would wait for it in vain."""
    stops = torch.tensor([int(asked())])
    team.all_reduce_max(stops)
    if bool(stops):
        raise Terminated


@dataclass
class _Streams:
    """Hidden states between two blocks, one tensor per batch."""

    quantised: list[Tensor]  # as the quantised blocks so far produce them
    original: list[Tensor]  # as the original blocks do; empty without asymmetric calibration
    # linears of a block that read the same tensor, found on the first block of a kind: by the names of its
    # linears and their bits
    groups: dict[tuple[tuple[str, int], ...], list[list[str]]] = field(default_factory=dict)


def _begin(decoder: BlockwiseDecoder, tokens: Tensor, settings: Settings, team: Team) -> _Streams:
    """Embed this rank's batches; where a batch ends does not depend on the number of ranks."""
    batches = torch.split(tokens, max(1, TOKENS_PER_BATCH // tokens.shape[1]))
    if len(batches) < team.world:
        raise UsageError(
            f"{team.world} processes, but the calibration text is {len(batches)} batches of "
            f"{batches[0].numel()} tokens",
            where="torchrun --nproc-per-node",
            hint=f"start {len(batches)} at most, or calibrate on more text with --samples",
        )
    mine = team.shard(len(batches))
    hidden = decoder.embed([batches[index] for index in mine])
    return _Streams(hidden, list(hidden) if settings.asymmetric_calibration else [])


class _Layer:
    """One block while it is being quantised."""

    def __init__(
        self, decoder: BlockwiseDecoder, block: nn.Module, index: int, settings: Settings, team: Team
    ) -> None:
        self._block, self._prefix, self._team = block, decoder.names[index], team
        self._settings, self._decoder = settings.of_block(self._prefix), decoder
        self._linears = quantised_linears(block, self._settings)
        self.tensors: dict[str, Tensor] = {}
        self.stats: dict[str, ModuleStats] = {}
        self._of_block: dict[str, Tensor] = {}

    def quantise(self, streams: _Streams) -> None:
        """Solve all linears and advance the streams; ``tensors`` and ``stats`` then hold the result."""
        kind = tuple((name, self._settings.bits_of(name)) for name in self._linears)
        if kind not in streams.groups:
            bits_of, sample = self._settings.bits_of, streams.quantised[0][:1]
            groups = shared_inputs(self._block, self._forward, sample, bits_of)
            self._require_run(groups)
            streams.groups[kind] = [names for names in groups if bits_of(names[0]) < UNQUANTISED]
        streams.quantised, streams.original = run_sequential(
            self._block, self._forward, streams.quantised, streams.groups[kind], self.solve, streams.original
        )

    def _require_run(self, groups: list[list[str]]) -> None:
        """Refuse a block that leaves one of its linears out: that would stay as it is, and nothing say so."""
        run = {name for names in groups for name in names}
        if (left := next((name for name in self._linears if name not in run), None)) is not None:
            raise UnsupportedError(
                f"the forward pass of a {type(self._block).__name__} does not run this linear layer",
                where=f"{self._prefix}.{left}",
                hint="this architecture is not supported yet; --module-bits can leave the layer as it is",
            )

    def load(self, tensors: dict[str, Tensor], streams: _Streams) -> None:
        """Advance the streams with the packed weights of an earlier run, which rank 0 has and sends."""
        streams.original = [self._forward(hidden) for hidden in streams.original]
        for name, linear in self._linears.items():
            weight = torch.empty_like(linear.weight.data)
            if self._team.is_rank0:
                parts = (tensors[f"{self._prefix}.{name}.{part}"] for part in LAYER_PARTS)
                packed, bits = PackedLinear(*parts), self._settings.bits_of(name)
                weight.copy_(dequantise(packed, bits, self._settings.checkpoint_format))
            self._team.broadcast(weight)
            linear.weight.data = weight
        streams.quantised = [self._forward(hidden) for hidden in streams.quantised]

    def _forward(self, hidden: Tensor) -> Tensor:
        return self._decoder.forward(self._block, hidden)

    def solve(
        self, names: Sequence[str], inputs: list[Tensor], reference: list[Tensor], routing: Routing
    ) -> dict[str, Tensor]:
        """Quantise the linears ``names``, whose common input is ``inputs``; return their new weights."""
        weights = {name: self._stored(name) for name in names}
        routed = [each for each in routing if each is not None]
        tokens = None
        if routed:
            count = len(inputs)
            mine, other = routed[:count], routed[count:]
            pool = partial(self._pooled, names[0], mine)
            H, deviation, tokens = measure_expert(
                inputs, mine, reference, other, list(weights.values()), pool, self._team
            )
        else:
            H = hessian(inputs, self._team)
            deviation = measure_deviation(inputs, reference, list(weights.values()), H, self._team)
        try:
            own = replace(self._settings, bits=self._settings.bits_of(names[0]))
            results = quantise_group(weights, H, deviation, own, self._team)
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
        """Return the checkpoint's weight in float32: the block's has been rounded to its dtype."""
        weight = self._decoder.checkpoint.read(f"{self._prefix}.{name}.weight")
        return weight.to(self._decoder.device, torch.float32)

    def _keep(self, name: str, result: QuantisedLinear, tokens: int | None) -> Tensor:
        grid = result.grid
        if self._team.is_rank0:  # it writes
            zeros = grid.zeros.to(torch.uint8).cpu()
            stored_as = self._settings.checkpoint_format
            packed = pack(result.integers.cpu(), grid.scales.cpu(), zeros, grid.bits, stored_as)
            self.tensors.update(packed.tensors(f"{self._prefix}.{name}"))
        self.stats[name] = replace(result.stats, tokens=tokens)
        return grid.values(result.integers).to(self._decoder.dtype)


def module_errors(store: LayerStore, layers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the statistics of all modules, by full name, for the manifest."""
    for index in range(layers):
        for name, stats in store.modules(index).items():
            yield f"model.layers.{index}.{name}", stats


def expert_coverage(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how many calibration tokens each expert was given, for the manifest; {} without experts."""
    tokens: dict[str, list[int]] = {}
    for name, stats in modules.items():
        if "tokens" in stats and name.endswith(".gate_proj"):
            tokens.setdefault(name.rpartition(".experts.")[0] + ".experts", []).append(stats["tokens"])
    return {"expert_tokens": tokens} if tokens else {}


# Share a quantisation among the ranks of torchrun.
#
# Rank 0 opens the model, makes the calibration text, owns the work folder, writes and checks the result.
# The others open the same model, once rank 0 has (what it had to download or convert is then there), run
# their share of the batches and solve their share of the rows, and write no files.


def send_job(team: Team, decoder: BlockwiseDecoder, tokens: Tensor, settings: Settings) -> None:
    """Send the other ranks what they need for ``quantise_layers``, which has to follow."""
    team.broadcast_object(
        {
            "model": decoder.checkpoint.fingerprint,
            "settings": asdict(settings),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "attention": [decoder.attention, decoder.attention_reason],
            "solver": [how_solved(settings, decoder.device), fallback_reason(decoder.device)],
            "tokens": list(tokens.shape),
            "threads": torch.get_num_threads(),
        }
    )
    team.broadcast(tokens.contiguous())


def run_rank(recipe: Recipe, team: Team, device: str = "auto") -> None:
    """Take part in the quantisation of rank 0; return once all layers are done.

    The recipe is the same as rank 0's, and has to name the same model here; attention and the solver have to
    run by the same code, as another rounds in another way.
    """
    job = team.broadcast_object()
    checkpoint = open_model(recipe.model, recipe.weights, recipe.quantize.seed)
    if checkpoint.fingerprint != job["model"]:
        raise ModelError(
            "the model here is not the one that rank 0 has",
            where=checkpoint.folder,
            hint="copy the same folder to every machine, or name one on a shared disk",
        )
    torch.set_num_threads(job["threads"])  # sums in float32 depend on it
    decoder = BlockwiseDecoder(checkpoint, resolve_device(device), getattr(torch, job["dtype"]))
    settings = Settings(**job["settings"])
    solver = [how_solved(settings, decoder.device), fallback_reason(decoder.device)]
    attention = [decoder.attention, decoder.attention_reason]
    _require_same("attention", job["attention"], attention, decoder)
    _require_same("integers and scales", job["solver"], solver, decoder)
    tokens = torch.empty(job["tokens"], dtype=torch.int64)
    team.broadcast(tokens)
    with finishing(LAYER_IS_STORED):
        quantise_layers(decoder, tokens, settings, None, lambda _: None, team)


def _require_same(
    what: str, on_rank_0: list[str | None], here: list[str | None], decoder: BlockwiseDecoder
) -> None:
    """Refuse code that rounds in another way than rank 0's: integers would depend on the rank.

    Both are the implementation of ``what``, and why nothing faster runs.
    """
    (theirs, their_reason), (ours, our_reason) = on_rank_0, here
    if ours == theirs:
        return
    if our_reason is None and their_reason is None:
        why = f"this process runs on {decoder.device.type}, and rank 0 on something else"
    else:
        why = f"here {our_reason}" if our_reason is not None else f"there {their_reason}"
    raise ModelError(
        f"rank 0 computes {what} by {theirs}, here it would be {ours}, because {why}",
        where=decoder.checkpoint.folder,
        hint="install the same on every machine (qwenq doctor says what runs), or use CPUs of one kind",
    )
