"""Measure one point in this process: protocol, prefill, decode, memory, energy, share of a copy's bandwidth.

The protocol is that of ``profile.py`` of QwenLM/Qwen (2023-08-28): the wall clock around one ``generate``
call with a prompt of one repeated token and a fixed number of new tokens, which alone are counted. The other
figures follow llama-bench: one thing at a time, repeated, with its warm-up outside the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

import torch

from qwenq.distributed import ALONE, Team
from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.profiling.bandwidth import copy_bandwidth, synchronise, weight_bytes
from qwenq.profiling.decoding import Decoding, decode_speed
from qwenq.profiling.energy import ENERGY_SOURCE, EnergyCounter
from qwenq.profiling.loading import checkpoint_of, engine_for, release
from qwenq.profiling.memory import Meter, meter_for
from qwenq.profiling.points import Point
from qwenq.profiling.prompts import prefill, too_long
from qwenq.profiling.rounded import rounded
from qwenq.profiling.statistics import MOST, Summary, repeat, summarise
from qwenq.results import Row
from qwenq.runtime.generation_config import end_ids, protocol_sampling

if TYPE_CHECKING:
    from qwenq.runtime.engine import Engine

PATIENCE = 20.0
"""Seconds of repetitions of one measurement without a budget; one is always made."""
PROTOCOL_PATIENCE = 60.0


@dataclass
class Allowance:
    """The time limit of a point in seconds; None: no limit."""

    seconds: float | None
    began: float = field(default_factory=time.monotonic)

    def left(self, share: float = 1.0) -> float:
        """Return that share of the remaining seconds; infinite without a limit."""
        if self.seconds is None:
            return float("inf")
        return max(0.0, share * (self.seconds - (time.monotonic() - self.began)))


@dataclass
class Bench:
    """A loaded model on its point.

    Attributes:
        before: bytes that the process held before it loaded the model.
        settings: of every row.
        cache_bytes: of the newest cache, whole, in the form in which the engine keeps it.
    """

    point: Point
    engine: Engine
    checkpoint: Checkpoint
    meter: Meter
    allowance: Allowance
    before: int
    settings: dict[str, Any]
    cache_bytes: int = 0

    @property
    def prompt(self) -> list[int]:
        """Return one token id, repeated: speed does not depend on the text. 35946 is Qwen's 我."""
        real = self.engine.real_vocab
        return [35946 if real > 35946 else real // 2] * self.point.context

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

    Raises:
        QwenqError: the model cannot be loaded or run like that.
    """
    bench = _load(point, Allowance(seconds), team)
    details = {"before_bytes": bench.before, **bench.meter.also()}
    yield bench.row("memory.load", bench.meter.peak(), details=details, settings={"memory": bench.meter.how})
    yield from (_encoding if point.encodes else _generating)(bench)
    if point.tp > 1:
        release(bench.engine, team)


def _load(point: Point, allowance: Allowance, team: Team) -> Bench:
    from qwenq.models.precision import resolve_device

    subject, device = point.subject, resolve_device(point.device)
    meter = meter_for(device)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context is there before the clock and the meter start
    before = meter.now()
    checkpoint = checkpoint_of(point)
    if subject.rounded:
        checkpoint = rounded(checkpoint, subject.rounded)
    engine = engine_for(point, checkpoint, team)
    settings: dict[str, Any] = {
        "dtype": str(engine.dtype).removeprefix("torch."),
        "prompt": "one token id, repeated",
    }
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
    return Bench(point, engine, checkpoint, meter, allowance, before, settings)


def _generating(bench: Bench) -> Iterator[Row]:
    """Measure the protocol first, as its peak must not be that of anything else; then one thing at a time."""
    point, engine = bench.point, bench.engine
    if why := too_long(bench):
        yield from _without_its_prompt(bench, why)
        return
    load_peak = bench.meter.peak()
    _reset(bench.meter)
    engine.generate([bench.prompt], min(8, point.tokens), exact_tokens=True)  # warm-up
    decoding = decode_speed(bench, rounds=0)
    estimate = point.tokens / decoding.speeds[-1]
    held, warm_peak, prompt_peak = bench.meter.now(), bench.meter.peak(), 0
    reset_error = _reset(bench.meter)
    if estimate <= bench.allowance.left(0.9):
        speed, energy = _protocol(bench)
        yield speed
    else:
        decode_speed(bench, rounds=0)  # memory is that of a full cache all the same, and of the prompt
        prompt_peak = warm_peak if point.context > 1 else 0
        left = f"its share of the budget leaves {bench.allowance.left():.0f} s"
        reason = f"one generation takes about {estimate:.0f} s, and {left}"
        yield bench.absent("speed.protocol", reason, again=True)
        energy = bench.absent("energy.token", reason, again=True)
    yield from _memory_rows(bench, max(load_peak, warm_peak), held, reset_error, prompt_peak)
    yield energy
    found = decode_speed(bench, rounds=MOST, patience=min(PATIENCE, bench.allowance.left(0.6)))
    cache = bench.cache_bytes
    yield found.row(bench)
    prefill(bench)
    values = repeat(lambda: prefill(bench), min(PATIENCE / 4, bench.allowance.left(0.5)))
    yield bench.summary("time.first_token", summarise(values), settings={"warm_up": "one prefill"})
    yield _bandwidth(bench, found, cache)


def _encoding(bench: Bench) -> Iterator[Row]:
    if why := too_long(bench):
        yield from _without_its_prompt(bench, why)
        return
    load_peak, held = bench.meter.peak(), bench.meter.now()
    reset_error = _reset(bench.meter)  # before the warm-up, which may be all that there is time for
    seconds_once = prefill(bench)  # warm-up
    if seconds_once > bench.allowance.left():
        values, extra = [seconds_once], {"warm_up": "none: the budget is over after one prefill"}
    else:
        load_peak = max(load_peak, bench.meter.peak())
        reset_error = _reset(bench.meter)
        values = repeat(lambda: prefill(bench), min(PATIENCE, bench.allowance.left(0.8)))
        extra = {"warm_up": "one prefill"}
    speeds = summarise([bench.point.context / value for value in values])
    yield bench.summary("speed.prefill", speeds, settings=extra)
    yield bench.summary("time.first_token", summarise(values), settings=extra)
    yield from _memory_rows(bench, load_peak, held, reset_error)


def _without_its_prompt(bench: Bench, why: str) -> Iterator[Row]:
    """Yield rows without a figure: everything but loading starts with the prompt."""
    for metric in bench.point.metrics:
        if metric != "memory.load":
            yield bench.absent(metric, why, again=True)


def _protocol(bench: Bench) -> tuple[Row, Row]:
    """Return speed by the cards' protocol, and energy over the same generations."""
    point, engine = bench.point, bench.engine
    (sampling, how), ends = protocol_sampling(bench.checkpoint), end_ids(bench.checkpoint)
    counter: EnergyCounter | None = None
    try:
        if point.tp > 1:
            raise UnsupportedError("the energy of several devices is not added up")
        counter = EnergyCounter(engine.device)
        why = ""
    except UnsupportedError as error:
        why = error.what

    def once() -> float:
        synchronise(engine.device)
        start = time.perf_counter()
        made = engine.generate(
            [bench.prompt], point.tokens, sampling=sampling, stop_ids=ends, exact_tokens=True
        )
        seconds = time.perf_counter() - start
        assert len(made.answers[0].ids) == point.tokens  # noqa: S101 - as the cards' script does
        return point.tokens / seconds

    joules = counter.joules() if counter else 0.0
    values = repeat(once, min(PROTOCOL_PATIENCE, bench.allowance.left(0.6)))
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


def _reset(meter: Meter) -> str | None:
    """Reset the meter's peak; return why that is not possible here."""
    try:
        meter.reset()
    except UnsupportedError as error:
        return error.what
    return None


def _memory_rows(
    bench: Bench, load_peak: int, held: int, reset_error: str | None, prompt_peak: int = 0
) -> Iterator[Row]:
    """Yield the peak since the reset, with its parts; and what a script that never resets would print.

    Args:
        load_peak: before the reset.
        prompt_peak: of the prompt, where it was not encoded again after the reset.
    """
    peak, how = max(bench.meter.peak(), prompt_peak), {"memory": bench.meter.how}
    if reset_error:
        yield bench.absent("memory.generate", reset_error)
    else:
        cache = bench.cache_bytes
        details = {"before_bytes": bench.before, "at_rest_bytes": held, **bench.meter.also()}
        try:
            parts = {"weights": weight_bytes(bench.engine, embedding=True), "cache": cache}
            details["parts"] = {**parts, "activations": max(0, peak - held - cache)}
        except UnsupportedError as error:
            details["no_parts"] = error.what
        yield bench.row("memory.generate", peak, details=details, settings=how)
    settings = {"memory": f"{bench.meter.how}, never reset: loading included"}
    yield bench.row("memory.unreset", max(peak, load_peak), settings=settings)


def _bandwidth(bench: Bench, found: Decoding, cache: int) -> Row:
    """Return the bytes that a step has to read per second, as a share of a copy's bandwidth."""
    position, seconds = found.positions[0], 1 / found.curve[0]
    slots = bench.point.context + bench.point.tokens
    try:
        read = weight_bytes(bench.engine) + cache * position // slots
    except UnsupportedError as error:
        return bench.absent("bandwidth.share", error.what)
    copied, achieved = copy_bandwidth(bench.engine.device), read / seconds
    details = {
        "bytes_per_step": read,
        "position": position,
        "achieved_bytes_per_s": achieved,
        "copy_bytes_per_s": copied,
    }
    settings = {"copy": "read and written"}
    return bench.row("bandwidth.share", achieved / copied, details=details, settings=settings)
