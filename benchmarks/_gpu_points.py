"""What gpu.py measures: a model in an engine, and one attention over it as rows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import date
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from _gpu_kernels import drawn, wait

from qwenq.errors import QwenqError
from qwenq.profiling.meters import cache_bytes, meter_for, step_bytes, weight_bytes
from qwenq.results import Model, Row, Value
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.engine import FastEngine, load
from qwenq.statistics import Summary, summarise

if TYPE_CHECKING:
    from gpu import Plan, Run

PRECISIONS = {"int4": 4, "bf16": None, "int8": 8, "fp32": None}
CARDS = ("v2", "v1")
ROUNDS = 3


class Loaded:
    """A model with random weights in an engine; attention is changed without loading it again."""

    def __init__(self, plan: Plan, engine: str, model: str, precision: str) -> None:
        self.device, bits = torch.device(plan.device), PRECISIONS[precision]
        self.meter = meter_for(self.device)
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)
            self.meter.reset()
        start = time.monotonic()
        checkpoint = drawn(plan.models[model], bits, self.device)
        self.engine = load(
            checkpoint,
            device=plan.device,
            dtype="float32" if precision == "fp32" else "bfloat16",
            engine=engine,
            attention="off",
            kernel=f"triton-int{bits}" if bits else "auto",
        )
        self.seconds, self.peak = time.monotonic() - start, self.meter.peak()

    def attend(self, name: str) -> Any:
        """Return the same engine with another attention.

        Raises:
            UnsupportedError: it cannot run here.
        """
        engine, backend = self.engine, attention_backend(name, self.device, self.engine.dtype)
        if isinstance(engine, FastEngine):
            engine.decoder.attend = backend
            return FastEngine(engine.decoder)
        before: Any = getattr(engine, "_attention")  # noqa: B009
        setattr(engine, "_attention", backend)  # noqa: B010
        engine.implementation = engine.implementation.replace(
            f"attention {before.name}: {before.implementation}", f"attention {name}: {backend.implementation}"
        )
        return engine


@dataclass
class Point:
    """One engine, model, precision and attention: rows for its lengths, its prompt and its memory."""

    run: Run
    engine: str
    model: str
    precision: str
    attention: str

    def measure(self, loaded: Loaded) -> None:
        """All rows; whatever goes wrong becomes their reason."""
        if time.monotonic() > self.run.deadline:
            self.late()
            return
        asked, note = self.attention, ""
        if self.precision == "fp32" and asked in CARDS:
            # As in the cards: their FlashAttention columns of FP32 ran without it, since it takes no float32.
            asked, note = "off", "attention off: FlashAttention takes no float32; the cards did the same"
        try:
            engine = loaded.attend(asked)
            self.steps(engine, loaded, note)
            self.prompt(engine, loaded, note)
        except QwenqError as error:
            self.absent(error.what)
        except Exception as error:
            self.absent(first_line(error), "failed")

    def steps(self, engine: Any, loaded: Loaded, note: str) -> None:
        """Speed of generating, share of a copy's bandwidth, memory."""
        plan = self.run.plan
        loaded.meter.reset() if plan.device == "cuda" else None
        rounds, held = step_seconds(engine, plan.positions, plan.warm, plan.steps[self.engine])
        seconds = [median(column) for column in zip(*rounds, strict=True)]
        speeds = [1 / each for each in seconds]
        curve = {"positions": list(plan.positions), "seconds": seconds, "values": speeds}
        settings = {"decode": "greedy, integral over cache lengths", "load_seconds": round(loaded.seconds, 1)}
        settings |= {"attention": note} if note else {}
        settings |= {"notes": list(engine.notes)} if engine.notes else {}
        for length in plan.lengths:
            found = summarise([length / integral(plan.positions, each, length) for each in rounds])
            self.add("speed.decode", length, found, "tokens/s", engine, settings, curve)
        self.add("memory.load", None, loaded.peak, "bytes", engine, settings)
        peak = loaded.meter.peak()
        parts = self.parts(engine, peak, held)
        self.add("memory.generate", plan.lengths[-1], peak, "bytes", engine, settings, parts)
        if self.engine == "fast":  # the other does not say what it reads; here it is hardly more than weights
            share = step_bytes(engine) / seconds[0] / self.run.copy_bytes_per_s
            self.add("bandwidth.share", plan.lengths[0], share, "ratio", engine, settings)
        shortest = plan.lengths[0]
        self.run.say(f"{self.label}: {shortest / integral(plan.positions, seconds, shortest):.1f} tok/s")

    def parts(self, engine: Any, peak: int, cache: int) -> dict[str, Any]:
        """Return what a peak consists of, where the engine says what it holds."""
        if self.engine != "fast":
            return {}
        weights = weight_bytes(engine)
        return {"parts": {"weights": weights, "cache": cache, "activations": max(0, peak - weights - cache)}}

    def prompt(self, engine: Any, loaded: Loaded, note: str) -> None:
        """Speed of encoding a prompt, three times after a warm-up, and its memory."""
        tokens, speeds = self.run.plan.prompt, []
        loaded.meter.reset() if self.run.plan.device == "cuda" else None
        for _ in range(2 if self.run.plan.tiny else 4):
            cache = engine.new_cache(1, tokens)
            wait(torch.device(self.run.plan.device))
            start = time.perf_counter()
            engine.prefill([[1] * tokens], cache).argmax(-1).tolist()
            speeds.append(tokens / (time.perf_counter() - start))
        settings = {"attention": note} if note else {}
        found = summarise(speeds[1:])
        self.add("speed.prefill", 1, found, "tokens/s", engine, settings, context=tokens)
        self.add("memory.generate", 1, loaded.meter.peak(), "bytes", engine, settings, context=tokens)

    def late(self) -> None:
        """Its turn did not come."""
        self.absent("the time was over before its turn", again=True)

    def absent(self, reason: str, status: str = "unavailable", *, again: bool = False) -> None:
        """Rows without a figure, for what has none yet; ``again``: a call with more time would have them."""
        why: dict[str, Any] = {
            "reason": reason,
            "status": status,
            "details": {"again": True} if again else {},
        }
        for length in self.run.plan.lengths:
            self.add("speed.decode", length, None, "tokens/s", None, {}, **why)
        self.add("speed.prefill", 1, None, "tokens/s", None, {}, context=self.run.plan.prompt, **why)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.model} {self.precision} {self.engine} {self.attention}"

    def add(
        self,
        metric: str,
        tokens: int | None,
        value: float | Summary | None,
        unit: str,
        engine: Any,
        settings: dict[str, Any],
        details: dict[str, Any] | None = None,
        *,
        context: int = 1,
        reason: str | None = None,
        status: str = "unavailable",
    ) -> None:
        """Return a row, unless there is one already."""
        spread: dict[str, Any] = {}
        if isinstance(value, Summary):
            spread = {"low": value.low, "high": value.high, "n": value.n}
            details = {**(details or {}), **value.details()}
            value = value.median
        model = Model(f"{self.model} (random)", f"random:0:{self.model}", self.precision, self.model)
        point: dict[str, Value] = {
            "attention": self.attention, "engine": self.engine, "context": context, "tokens": tokens,
            "batch": 1, "device": self.run.plan.device,
        }  # fmt: skip
        row = Row(
            metric, model, point, value, unit,
            status="ok" if value is not None else status,  # type: ignore[arg-type]
            reason=reason,
            implementation=engine.implementation if engine is not None else "",
            settings={"weights": "random", **settings},
            details=details or {},
            date=date.today().isoformat(),
            **spread,
        )  # fmt: skip
        if row.identity not in {other.identity for other in self.run.rows}:
            self.run.rows.append(row)

    @property
    def known(self) -> bool:
        """Whether an earlier call has measured it, or found that it cannot run."""
        mine = (self.model, self.precision, self.engine, self.attention)
        decode = [row for row in self.run.rows if row.metric == "speed.decode"]
        return any(
            (row.model.family, row.model.precision, row.point["engine"], row.point["attention"]) == mine
            for row in decode
        )


def step_seconds(
    engine: Any, positions: tuple[int, ...], warm: tuple[int, int], steps: int
) -> tuple[list[list[float]], int]:
    """Seconds of one decode step with so many tokens in the cache; what the cache holds decides nothing.

    Returns:
        [round][position], as many rounds as the gate wants to judge a speed; and bytes of the cache.
    """
    cache = engine.new_cache(1, positions[-1] + 2 * steps + 8)
    token, count = torch.tensor([1], device=engine.device), -(-steps // ROUNDS)

    def run(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = engine.decode(token, cache).argmax(-1)
        wait(engine.device)

    columns = []
    for place, position in enumerate(positions):
        cache.lengths = [position]
        run(warm[0] if place == 0 else warm[1])  # builds kernels, captures graphs
        cache.lengths = [position]
        column = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            run(count)
            column.append((time.perf_counter() - start) / count)
        columns.append(column)
    return [list(each) for each in zip(*columns, strict=True)], cache_bytes(cache)


def integral(positions: tuple[int, ...], seconds: list[float], end: int) -> float:
    """Seconds of generating ``end`` tokens: the trapezoids under the curve, cut or drawn on to ``end``."""
    total = positions[0] * seconds[0]
    for a, b, left, right in zip(positions, positions[1:], seconds, seconds[1:], strict=False):
        if a >= end:
            break
        cut = min(b, end)
        at_cut = left + (right - left) * (cut - a) / (b - a)
        total += (cut - a) * (left + at_cut) / 2
    return total + max(0, end - positions[-1]) * seconds[-1]


def first_line(error: Exception) -> str:
    """Type and first line of what was raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
