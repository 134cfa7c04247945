"""Estimate the seconds and bytes of each point of a sweep, and share out its time budget.

Seconds are estimates, from a copy, a product and the start of a process timed on the device: good enough to
share out a budget, and never reported as a measurement. Bytes of weights and cache are counted as they are
run, and those of a prompt estimated from its products, so that what cannot fit is not tried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenq.errors import UsageError
from qwenq.models.shapes import ITEMSIZE, ModelShape
from qwenq.profiling.spec import Point
from qwenq.storage import readable_bytes

_LOAD_RATE = 0.4e9  # bytes of weights read, checked and rearranged in a second
_MAKING_RATE = 0.1e9  # parameters rounded on the fly in a second: what one core rounds
_DRAWING_RATE = {"cpu": 0.1e9, "cuda": 5e9}
"""Parameters drawn at random in a second, on the device that runs them; a guess for GPUs."""
_STORED_BYTES = 2  # of a parameter in the file that a model is rounded from: what nearly all are stored in
_EFFICIENCY = 0.4
"""Share of a copy's bandwidth, and of a large product's rate, that a model reaches; a guess for estimates."""
_STEP_SECONDS, _SLOW_STEP_SECONDS = 0.004, 0.025
"""Seconds of a decoding step besides memory: Python, launches; the second for transformers."""
_SPLIT_SECONDS = 15.0
_STEP_LAYOUT = ("grouped", "best")
"""Attentions that may lay the cache out for decode steps on a CPU, in float32 (``runtime.cache``)."""
_SLOW_STEP = 0.05  # seconds of a decoding step from which few of them are timed at a position
POSITIONS = 9  # of a round of decoding that are timed, at most
_OVERHEAD_BYTES = {"cpu": 1_000_000_000, "cuda": 1_500_000_000}


@dataclass(frozen=True)
class Device:
    """A device as the probe found it."""

    device: str  # ``cpu``, ``cuda`` or ``cuda:1``
    free_bytes: int
    copy_bytes_per_s: float
    operations_per_s: float
    dtype: str  # what ``auto`` computes in there
    start_seconds: float  # from starting a process there until its libraries were read

    @property
    def kind(self) -> str:
        """Return ``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Planned:
    """A point with its estimates."""

    point: Point
    load: float  # seconds until it can begin: a process, its libraries, the model
    work: float  # seconds of measuring without a limit
    least: float  # seconds of measuring each thing once
    nbytes: int  # memory for weights, cache and prompt
    too_large: str | None = None  # why it cannot run here at all; None: it can

    @property
    def seconds(self) -> float:
        """Return the seconds without a limit."""
        return self.load + self.work

    @property
    def needed(self) -> float:
        """Return the seconds without which starting the point is of no use."""
        return self.load + self.least


@dataclass(frozen=True)
class PlannedSweep:
    """All points of a sweep, as it is announced before the first one."""

    points: Sequence[Planned]
    device: Device
    budget: float | None  # seconds that the sweep may take; None: any
    folder: Path  # of the run


def plan(points: Sequence[Point], shapes: Mapping[str, ModelShape], device: Device) -> list[Planned]:
    """Return the estimates of every point; ``shapes`` by model name."""
    return [_planned(point, shapes[point.subject.model.name], device) for point in points]


def allowances(planned: Sequence[Planned], budget: float | None) -> list[float | None]:
    """Share a budget in seconds among points.

    In their order, the cheapest first in a sweep, points get what they need to load and to measure once; one
    for which too little is left gets nothing. The remainder is shared in proportion to what the points could
    use. The sweep asks again before each point, so that seconds that a point did not use go to the rest.
    """
    if budget is None:
        return [None] * len(planned)
    left, runs = budget, []
    for each in planned:
        runs.append(each.too_large is None and each.needed <= left)
        left -= each.needed if runs[-1] else 0.0
    useful = [
        max(0.0, each.work - each.least) if run else 0.0 for each, run in zip(planned, runs, strict=True)
    ]
    total = sum(useful) or 1.0
    return [
        each.needed + left * more / total if run else 0.0
        for each, more, run in zip(planned, useful, runs, strict=True)
    ]


def parse_budget(text: str) -> float:
    """Return the seconds of ``90``, ``90s``, ``10m``, ``1h`` or ``1h30m``."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise UsageError(f"{text!r} is not a duration", where="--budget", hint="write 90s, 10m or 1h30m")
    return total


def read_device(content: dict[str, Any]) -> Device:
    """Return the device that the probe found."""
    if error := content.get("error"):
        raise UsageError(error["what"], where=error["where"], hint=error["hint"])
    return Device(**content)


def _planned(point: Point, shape: ModelShape, device: Device) -> Planned:
    dtype = device.dtype if point.subject.dtype == "auto" else point.subject.dtype
    weights = _weight_bytes(point, shape, dtype) // point.tp
    rearranged = device.kind == "cpu" and point.engine == "fast" and point.attention in _STEP_LAYOUT
    cache_dtype = "float32" if rearranged else dtype
    tokens = point.context + point.tokens
    cache = (shape.kv_bytes_per_token(cache_dtype) * tokens + shape.state_bytes(dtype)) // point.tp
    flying = shape.embedding_parameters * ITEMSIZE[dtype]  # one large tensor, while loading
    nbytes = weights + cache + max(flying, _prompt_bytes(point, shape, dtype, device.kind) // point.tp)
    needed = nbytes + _OVERHEAD_BYTES[device.kind]
    if needed > device.free_bytes:
        free = readable_bytes(device.free_bytes)
        why = f"it needs about {readable_bytes(needed)}, and {free} are free"
        return Planned(point, 0.0, 0.0, 0.0, nbytes, why)
    work, least = _work(point, shape, device, weights, cache)
    return Planned(point, _load(point, shape, device, weights), work, least, nbytes)


def _load(point: Point, shape: ModelShape, device: Device, weights: int) -> float:
    """Return the seconds until the model can be run: libraries, bytes read, weights rounded or drawn."""
    subject = point.subject
    if subject.weights == "random":
        return device.start_seconds + shape.parameters / (_DRAWING_RATE[device.kind] * point.tp)
    read = shape.parameters * _STORED_BYTES // point.tp if subject.rounded else weights
    making = shape.parameters / (_MAKING_RATE * point.tp) if subject.rounded else 0.0
    return device.start_seconds + read / _LOAD_RATE + making


def _work(point: Point, shape: ModelShape, device: Device, weights: int, cache: int) -> tuple[float, float]:
    """Return the seconds of measuring: without a limit, and at least."""
    prefill = _operations(shape, point.context) / (device.operations_per_s * _EFFICIENCY * point.tp)
    if point.encodes:
        return 8 * prefill + _SPLIT_SECONDS / 3, 3 * prefill
    fixed = _STEP_SECONDS if point.engine == "fast" else _SLOW_STEP_SECONDS
    read = weights * shape.active_parameters / shape.parameters
    step = fixed + (read + cache / 2) / (device.copy_bytes_per_s * _EFFICIENCY)
    generation = point.tokens * step
    # Short generations are repeated for a minute at most, or until there are enough.
    work = prefill + max(generation, min(12 * generation, 60.0)) + max(_SPLIT_SECONDS, 150 * step)
    steps = steps_at_once(point.tokens, step)  # the warm-up, and three rounds over the positions
    least = 3 * prefill + step * (12 + 3 * steps * min(POSITIONS, point.tokens - steps + 1))
    return max(work, least), least


def _operations(shape: ModelShape, tokens: int) -> int:
    """Return the operations of a prompt: products with the weights, and attention, whose share grows.

    Scores and mixed values are 2 operations each for every head's dimension and every pair of tokens, of
    which a causal kernel leaves out half.
    """
    layers = sum(len(block.layers) for block in shape.blocks if block.attends)
    attention = 2 * layers * shape.heads * shape.head_dim * tokens**2
    return 2 * shape.active_parameters * tokens + attention


def steps_at_once(tokens: int, seconds: float) -> int:
    """Return how many steps of that many seconds are timed together at a position of a generation."""
    return min(8 if seconds < _SLOW_STEP else 2, tokens)


def _weight_bytes(point: Point, shape: ModelShape, dtype: str) -> int:
    """Return the bytes of the weights in the form that is run."""
    model = point.subject.model
    if model.precision.startswith("int"):  # a folder may have 2 bits, too
        bits, size = int(model.precision.removeprefix("int")), model.group_size or 128
        nbytes, rest = 0, shape.parameters
        for block in shape.blocks:
            for linear in block.linears:
                count = linear.copies * len(block.layers)
                groups = linear.rows * (1 if size == -1 else linear.columns // size)
                elements = linear.rows * linear.columns
                nbytes += count * (elements * linear.bits(bits) // 8 + groups * 4)
                rest -= count * elements
        return nbytes + rest * ITEMSIZE[dtype]
    return shape.bytes(dtype)


def _prompt_bytes(point: Point, shape: ModelShape, dtype: str, kind: str) -> int:
    """Return the bytes that encoding the prompt takes beside weights and cache: a block's tensors and scores.

    A block keeps residual and normed input, and q, k, v and their rotated copies, or gate, up and their
    product. Scores are in memory only where no fused kernel runs (``runtime.attention.plain``): in float32
    before and behind the softmax, and once more in the dtype of the values.
    """
    tokens, itemsize = point.context, ITEMSIZE[dtype]
    heads = 3 * (shape.heads + shape.kv_heads) * shape.head_dim
    block = tokens * (2 * shape.hidden + max(heads, 3 * shape.ffn)) * itemsize
    plain = point.attention == "off" or (  # no flash kernel takes float32, see ``attention.of_row``
        point.attention in ("v2", "v1") and kind == "cuda" and dtype == "float32"
    )
    cast = 0 if dtype == "float32" else itemsize
    return block + (shape.heads * tokens**2 * (2 * ITEMSIZE["float32"] + cast) if plain else 0)
