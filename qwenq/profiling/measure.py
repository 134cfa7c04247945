"""Measure one point in this process: protocol, prefill, decode, memory, energy, share of a copy's bandwidth.

The protocol is that of ``profile.py`` of QwenLM/Qwen (2023-08-28): the wall clock around one ``generate``
call with a prompt of one repeated token and a fixed number of new tokens, which alone are counted. The other
figures follow llama-bench: one thing at a time, repeated, with its warm-up outside the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import torch

from qwenq.distributed import ALONE, Team
from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.rounded import rounded
from qwenq.profiling.meters import (
    ENERGY_SOURCE,
    EnergyCounter,
    Meter,
    cache_bytes,
    copy_bandwidth,
    meter_for,
    state_bytes,
    step_bytes,
    weight_bytes,
)
from qwenq.profiling.planning import POSITIONS, steps_at_once
from qwenq.profiling.spec import Point
from qwenq.results import Row
from qwenq.runtime.generation import stopwatch
from qwenq.runtime.sampling import end_ids, protocol_sampling
from qwenq.statistics import Summary, repeat, summarise

if TYPE_CHECKING:
    from qwenq.runtime.engine import Engine


def checkpoint_of(point: Point) -> Checkpoint:
    """Return the point's model, before it is rounded."""
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import open_model

    subject = point.subject
    return open_model(subject.given, subject.weights, subject.seed, resolve_device(point.device))


def engine_for(point: Point, checkpoint: Checkpoint, team: Team) -> Engine:
    """Return the point's engine; on rank 0 of several processes the one that leads the others."""
    attention, note = _attention(point)
    if point.tp > 1:
        from qwenq.runtime.tensor_parallel import LeadingEngine

        engine: Engine = LeadingEngine(checkpoint, team, point.device, point.subject.dtype, attention)
        team.barrier()  # raises what another process could not load
    else:
        from qwenq.runtime.engine import load

        engine = load(
            checkpoint,
            device=point.device,
            dtype=point.subject.dtype,
            engine=point.engine,
            kernel=point.kernel,
            attention=attention,
        )
    engine.notes = (*engine.notes, *note)
    return engine


def _attention(point: Point) -> tuple[str, tuple[str, ...]]:
    """Return the attention backend that runs, and a note where it is another than was asked for."""
    from qwenq.models.machine import resolve_device
    from qwenq.runtime.attention import of_row
    from qwenq.runtime.engine import find_dtype

    device = resolve_device(point.device)
    name, why = of_row(point.attention, device, find_dtype(point.subject.dtype, device, point.engine))
    return name, (why,) if why else ()


def assist(point: Point, team: Team) -> None:
    """Hold this rank's slice of the model, and compute with rank 0 until it is done."""
    from qwenq.runtime.tensor_parallel import SplitEngine, follow

    engine = SplitEngine(checkpoint_of(point), team, point.device, point.subject.dtype, _attention(point)[0])
    team.barrier()
    follow(engine, team)
    team.barrier()


PATIENCE = 20.0  # seconds of repetitions of one measurement without a budget; one is always made
PROTOCOL_PATIENCE = 60.0


@dataclass
class Bench:
    """A loaded model on its point."""

    point: Point
    engine: Engine
    checkpoint: Checkpoint
    meter: Meter
    until: float  # when the time limit is over, by ``time.monotonic``; infinite without one
    before: int  # bytes that the process held before it loaded the model
    settings: dict[str, Any]  # of every row
    cache_bytes: int = 0  # of the newest cache, whole, in the form in which the engine keeps it

    @property
    def prompt(self) -> list[int]:
        """Return one token id, repeated: speed does not depend on the text. 35946 is Qwen's 我."""
        real = self.engine.real_vocab
        return [35946 if real > 35946 else real // 2] * self.point.context

    def left(self, share: float = 1.0) -> float:
        """Return that share of the remaining seconds."""
        return max(0.0, share * (self.until - time.monotonic()))

    def row(self, metric: str, value: float | None, **more: Any) -> Row:
        """Return a row with the settings that all rows of this point share."""
        more["settings"] = {**self.settings, **more.get("settings", {})}
        more.setdefault("implementation", self.engine.implementation)
        return self.point.row(metric, value, date=date.today().isoformat(), **more)

    def summary(self, metric: str, of: Summary, **more: Any) -> Row:
        """Return a row of repeated measurements."""
        details = {**of.details(), **more.pop("details", {})}
        return self.row(metric, of.median, low=of.low, high=of.high, n=of.n, details=details, **more)

    def absent(self, metric: str, reason: str, *, again: bool = False) -> Row:
        """Return a row without a figure."""
        return self.row(
            metric, None, status="unavailable", reason=reason, details={"again": True} if again else {}
        )


def measure(point: Point, seconds: float | None = None, team: Team = ALONE) -> Iterator[Row]:
    """Yield all rows of a point, in the order of ``point.metrics``.

    Args:
        seconds: time limit, loading included; None: until the intervals are narrow.
        team: processes that hold the model together; this is rank 0, the others run ``assist``.
    """
    bench = _load(point, float("inf") if seconds is None else time.monotonic() + seconds, team)
    details = {"before_bytes": bench.before, **bench.meter.also()}
    yield bench.row("memory.load", bench.meter.peak(), details=details, settings={"memory": bench.meter.how})
    if why := too_long(bench):  # everything but loading starts with the prompt
        left = [metric for metric in point.metrics if metric != "memory.load"]
        yield from (bench.absent(metric, why, again=True) for metric in left)
    else:
        yield from (_encoding if point.encodes else _generating)(bench)
    if point.tp > 1:
        from qwenq.runtime.tensor_parallel import LeadingEngine

        assert isinstance(bench.engine, LeadingEngine)  # noqa: S101 - engine_for made it
        bench.engine.close()
        team.barrier()  # all leave together


def _load(point: Point, until: float, team: Team) -> Bench:
    from qwenq.models.machine import resolve_device

    subject, device = point.subject, resolve_device(point.device)
    meter = meter_for(device)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context is there before the clock and the meter start
    before = meter.now()
    checkpoint = checkpoint_of(point)
    if subject.rounded:
        checkpoint = rounded(checkpoint, subject.rounded)
    engine = engine_for(point, checkpoint, team)
    dtype = str(engine.dtype).removeprefix("torch.")
    settings: dict[str, Any] = {"dtype": dtype, "prompt": "one token id, repeated"}
    if subject.weights == "random":
        settings["weights"] = f"random, seed {subject.seed}"
    if subject.rounded:
        settings["rounding"] = (
            "to nearest on the fly: speed and memory at work do not depend on the integers; "
            "memory at load includes the rounding"
        )
    if engine.context is not None and point.context + point.tokens > engine.context:
        settings["beyond_context_of"] = engine.context  # speed does not depend on it, but quality does
    if point.tp > 1:
        settings["processes"] = f"{point.tp}; memory is that of the first"
    if device.type == "cpu":
        settings["threads"] = torch.get_num_threads()
    if engine.notes:
        settings["notes"] = list(engine.notes)
    return Bench(point, engine, checkpoint, meter, until, before, settings)


def _generating(bench: Bench) -> Iterator[Row]:
    """Measure the protocol first, as its peak must not be that of anything else; then one thing at a time."""
    point, engine = bench.point, bench.engine
    load_peak = bench.meter.peak()
    bench.meter.reset()
    engine.generate([bench.prompt], min(8, point.tokens), exact_tokens=True)  # warm-up
    decoding = decode_speed(bench, None)
    estimate = point.tokens / decoding.speeds[-1]
    held, warm_peak, prompt_peak = bench.meter.now(), bench.meter.peak(), 0
    reset_error = bench.meter.reset()
    if estimate <= bench.left(0.9):
        speed, energy = _protocol(bench)
        yield speed
    else:
        decode_speed(bench, None)  # memory is that of a full cache all the same, and of the prompt
        prompt_peak = warm_peak if point.context > 1 else 0
        left = f"its share of the budget leaves {bench.left():.0f} s"
        reason = f"one generation takes about {estimate:.0f} s, and {left}"
        yield bench.absent("speed.protocol", reason, again=True)
        energy = bench.absent("energy.token", reason, again=True)
    yield from _memory_rows(bench, max(load_peak, warm_peak), held, reset_error, prompt_peak)
    yield energy
    found = decode_speed(bench, min(PATIENCE, bench.left(0.6)))
    cache = bench.cache_bytes
    yield found.row(bench)
    prefill(bench)
    values = repeat(lambda: prefill(bench), min(PATIENCE / 4, bench.left(0.5)))
    yield bench.summary("time.first_token", summarise(values), settings={"warm_up": "one prefill"})
    yield _bandwidth(bench, found, cache)


def _encoding(bench: Bench) -> Iterator[Row]:
    load_peak, held = bench.meter.peak(), bench.meter.now()
    reset_error = bench.meter.reset()  # before the warm-up, which may be all that there is time for
    seconds_once = prefill(bench)  # warm-up
    if seconds_once > bench.left():
        values, extra = [seconds_once], {"warm_up": "none: the budget is over after one prefill"}
    else:
        load_peak = max(load_peak, bench.meter.peak())
        reset_error = bench.meter.reset()
        values = repeat(lambda: prefill(bench), min(PATIENCE, bench.left(0.8)))
        extra = {"warm_up": "one prefill"}
    speeds = summarise([bench.point.context / value for value in values])
    yield bench.summary("speed.prefill", speeds, settings=extra)
    yield bench.summary("time.first_token", summarise(values), settings=extra)
    yield from _memory_rows(bench, load_peak, held, reset_error)


def _protocol(bench: Bench) -> tuple[Row, Row]:
    """Return speed by the cards' protocol, and energy over the same generations."""
    point, engine = bench.point, bench.engine
    (sampling, how), ends = protocol_sampling(bench.checkpoint), end_ids(bench.checkpoint)
    counter: EnergyCounter | None = None
    why = "the energy of several devices is not added up"
    if point.tp == 1:
        try:
            counter = EnergyCounter(engine.device)
        except UnsupportedError as error:
            why = error.what

    def once() -> float:
        with stopwatch(engine.device) as watch:
            made = engine.generate(
                [bench.prompt], point.tokens, sampling=sampling, stop_ids=ends, exact_tokens=True
            )
        assert len(made.answers[0].ids) == point.tokens  # noqa: S101 - as the cards' script does
        return point.tokens / watch.seconds

    joules = counter.joules() if counter else 0.0
    values = repeat(once, min(PROTOCOL_PATIENCE, bench.left(0.6)))
    suppressed = f"suppressed in the logits: {', '.join(map(str, ends))}" if ends else "the model names none"
    settings = {"sampling": how, "end_of_text": suppressed, "warm_up": "8 tokens"}
    speed = bench.summary("speed.protocol", summarise(values), settings=settings)
    if counter is None:
        return speed, bench.absent("energy.token", why)
    spent = (counter.joules() - joules) / (len(values) * point.tokens)
    if spent <= 0:
        return speed, bench.absent("energy.token", "too short: the GPU's counter did not move")
    return speed, bench.row(
        "energy.token", spent, n=len(values), settings={**settings, "energy": ENERGY_SOURCE}
    )


def _memory_rows(
    bench: Bench, load_peak: int, held: int, reset_error: str | None, prompt_peak: int = 0
) -> Iterator[Row]:
    """Yield the peak since the reset, with its parts; and what a script that never resets would print.

    ``load_peak`` is that before the reset; ``prompt_peak`` the prompt's, where it was not encoded again.
    """
    peak, how = max(bench.meter.peak(), prompt_peak), {"memory": bench.meter.how}
    if reset_error:
        yield bench.absent("memory.generate", reset_error)
    else:
        cache = bench.cache_bytes
        details = {"before_bytes": bench.before, "at_rest_bytes": held, **bench.meter.also()}
        try:
            parts = {"weights": weight_bytes(bench.engine), "cache": cache}
            details["parts"] = {**parts, "activations": max(0, peak - held - cache)}
        except UnsupportedError as error:
            details["no_parts"] = error.what
        yield bench.row("memory.generate", peak, details=details, settings=how)
    settings = {"memory": f"{bench.meter.how}, never reset: loading included"}
    yield bench.row("memory.unreset", max(peak, load_peak), settings=settings)


def _bandwidth(bench: Bench, found: Decoding, cache: int) -> Row:
    """Return the bytes that a step has to read per second, as a share of a copy's bandwidth."""
    position, slots = found.positions[0], bench.point.context + bench.point.tokens
    try:
        read = step_bytes(bench.engine)
    except UnsupportedError as error:
        return bench.absent("bandwidth.share", error.what)
    states = state_bytes(bench.engine.new_cache(1, 1))
    read += (cache - states) * position // slots + 2 * states
    copied, achieved = copy_bandwidth(bench.engine.device), read * found.curve[0]
    details = {
        "bytes_per_step": read,
        "position": position,
        "achieved_bytes_per_s": achieved,
        "copy_bytes_per_s": copied,
    }
    settings = {"copy": "read and written"}
    return bench.row("bandwidth.share", achieved / copied, details=details, settings=settings)


# Time a prompt; and estimate, before it is begun, how long a long one will take.
#
# A prompt cannot be stopped half way. Where a budget limits a point, pieces of a long prompt are timed
# first, each twice as long as the one before: what a token takes by itself, and what it takes for each
# token before it, follow from the last two.


LONG = 4096  # tokens from which a prompt is estimated first, where there is a limit
_FIRST, _LARGEST_SHARE = 256, 16
"""Tokens of the first piece; the last piece is at most one sixteenth of the prompt."""
_TRIAL = 0.02
"""Share of the remaining time after which only one more piece is timed: it takes 2 to 4 times as long."""


def prefill(bench: Bench, tokens: int | None = None) -> float:
    """Return the seconds from the prompt, or its first ``tokens``, to its first new token."""
    prompt = bench.prompt[:tokens]
    cache = bench.engine.new_cache(1, len(prompt) + 1)
    with stopwatch(bench.engine.device) as watch:
        bench.engine.prefill([prompt], cache).argmax(-1).tolist()
    bench.cache_bytes = cache_bytes(cache)
    return watch.seconds


def too_long(bench: Bench) -> str:
    """Return why the point's prompt is not begun; empty where it fits the time limit."""
    tokens = bench.point.context
    if bench.until == float("inf") or tokens < LONG:
        return ""
    prefill(bench, _FIRST)  # warm-up
    made = [(_FIRST, prefill(bench, _FIRST))]
    while len(made) < 2 or (made[-1][0] * _LARGEST_SHARE <= tokens and made[-1][1] < bench.left(_TRIAL)):
        longer = 2 * made[-1][0]
        made.append((longer, prefill(bench, longer)))
    seconds, left = estimated(tokens, *made[-2:]), bench.left()
    if seconds <= left:
        return ""
    return f"one prompt takes about {seconds:.0f} s, and its share of the budget leaves {left:.0f} s"


def estimated(tokens: int, short: tuple[int, float], longer: tuple[int, float]) -> float:
    """Return the seconds of n tokens as a · n + b · n² by (tokens, seconds) of two shorter prompts; b ≥ 0."""
    (n, s), (m, t) = short, longer
    squared = max(0.0, (t / m - s / n) / (m - n))  # t / m = a + b · m
    return (t / m + squared * (tokens - m)) * tokens


# Time decode steps at positions along a generation, with a cache that is marked as filled up to there.
#
# How long a step takes depends on how much is in the cache, not on what. A round visits every position
# once; the speed of the whole generation follows from the seconds per token between them, by trapezoids.


@dataclass(frozen=True)
class Decoding:
    """Seconds per token at each position."""

    positions: tuple[int, ...]  # tokens in the cache before each timed run of steps
    rounds: tuple[tuple[float, ...], ...]  # seconds per token, [rounds][positions]
    steps: int  # timed at each position

    @property
    def speeds(self) -> list[float]:
        """Return the tokens per second of the whole generation, by each round."""
        return [1 / _mean(self.positions, each) for each in self.rounds]

    @property
    def curve(self) -> list[float]:
        """Return the tokens per second at each position, median of the rounds."""
        return [1 / statistics.median(column) for column in zip(*self.rounds, strict=True)]

    def row(self, bench: Bench) -> Row:
        """Return ``speed.decode``, with its curve."""
        how = "greedy; the cache is marked as filled, its keys and values are zeros"
        curve = {"positions": list(self.positions), "values": self.curve}
        settings = {"decode": how, "warm_up": "one round", "steps": self.steps}
        return bench.summary("speed.decode", summarise(self.speeds), details=curve, settings=settings)


def decode_speed(bench: Bench, patience: float | None) -> Decoding:
    """Time rounds as `repeat` does; None: the warm-up alone, for estimates."""
    point, engine = bench.point, bench.engine
    cache = engine.new_cache(1, point.context + point.tokens)
    tokens = torch.tensor(bench.prompt[:1], device=engine.device)

    def run(position: int, steps: int) -> float:
        nonlocal tokens
        cache.lengths = [position]
        with stopwatch(engine.device) as watch:
            for _ in range(steps):
                tokens = engine.decode(tokens, cache).argmax(-1)
        return watch.seconds / steps

    run(point.context, 1)  # compiles, where anything has to be
    steps = steps_at_once(point.tokens, run(point.context, 1))
    positions = spread(point.context, point.context + point.tokens - steps)
    rounds: list[tuple[float, ...]] = []

    def visit() -> float:
        rounds.append(tuple(run(position, steps) for position in positions))
        return 1 / _mean(positions, rounds[-1])

    visit()  # warm-up
    bench.cache_bytes = cache_bytes(cache)
    if patience is not None:
        rounds.clear()
        repeat(visit, patience)
    return Decoding(positions, tuple(rounds), steps)


def spread(first: int, last: int) -> tuple[int, ...]:
    """Return positions from first to last, evenly spread; fewer where there are fewer."""
    count = max(1, min(POSITIONS, last - first + 1))
    if count == 1:
        return (first,)
    return tuple(first + round(n * (last - first) / (count - 1)) for n in range(count))


def _mean(positions: tuple[int, ...], seconds: tuple[float, ...]) -> float:
    """Return the mean seconds per token between the first and the last position."""
    if len(positions) == 1:
        return seconds[0]
    steps = zip(positions, positions[1:], seconds, seconds[1:], strict=False)
    area = sum((right - left) * (a + b) / 2 for left, right, a, b in steps)
    return area / (positions[-1] - positions[0])
