"""Plan a model from its config alone: find it, and work out its bytes, memory and speed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import HubError, UsageError
from qwenq.models import catalogue
from qwenq.models.block_shapes import (
    ROW_PARALLEL,
    Linear,
    splits_groups,
    unshared_heads,
    vision_parameters,
)
from qwenq.models.bundled import is_bundled
from qwenq.models.config import read_config, text_config
from qwenq.models.folders import local_path
from qwenq.models.hub import network_errors
from qwenq.models.shapes import ITEMSIZE, ModelShape
from qwenq.models.unsupported import refuse_by_name
from qwenq.planner.calibration_size import CalibrationSize, calibration_size
from qwenq.planner.estimates import (
    GIB,
    GenerationMemory,
    Gpu,
    SpeedBound,
    generation_memory,
    quantisation_seconds,
    speed_bound,
    weight_bytes_per_step,
)


@dataclass(frozen=True)
class PlannedModel:
    """A model as far as a plan needs it."""

    name: str
    origin: str  # where the sizes come from, for the reader
    shape: ModelShape
    dtype: str  # of the unquantised weights
    entry: catalogue.Entry | None = None  # in the catalogue, if it is there
    # bytes that lie beside the language model's tensors, and stay as they are when it is quantised: draft
    # layers, a vision tower, tensors of another dtype
    copied: int = 0
    copied_note: str | None = None  # what is known of them, for the reader


def find_model(model: str | None, weights: str = "stored") -> PlannedModel:
    """Find a catalogue name, a folder (or its config.json), or a hub id; None is the bundled model.

    With ``weights`` "random" it is a catalogue name, with the bfloat16 weights of `--weights random`.
    """
    if model is None or is_bundled(model):
        model = catalogue.BUNDLED
    if weights == "random":
        drawn = catalogue.entry(model)
        return PlannedModel(drawn.names[0], _origin(drawn, "random weights"), drawn.shape, "bfloat16")
    if weights != "stored":
        raise UsageError(f"{weights!r} weights", where="--weights", hint="use stored or random")
    if not model.strip():  # `plan "$UNSET"` must not mean the current folder
        raise UsageError(
            "MODEL is empty", hint="leave it out, or name a folder, a catalogue name or a hub id"
        )
    path = local_path(model, "MODEL")
    if path.exists():
        folder = path if path.is_dir() else path.parent
        return _from_config(folder, str(path), str(path))
    entry = catalogue.find(model)
    if entry is not None:
        shape, dtype = entry.shape, entry.dtype_of(model)
        copied, note = _beside(shape, dtype, entry.vision_parameters, entry.beside(model))
        return PlannedModel(entry.names[0], _origin(entry), shape, dtype, entry, copied, note)
    refuse_by_name(model)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_config(_hub_config(model).parent, model, "config.json from the hub")
    raise UsageError(
        f"{model!r} is neither a folder nor a catalogue name",
        where="MODEL",
        hint=f"did you mean {' or '.join(catalogue.suggestions(model))}? A hub id looks like Qwen/Qwen3-8B",
    )


def _origin(entry: catalogue.Entry, *more: str) -> str:
    """Return where the sizes of an entry come from."""
    return ", ".join(["catalogue", *more, *([entry.secondary] if entry.secondary else [])])


def _from_config(folder: Path, name: str, origin: str) -> PlannedModel:
    config, _ = read_config(folder)
    text = text_config(config)
    dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    quantised = bool(config.get("quantization_config"))
    if quantised or dtype not in ("bfloat16", "float16", "float32"):
        dtype = "bfloat16"  # the sizes of the model before it was quantised
    shape = ModelShape.from_config(text)
    files = [] if quantised else sorted(folder.glob("*.safetensors"))
    tower = config.get("vision_config")
    vision = 0 if tower is None else vision_parameters(tower if isinstance(tower, dict) else {})
    copied, note = _stored_beside(files, shape.bytes(dtype)) or _beside(
        shape, dtype, vision, (vision or 0) * ITEMSIZE[dtype]
    )
    return PlannedModel(name, origin, shape, dtype, copied=copied, copied_note=note)


def _stored_beside(files: list[Path], language_model: int) -> tuple[int, str | None] | None:
    """Return the bytes of a folder's tensors beyond the language model's; None: not all of them are there."""
    if not files:
        return None
    from qwenq.models.safetensors_files import read_header

    beside = sum(info.nbytes for file in files for info in read_header(file).values()) - language_model
    if beside < 0:
        return None
    return beside, "lie beside the language model in its files, and are copied" if beside else None


def _beside(shape: ModelShape, dtype: str, vision: int | None, more: int) -> tuple[int, str | None]:
    """Return the bytes of the draft layers and ``more`` that lie beside the language model, and a note.

    ``vision`` are the elements of the vision tower; None: it has one of unknown size.
    """
    drafts = shape.draft_parameters * ITEMSIZE[dtype]
    parts = [name for name, there in (("draft layers (mtp)", drafts), ("the vision tower", vision)) if there]
    notes = [f"of {' and '.join(parts)} are copied"] if parts else []
    if vision is None:
        notes.append("the vision tower is copied, too, and not counted")
    return drafts + more, "; ".join(notes) or None


def _hub_config(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    known: tuple[type[Exception], ...] = (HFValidationError, OSError, *network_errors())
    try:
        return Path(hf_hub_download(model, "config.json"))
    except known as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise HubError(
            f"config.json of {model} could not be fetched: {lines[0]}",
            where=model,
            hint=f"check the id and the network; the catalogue has {', '.join(catalogue.suggestions(model))}",
        ) from error


QUANTISED_DTYPE = "float16"  # of activations and cache of a quantised model
_MOST = 10**9
"""Tokens, sequences and GPUs at most."""
_LABELS = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}


@dataclass(frozen=True)
class PlanOptions:
    """The options of a plan."""

    bits: tuple[int, ...] = (4, 8)
    context: int = 8192
    batch: int = 1
    gpus: tuple[Gpu, ...] = ()
    tensor_parallel: tuple[int, ...] = (1,)
    group_size: int | None = None  # None is ``auto``
    samples: int | None = None  # of calibration; None: as ``quantize`` takes on a CPU, or on the GPUs named
    seq_len: int | None = None
    # bytes of the machine that quantises on its CPU, where no GPU is named; None: unknown
    ram: int | None = None


@dataclass(frozen=True)
class Precision:
    """One way to store the model."""

    label: str  # BF16, FP16, FP32, Int8 or Int4
    dtype: str  # of activations and cache
    group_size: int | None  # None where nothing is quantised
    bytes: int  # of the tensors on disk, file headers excluded; what is not quantised keeps the stored dtype
    loaded: int  # of the language model's tensors once they are loaded in ``dtype``
    # of those, what one token reads: not the experts that it is not routed to, and of an untied embedding
    # nothing
    active: int
    idle: int  # bytes of experts that a step of the batch does not read
    # of the publisher's own file, where it differs (see ``published_note``)
    published_bytes: int | None = None
    published_note: str | None = None


@dataclass(frozen=True)
class Quantisation:
    """Quantising on one GPU (None: on a CPU, in RAM)."""

    gpu: str | None
    size: CalibrationSize  # as ``quantize`` chooses it there
    fits: bool | None = None  # None where the memory is not known
    # the most sequences that fit, where those asked for do not: a power of two, and their peak
    fitting: tuple[int, int] | None = None
    # that the layers take, an estimate from a measured rate; None: no rate was measured
    hours: float | None = None


@dataclass(frozen=True)
class Split:
    """Whether ``gpus`` GPUs can share a model: without obstacles they can."""

    gpus: int
    obstacles: tuple[str, ...]

    @property
    def possible(self) -> bool:
        """Return whether there are no obstacles."""
        return not self.obstacles


def split(shape: ModelShape, gpus: int, group_size: int | None) -> Split:
    """Find what keeps ``gpus`` GPUs from sharing a model; ``group_size`` None: unquantised."""
    linear = shape.linear_attention
    recurrent = (linear.key_heads, linear.value_heads) if linear else ()
    obstacles = unshared_heads(gpus, shape.heads, shape.kv_heads, recurrent)
    for module in shape.linears():
        if module.leaf not in ROW_PARALLEL:
            continue
        if group_size is None or group_size == -1:
            if module.leaf == "down_proj" and module.columns % gpus:
                dense = module.name == "mlp.down_proj"
                channels = "FFN channels" if dense else f"channels of {_short(module)}"
                obstacles.append(f"{module.columns} {channels}")
        elif splits_groups(module.columns, group_size, gpus):
            obstacles.append(f"{module.columns // group_size} groups of {_short(module)}")
    return Split(gpus, tuple(obstacles))


def _short(module: Linear) -> str:
    if module.copies > 1:
        return f"an expert's {module.leaf}"
    return f"the shared expert's {module.leaf}" if ".shared_expert." in module.name else module.leaf


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
    options: PlanOptions
    parameters: int
    active_parameters: int
    copied_bytes: int
    copied_note: str | None
    precisions: list[Precision]
    generation: dict[str, GenerationMemory]
    quantisation: list[Quantisation]
    deployments: list[Deployment]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def make_plan(model: PlannedModel, options: PlanOptions) -> Plan:
    """Work out a plan."""
    _check_bounds(options)
    shape = model.shape
    group_size = options.group_size if options.group_size is not None else shape.auto_group_size()
    precisions = _precisions(model, options, group_size)
    generation = {
        item.label: generation_memory(
            shape, item.loaded, dtype=item.dtype, context=options.context, batch=options.batch
        )
        for item in precisions
    }
    return Plan(
        model=model.name,
        origin=model.origin,
        shape=shape,
        options=options,
        parameters=shape.parameters,
        active_parameters=shape.active_parameters,
        copied_bytes=model.copied,
        copied_note=model.copied_note,
        precisions=precisions,
        generation=generation,
        quantisation=[_quantisation(model, options, gpu) for gpu in options.gpus or (None,)],
        deployments=[
            _deployment(shape, item, generation[item.label], gpu, count, options)
            for gpu in options.gpus
            for item in precisions
            for count in options.tensor_parallel
        ],
    )


def _precisions(model: PlannedModel, options: PlanOptions, group_size: int) -> list[Precision]:
    shape, dtype, size = model.shape, model.dtype, model.shape.bytes(model.dtype)
    twice = model.entry is not None and model.entry.stored_head
    head = shape.embedding_parameters * ITEMSIZE[dtype] if twice else 0
    note = (
        "the publisher's file stores the tied head a second time, and quantising keeps it" if twice else None
    )

    def precision(
        label: str, bits: int | None, loaded_in: str, size: int, loaded: int, published: int | None
    ) -> Precision:
        chosen = None if bits is None else group_size
        one, idle = (
            shape.idle_bytes(loaded_in, tokens, bits=bits, group_size=chosen or -1)
            for tokens in (1, options.batch)
        )
        active = weight_bytes_per_step(shape, loaded, loaded_in, one)
        size += model.copied
        return Precision(label, loaded_in, chosen, size, loaded, active, idle, published, note)

    found = [precision(_LABELS[dtype], None, dtype, size, size, size + head if twice else None)]
    for bits in sorted(options.bits, reverse=True):
        size = shape.quantised_bytes(bits, group_size, dtype)
        loaded = shape.quantised_bytes(bits, group_size, QUANTISED_DTYPE)
        published = size + head if twice else None
        if shape.fused_qkv:  # Qwen v1's own GPTQ files
            note = "Qwen v1's own GPTQ layout: fused c_attn, a zero bias beside every module"
            published = shape.quantised_bytes(bits, group_size, zero_biases=True, fused_qkv=True)
        found.append(precision(f"Int{bits}", bits, QUANTISED_DTYPE, size, loaded, published))
    return found


def _quantisation(model: PlannedModel, options: PlanOptions, gpu: Gpu | None) -> Quantisation:
    def sized(samples: int | None) -> CalibrationSize:
        return calibration_size(
            model.shape,
            samples,
            options.seq_len,
            longest=model.shape.context,
            dtype=model.dtype,
            on_gpu=gpu is not None,
            limit=options.ram if gpu is None else int(gpu.memory_gib * GIB),
        )

    size, name = sized(options.samples), gpu.name if gpu else None
    seconds = quantisation_seconds(model.shape, size.samples * size.seq_len, gpu)
    hours = None if seconds is None else seconds / 3600
    if size.fits is not False or options.samples is None:
        return Quantisation(name, size, size.fits, hours=hours)
    fewer = (sized(1 << n) for n in range((size.samples - 1).bit_length() - 1, -1, -1))
    fitting = next(((one.samples, one.memory.peak) for one in fewer if one.fits), None)
    return Quantisation(name, size, False, fitting)


def _deployment(
    shape: ModelShape, item: Precision, memory: GenerationMemory, gpu: Gpu, count: int, options: PlanOptions
) -> Deployment:
    cache = memory.kv_cache + memory.states
    activations = memory.peak - memory.weights - cache  # on every GPU, which is an upper bound
    shared = -(-(memory.weights + memory.states) // count)
    kv_cache = memory.kv_cache // min(count, shape.kv_heads)  # fewer heads than GPUs are replicated
    need = shared + kv_cache + activations
    bound = speed_bound(
        shape,
        item.loaded,
        gpu,
        dtype=item.dtype,
        context=options.context,
        batch=options.batch,
        gpus=count,
        idle=item.idle,
    )
    return Deployment(
        item.label, split(shape, count, item.group_size), need, need <= gpu.memory_gib * GIB, bound
    )


def _check_bounds(options: PlanOptions) -> None:
    numbers = [
        ("--context", options.context),
        ("--batch", options.batch),
        ("--samples", options.samples),
        ("--seq-len", options.seq_len),
        *(("--tp", count) for count in sorted(options.tensor_parallel)),
    ]
    for option, value in numbers:
        if value is not None and value < 1:
            raise UsageError(f"{option} has to be at least 1, not {value}", where=option)
        if value is not None and value > _MOST:
            raise UsageError(f"{option} is at most {_MOST:,}", where=option)
