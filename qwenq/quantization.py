"""Quantise a model by a recipe: open, calibrate, solve, write, check, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qwenq.calibration import CalibrationSet
from qwenq.calibration.load import calibration_for
from qwenq.compute.ops import fallback_notice
from qwenq.distributed import ALONE, Team
from qwenq.environment import __version__, versions
from qwenq.errors import UnsupportedError, UsageError, VerificationError
from qwenq.evals.check import CheckResult, check
from qwenq.events import Advance, Event, Listener, Notice, Start, notify, rough_time, silent
from qwenq.gptq import pipeline
from qwenq.gptq.mixed_bits import Group, MixedBits, choose_bits, groups_of, measure, sample_of
from qwenq.gptq.settings import (
    Settings,
    check_packable,
    choose_group_size,
    describe,
    every_linear,
    kept_parameters,
    module_bits,
    quantised_linears,
)
from qwenq.models import quantized_folder
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.config import by_inspection
from qwenq.models.folders import CARD, PARTIAL
from qwenq.models.gptq_config import QuantConfig, dynamic_rules, is_quantised, module_groups, packed_bytes
from qwenq.models.gptq_format import validate_quantised
from qwenq.models.identity import base_facts, model_name
from qwenq.models.machine import device_memory, resolve_device, resolve_dtype
from qwenq.models.opening import open_model
from qwenq.models.quantized_folder import LayerStore
from qwenq.models.qwen_v1 import longest_plain
from qwenq.models.random_weights import is_random
from qwenq.models.shapes import ModelShape
from qwenq.models.transformers_model import summary
from qwenq.planner.budget import Sizes, allowed_bytes
from qwenq.planner.calibration_size import calibration_size
from qwenq.planner.estimates import quantisation_seconds
from qwenq.publishing.engines import engine_verdicts, planned_gptq_folder, read_gptq_folder
from qwenq.publishing.model_card import model_card
from qwenq.recipe import Recipe
from qwenq.reporting.experts import coverage_of, coverage_sentence
from qwenq.stopping import finishing
from qwenq.storage import locked

SHORT = 10.0
"""Seconds; of fewer, no estimate is worth a line."""
LAYERS = "quantising"
"""Name of the step whose advances carry a ``LayerDone``."""


@dataclass(frozen=True)
class Quantised:
    """A quantised checkpoint.

    Attributes:
        folder: the checkpoint.
        weight_bytes, base_bytes: sizes of the weights, after and before.
        check: the comparison with the base, of the folder as read back from disk; None: random weights.
        seconds: of this run, by phase: "calibration", "layers", "write", "check".
        resumed_layers: from an earlier run, whose seconds are not among these.
    """

    folder: Path
    weight_bytes: int
    base_bytes: int
    check: CheckResult | None
    seconds: dict[str, float]
    resumed_layers: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        return {
            "folder": str(self.folder),
            "weight_bytes": self.weight_bytes,
            "base_bytes": self.base_bytes,
            "seconds": self.seconds,
            "resumed_layers": self.resumed_layers,
            "check": self.check.to_json() if self.check else None,
        }


@dataclass
class Job:
    """One run: inputs resolved, choices made, work folder open."""

    recipe: Recipe
    base: Checkpoint
    out: Path
    device: torch.device
    decoder: BlockwiseDecoder
    settings: Settings
    quant: QuantConfig  # the settings for config.json
    listener: Listener
    team: Team  # the processes that take part; this one is rank 0
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: int = 0  # layers of an earlier run
    mixed: MixedBits | None = None  # which modules have 8 bits, where a size was asked for

    @property
    def work(self) -> Path:
        """Return the work folder."""
        return self.out.with_name(self.out.name + PARTIAL)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the seconds that a phase takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = time.perf_counter() - started

    @property
    def base_bytes(self) -> int:
        """Return the bytes of all tensors of the base, as they are published."""
        published = self.base.published if self.base.foreign is None else self.base.foreign.stored
        return sum(published.info(name).nbytes for name in published.names())


def quantize(
    recipe: Recipe,
    out: Path | None,
    listener: Listener = silent,
    *,
    device: str = "auto",
    resume: bool = True,
    team: Team = ALONE,
) -> Quantised:
    """Quantise, check what was written, and only then give it its name.

    Args:
        recipe: the model and all settings.
        out: the folder to make; None: named after the model, in the current folder.
        listener: receives every choice as a notice and every layer as the result of an advance.
        device: "auto", "cpu", "cuda", "cuda:1", …
        resume: continue an unfinished run in ``OUT.partial``.
        team: further processes that take part, each in ``gptq.pipeline.run_rank``; this one is rank 0.

    Raises:
        QwenqError: see qwenq/errors.py; finished layers are kept, and the message says how to continue.
    """
    recipe = recipe.validated()
    job = _prepare(recipe, out, listener, device, team)
    budget = _budget(job)
    with job.timed("calibration"):
        calibration = calibration_for(recipe, job.base, job.device, listener, _fitting(job))
    if budget is not None:
        with job.timed("sensitivity"):
            _choose_bits(job, calibration, *budget, resume=resume)
    store = _open_store(job, calibration, resume=resume)
    _announce_duration(job, calibration.tokens.numel())
    try:
        with job.timed("layers"):
            _quantise_layers(job, calibration, store)
        with job.timed("write"):
            staged, notices = quantized_folder.stage(job.base, store, len(job.decoder.names), job.quant)
        notify(listener, notices)
        written = open_checkpoint(staged, unfinished=True)
        with job.timed("check"):
            result = _check(job, written, calibration)
        return _publish(job, store, written, calibration, result)
    finally:
        store.release()


def _prepare(recipe: Recipe, out: Path | None, listener: Listener, device: str, team: Team) -> Job:
    base = open_model(recipe.model, recipe.weights, recipe.quantize.seed)
    notify(listener, base.notices)
    _refuse_quantised(base)
    wanted = recipe.quantize
    if wanted.budget is not None:
        _refuse_budget(base, wanted.bits)
    target = _target(out, recipe, base)
    place = resolve_device(device)
    dtype, why = resolve_dtype(wanted.dtype, place)
    listener(Notice(why))
    if slower := fallback_notice(dtype, place):
        listener(Notice(slower))
    decoder = BlockwiseDecoder(base, place, dtype)
    if decoder.fallback_notice:
        listener(Notice(decoder.fallback_notice))
    bits = module_bits(decoder, wanted.module_bits, wanted.bits)
    settings = Settings.from_recipe(wanted, module_bits=bits)
    check_packable(decoder, settings)
    widths = {name: linear.in_features for name, linear in every_linear(decoder, settings).items()}
    group_size, why = choose_group_size(wanted.group_size, widths)
    listener(Notice(why))
    settings = replace(settings, group_size=group_size)
    if kept := summary(kept_parameters(decoder, settings)):
        listener(Notice(kept))
    quant = _quant_config(base, decoder, settings)
    if not wanted.any_engine:
        _refuse_without_server(decoder, settings, quant)
    listener(Notice(describe(settings)))
    return Job(recipe, base, target, place, decoder, settings, quant, listener, team)


def _refuse_budget(base: Checkpoint, bits: int) -> None:
    """Refuse, before any work, a size where there is nothing to choose, or nothing to choose by."""
    if is_random(base.config):
        raise UsageError(
            "random weights have no accuracy that bits could be chosen by",
            where="--budget",
            hint="give --module-bits, such as down_proj=8",
        )
    if bits != 4:
        raise UsageError(
            f"a budget chooses between 4 and 8 bits, and --bits is {bits}",
            where="--budget",
            hint="leave out one of the two",
        )


def _quant_config(checkpoint: Checkpoint, decoder: BlockwiseDecoder, settings: Settings) -> QuantConfig:
    """Return the settings for config.json, with rules where modules differ from the rest."""
    quant = QuantConfig(
        bits=settings.bits,
        group_size=settings.group_size,
        sym=settings.sym,
        static_groups=settings.act_order,
        damp_percent=settings.damp,
        checkpoint_format=settings.checkpoint_format,
    )
    bits = {
        spelled: settings.bits_of(name)
        for name in every_linear(decoder, settings)
        for spelled in _spellings(checkpoint, name)
    }
    kept = {
        spelled
        for block in kept_parameters(decoder, settings)
        for name in block
        for spelled in _spellings(checkpoint, name.removesuffix(".weight"))
    }
    beside = checkpoint.view.beside if checkpoint.view is not None else []
    if not (kept or beside or settings.block_bits or set(bits.values()) != {settings.bits}):
        return quant
    repeated = {"group_size": quant.group_size, "sym": quant.sym, "desc_act": quant.desc_act}
    own = [
        (f"model.layers.{layer}.{spelled}", width)
        for name, width in settings.block_bits
        for layer, _, module in [name.removeprefix("model.layers.").partition(".")]
        for spelled in _spellings(checkpoint, module)
    ]
    rules = dynamic_rules(sorted(kept), bits, quant.bits, repeated, beside, own)
    return replace(quant, dynamic=rules, modules=tuple(map(tuple, module_groups([name] for name in bits))))


def _refuse_without_server(decoder: BlockwiseDecoder, settings: Settings, quant: QuantConfig) -> None:
    """Refuse, before any work, settings with which neither vLLM nor SGLang loads the result."""
    linears = {
        name: (linear.out_features, linear.in_features)
        for name, linear in every_linear(decoder, settings).items()
    }
    kept = {name.removesuffix(".weight") for block in kept_parameters(decoder, settings) for name in block}
    verdicts = engine_verdicts(planned_gptq_folder(decoder.checkpoint.config, quant, linears, kept))
    able = [verdict.engine for verdict in verdicts if verdict.loads]
    if "vllm" in able or "sglang" in able:
        return
    (problem, *_) = verdicts[0].problems
    raise UsageError(
        f"neither vLLM nor SGLang would load the result: {problem.reason}",
        where=decoder.checkpoint.folder,
        hint=f"{problem.remedy}; or add --any-engine: {' and '.join(able) or 'no engine'} would load it",
    )


def _spellings(checkpoint: Checkpoint, module: str) -> list[str]:
    """Return the names of a module within a block: in transformers' model, and in files where they differ.

    Some engines call a Mixtral's modules as its files do, some as transformers does: rules have both.
    """
    if checkpoint.view is None:
        return [module]
    stored = checkpoint.view.published(f"model.layers.0.{module}.weight")
    return list(dict.fromkeys([module, stored.partition(".layers.0.")[2].removesuffix(".weight")]))


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    if is_quantised(checkpoint.config):
        raise UsageError(
            "this model is already quantised",
            where=checkpoint.folder,
            hint="name the full-precision model; `qwenq check` compares a quantised one with it",
        )
    if checkpoint.foreign is not None and checkpoint.foreign.format.bits < 8:
        raise UsageError(
            f"this model is already quantised: {checkpoint.foreign.format.name}",
            where=checkpoint.folder,
            hint="name the full-precision model, or its FP8 version",
        )


def _target(out: Path | None, recipe: Recipe, checkpoint: Checkpoint) -> Path:
    """Return the output folder; refuse one that holds something or cannot be made."""
    name = model_name(recipe.model) if recipe.model or checkpoint.on_disk else checkpoint.folder.name
    target = (out or Path(f"{name}-GPTQ-Int{recipe.quantize.bits}")).absolute()
    quantized_folder.clean_up_after_kill(target, recipe.to_json(), checkpoint.fingerprint)
    quantized_folder.require_free(target, "--out")
    return target


def _fitting(job: Job) -> tuple[int, int] | None:
    """Return sizes of calibration that fit the memory, and say so; None where the usual ones do."""
    wanted = job.recipe.calibration
    shape = _shape(job)
    if shape is None or wanted.source.endswith(".safetensors"):  # a saved set has its own sizes
        return None
    on_gpu = job.device.type == "cuda"
    size = calibration_size(
        shape,
        None if wanted.samples == "auto" else wanted.samples,
        None if wanted.seq_len == "auto" else wanted.seq_len,
        longest=longest_plain(job.base.config),
        dtype=str(job.decoder.dtype).removeprefix("torch."),
        on_gpu=on_gpu,
        limit=device_memory(job.device) // (1 if on_gpu else job.team.world),
        ranks=job.team.world,
    )
    notify(job.listener, size.notices("GPU memory" if on_gpu else "RAM"))
    return (size.samples, size.seq_len) if size.usual is not None else None


def _shape(job: Job) -> ModelShape | None:
    """Return the sizes of the model; None where they are not known, as of models by inspection."""
    try:
        return ModelShape.from_config(job.base.config)
    except UnsupportedError:
        return None


def _budget(job: Job) -> tuple[list[Group], Sizes, int] | None:
    """Return the groups whose bits are open, what the size is made of, and the bytes that they may take."""
    if (budget := job.recipe.quantize.budget) is None:
        return None
    groups = groups_of(job.decoder, job.settings)
    if not groups:
        raise UsageError(
            "--module-bits names every linear layer: no bits are left to choose",
            where="--budget",
            hint="leave out one of the two, or name fewer layers",
        )
    sizes = _sizes(job, groups)
    return groups, sizes, allowed_bytes(budget, sizes, _shape(job))


def _choose_bits(
    job: Job, calibration: CalibrationSet, groups: list[Group], sizes: Sizes, allowed: int, *, resume: bool
) -> None:
    """Choose 4 or 8 bits by module for the size that the recipe asks for, by what each costs in 4 bits."""
    tokens = sample_of(calibration.tokens, job.device)
    facts = pipeline.run_facts(job.base, calibration.fingerprint, job.settings, job.decoder, job.team)
    with locked(job.work, quantized_folder.LOCK), finishing("this layer is measured"):
        kept = job.work / quantized_folder.SENSITIVITY
        if not resume:
            kept.unlink(missing_ok=True)
        divergences = measure(job.decoder, tokens, job.settings, groups, kept, facts, job.listener)
    job.mixed = choose_bits(groups, divergences, allowed, sizes.fixed, tokens.numel())
    job.settings = replace(job.settings, block_bits=job.mixed.block_bits)
    job.quant = _quant_config(job.base, job.decoder, job.settings)
    job.listener(Notice(job.mixed.sentence))


def _sizes(job: Job, groups: list[Group]) -> Sizes:
    """Return what the size of the model is made of."""
    fixed, settings = job.base_bytes, job.settings
    open_modules = {f"{group.layer}.{name}" for group in groups for name in group.modules}
    for layer, (prefix, block) in enumerate(zip(job.decoder.names, job.decoder.blocks, strict=True)):
        for name, linear in quantised_linears(block, settings).items():
            fixed -= job.base.info(f"{prefix}.{name}.weight").nbytes
            if f"{layer}.{name}" not in open_modules:
                sides = linear.out_features, linear.in_features
                fixed += packed_bytes(*sides, settings.bits_of(name), settings.group_size)
    return Sizes(
        sum(group.elements for group in groups),
        sum(group.few_bytes for group in groups),
        sum(group.many_bytes for group in groups),
        fixed,
    )


def _open_store(job: Job, calibration: CalibrationSet, *, resume: bool) -> LayerStore:
    facts = pipeline.run_facts(job.base, calibration.fingerprint, job.settings, job.decoder, job.team)
    store = LayerStore(job.work, facts, resume=resume)
    job.resumed = store.finished()
    if job.resumed:
        found = f"{job.resumed} of {len(job.decoder.names)} layers are already in {job.work}"
        job.listener(Notice(f"resuming: {found}"))
    return store


def product_rate(dtype: torch.dtype, side: int = 1024, seconds: float = 0.1) -> float:
    """Return the operations a second of a large matrix product on the CPU, timed for a tenth of a second."""
    a, b = (torch.ones(side, side, dtype=dtype) for _ in range(2))
    a @ b  # the first one sets up what computes it
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        a @ b
        count += 1
    return 2 * side**3 * count / passed


def _announce_duration(job: Job, tokens: int) -> None:
    """Say about how long the layers take, on one CPU: elsewhere no operations were compared with times."""
    shape, left = _shape(job), len(job.decoder.names) - job.resumed
    if shape is None or not left or job.device.type != "cpu" or job.team.launched:
        return
    rates = product_rate(job.decoder.dtype), product_rate(torch.float32)
    asymmetric = job.settings.asymmetric_calibration > 0
    whole = quantisation_seconds(shape, tokens, rates=rates, asymmetric=asymmetric) or 0.0
    seconds = whole * left / len(job.decoder.names)
    if seconds < SHORT:
        return
    timed = f"a matrix product that was timed here ({rates[0] / 1e9:.0f} GFLOP/s)"
    text = f"{left} layers take about {rough_time(seconds)} by {timed}; the check comes on top"
    job.listener(Notice(text))


def _quantise_layers(job: Job, calibration: CalibrationSet, store: LayerStore) -> None:
    def on_layer(done: pipeline.LayerDone) -> None:
        job.listener(Advance(LAYERS, done.index + 1, done.total, done))
        raised = {} if done.resumed else done.raised_damping(job.settings.damp)
        for damp, names in raised.items():
            at = f"layer {done.index + 1}, {', '.join(names)}"
            job.listener(Notice(f"{at}: damping raised to {damp:.3g}"))

    job.listener(Start(LAYERS, len(job.decoder.names), "layers"))
    pipeline.send_job(job.team, job.decoder, calibration.tokens, job.settings)
    with finishing(pipeline.LAYER_IS_STORED):
        pipeline.quantise_layers(job.decoder, calibration.tokens, job.settings, store, on_layer, job.team)


def _check(job: Job, written: Checkpoint, calibration: CalibrationSet) -> CheckResult | None:
    """Compare the written folder with the base; refuse a broken one."""
    validate_quantised(written.source, job.quant)
    if is_random(job.base.config):
        job.listener(Notice("random weights: the files are complete; their accuracy is not measured"))
        return None

    def progress_only(event: Event) -> None:  # its notices repeat those before the layers
        if not isinstance(event, Notice):
            job.listener(event)

    result = check(
        written,
        job.base,
        calibration.held_out,
        device=job.device,
        dtype=job.decoder.dtype,
        listener=progress_only,
        step="checking what was written",
    )
    if result.broken:
        raise VerificationError(
            f"the quantised model is broken: {result.verdict.sentence}",
            where=written.folder,
            hint="nothing was published; try --bits 8, more calibration text, or --dtype float32",
        )
    return result


def _publish(
    job: Job,
    store: LayerStore,
    written: Checkpoint,
    calibration: CalibrationSet,
    result: CheckResult | None,
) -> Quantised:
    staged = written.folder
    blocks = zip(job.decoder.names, kept_parameters(job.decoder, job.settings), strict=True)
    kept = {f"{prefix}.{name}": reason for prefix, block in blocks for name, reason in block.items()}
    manifest = {
        "format": "qwenq-1",
        "made_by": f"qwenq {__version__}",
        "base": base_facts(job.base, job.recipe.model, job.out),
        "recipe": job.recipe.to_json(),
        "quantization": job.quant.to_config_json(),
        "calibration": calibration.manifest.model_dump(mode="json"),
        "computed_in": pipeline.computed_in(job.decoder, job.settings, job.team),
        "versions": versions(),
        "seconds": {name: round(value, 2) for name, value in job.seconds.items()},
        "resumed_layers": job.resumed,  # whose seconds are those of earlier runs
        "modules": (modules := dict(pipeline.module_errors(store, len(job.decoder.names)))),
        **({"mixed_bits": job.mixed.to_json()} if job.mixed else {}),
        **pipeline.expert_coverage(modules),
        **({"not_quantised": kept} if kept else {}),
        "check": result.to_json() if result else None,
    }
    weight_bytes = sum(file.stat().st_size for file in staged.glob("*.safetensors"))
    files = {file.name: {"bytes": file.stat().st_size} for file in staged.iterdir() if file.is_file()}
    card = model_card(job.out.name, manifest | {"files": files}, written, job.base.companions)
    (staged / CARD).write_text(card, encoding="utf-8")
    where_it_loads = _where_it_loads(written)
    quantized_folder.publish(staged, job.out, manifest)
    store.discard()
    if coverage := coverage_of(manifest.get("expert_tokens")):
        job.listener(Notice(coverage_sentence(coverage)))
    job.listener(Notice(where_it_loads))
    return Quantised(job.out, weight_bytes, job.base_bytes, result, job.seconds, job.resumed)


def _where_it_loads(written: Checkpoint) -> str:
    """Return a line on which engines load the folder, and the first reason where one does not."""
    verdicts = engine_verdicts(read_gptq_folder(written))
    able = ", ".join(verdict.engine for verdict in verdicts if verdict.loads) or "no engine"
    other = [f"{v.engine} ({v.problems[0].reason})" for v in verdicts if not v.loads]
    said = f"loads in {able}" + (f"; not in {'; '.join(other)}" if other else "")
    untested = " (by its layout: no test here runs this model type in them)"
    return said + untested if by_inspection(written.config) else said
