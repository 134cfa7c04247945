"""Make a plan: everything that follows from a model's sizes and the user's options, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qwenq.errors import UsageError
from qwenq.models.shapes import ITEMSIZE, ModelShape
from qwenq.plan.gpus import Gpu
from qwenq.plan.memory import (
    GIB,
    GenerationMemory,
    QuantisationMemory,
    generation_memory,
    quantisation_memory,
)
from qwenq.plan.model import PlannedModel
from qwenq.plan.speed import SpeedBound, speed_bound
from qwenq.plan.tensor_parallel import TENSOR_PARALLEL, Padding, Split, kv_share, padding, split

QUANTISED_DTYPE = "float16"  # of activations and cache of a quantised model
_MOST = 10**9
"""Tokens, sequences and GPUs at most."""
_LABELS = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
_ON_CPU, _ON_GPU = (48, 256), (128, 2048)
"""Sequences and tokens of each that ``quantize`` takes by default (``calibration.choose``)."""


@dataclass(frozen=True)
class Wishes:
    """The options of a plan.

    Attributes:
        group_size: None is ``auto``.
        samples, seq_len: of calibration; None: as ``quantize`` takes on a CPU, or on the GPUs named.
    """

    bits: tuple[int, ...] = (4, 8)
    context: int = 8192
    batch: int = 1
    gpus: tuple[Gpu, ...] = ()
    tensor_parallel: tuple[int, ...] = (1,)
    group_size: int | None = None
    samples: int | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class Precision:
    """One way to store the model.

    Attributes:
        label: BF16, FP16, FP32, Int8 or Int4.
        dtype: of activations and cache.
        group_size: None where nothing is quantised.
        bytes: of the tensors on disk, file headers excluded; what is not quantised keeps the stored dtype.
        loaded: of the tensors once they are loaded in ``dtype``.
        published_bytes: of the publisher's own file, where it differs (see ``published_note``).
    """

    label: str
    dtype: str
    group_size: int | None
    bytes: int
    loaded: int
    published_bytes: int | None = None
    published_note: str | None = None


@dataclass(frozen=True)
class Quantisation:
    """Quantising on one GPU (None: on a CPU, in RAM).

    Attributes:
        fits: None on a CPU, whose memory is not known here.
        fitting: the most sequences that fit, a power of two, and their peak; None: ``samples`` fit, or none.
    """

    gpu: str | None
    samples: int
    seq_len: int
    memory: QuantisationMemory
    fits: bool | None = None
    fitting: tuple[int, int] | None = None


@dataclass(frozen=True)
class Deployment:
    """One precision on some GPUs of one kind; memory is per GPU, for a prompt that fills the context."""

    precision: str
    split: Split
    memory: int
    fits: bool
    speed: SpeedBound


@dataclass(frozen=True)
class Plan:
    """The whole answer of ``qwenq plan``; bytes and tokens per second throughout."""

    model: str
    origin: str
    shape: ModelShape
    wishes: Wishes
    parameters: int
    precisions: list[Precision]
    generation: dict[str, GenerationMemory]
    quantisation: list[Quantisation]
    deployments: list[Deployment]
    padding: Padding | None
    padded_bytes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def make_plan(model: PlannedModel, wishes: Wishes) -> Plan:
    """Work out a plan.

    Raises:
        UsageError: an option out of bounds, or one that does not suit the model.
    """
    _check_bounds(wishes)
    shape = model.shape
    group_size = wishes.group_size if wishes.group_size is not None else shape.auto_group_size()
    precisions = _precisions(model, wishes, group_size)
    generation = {
        item.label: generation_memory(
            shape, item.loaded, dtype=item.dtype, context=wishes.context, batch=wishes.batch
        )
        for item in precisions
    }
    several = wishes.tensor_parallel if max(wishes.tensor_parallel) > 1 else TENSOR_PARALLEL
    padded = padding(shape, group_size, several)
    return Plan(
        model=model.name,
        origin=model.origin,
        shape=shape,
        wishes=wishes,
        parameters=shape.parameters,
        precisions=precisions,
        generation=generation,
        quantisation=[_quantisation(model, wishes, gpu) for gpu in wishes.gpus or (None,)],
        deployments=[
            _deployment(shape, item, generation[item.label], gpu, count, wishes)
            for gpu in wishes.gpus
            for item in precisions
            for count in wishes.tensor_parallel
        ],
        padding=padded,
        padded_bytes=_padded_bytes(model, padded, precisions),
    )


def _precisions(model: PlannedModel, wishes: Wishes, group_size: int) -> list[Precision]:
    shape, dtype, size = model.shape, model.dtype, model.shape.bytes(model.dtype)
    twice = model.entry is not None and model.entry.stored_head
    head = shape.embedding_parameters * ITEMSIZE[dtype] if twice else 0
    note = (
        "the publisher's file stores the tied head a second time, and quantising keeps it" if twice else None
    )
    found = [Precision(_LABELS[dtype], dtype, None, size, size, size + head if twice else None, note)]
    for bits in sorted(wishes.bits, reverse=True):
        size = shape.quantised_bytes(bits, group_size, dtype)
        loaded = shape.quantised_bytes(bits, group_size, QUANTISED_DTYPE)
        published = size + head if twice else None
        if shape.fused_qkv:  # Qwen v1's own GPTQ files
            note = "Qwen v1's own GPTQ layout: fused c_attn, a zero bias beside every module"
            published = shape.quantised_bytes(bits, group_size, zero_biases=True, fused_qkv=True)
        found.append(Precision(f"Int{bits}", QUANTISED_DTYPE, group_size, size, loaded, published, note))
    return found


def _quantisation(model: PlannedModel, wishes: Wishes, gpu: Gpu | None) -> Quantisation:
    shape = model.shape
    samples, seq_len = _ON_GPU if gpu else _ON_CPU
    seq_len = min(seq_len, shape.context or seq_len)
    samples, seq_len = wishes.samples or samples, wishes.seq_len or seq_len

    def memory(samples: int) -> QuantisationMemory:
        return quantisation_memory(shape, samples=samples, seq_len=seq_len, dtype=model.dtype)

    if gpu is None:
        return Quantisation(None, samples, seq_len, memory(samples))
    limit = gpu.memory_gib * GIB
    if memory(samples).peak <= limit:
        return Quantisation(gpu.name, samples, seq_len, memory(samples), fits=True)
    fewer = (1 << n for n in range((samples - 1).bit_length() - 1, -1, -1))
    fitting = next(((n, peak) for n in fewer if (peak := memory(n).peak) <= limit), None)
    return Quantisation(gpu.name, samples, seq_len, memory(samples), fits=False, fitting=fitting)


def _deployment(
    shape: ModelShape, item: Precision, memory: GenerationMemory, gpu: Gpu, count: int, wishes: Wishes
) -> Deployment:
    activations = memory.peak - memory.weights - memory.kv_cache  # on every GPU, which is an upper bound
    need = -(-memory.weights // count) + int(memory.kv_cache * kv_share(shape, count)) + activations
    bound = speed_bound(
        shape,
        item.loaded,
        gpu,
        dtype=item.dtype,
        context=wishes.context,
        batch=wishes.batch,
        gpus=count,
    )
    return Deployment(
        item.label, split(shape, count, item.group_size), need, need <= gpu.memory_gib * GIB, bound
    )


def _padded_bytes(model: PlannedModel, padded: Padding | None, found: list[Precision]) -> dict[str, int]:
    if padded is None:
        return {}
    wider = model.shape.with_ffn(padded.to)
    return {
        item.label: wider.bytes(item.dtype)
        if item.group_size is None
        else wider.quantised_bytes(int(item.label.removeprefix("Int")), item.group_size, model.dtype)
        for item in found
    }


def _check_bounds(wishes: Wishes) -> None:
    numbers = {
        "--context": (wishes.context,),
        "--batch": (wishes.batch,),
        "--samples": () if wishes.samples is None else (wishes.samples,),
        "--seq-len": () if wishes.seq_len is None else (wishes.seq_len,),
        "--tp": wishes.tensor_parallel,
    }
    for option, values in numbers.items():
        if any(value < 1 for value in values):
            raise UsageError(f"{option} has to be at least 1, not {min(values)}", where=option)
        if any(value > _MOST for value in values):
            raise UsageError(f"{option} is at most {_MOST:,}", where=option)
