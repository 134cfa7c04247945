"""The cards' own protocol for gpu.py: the wall clock around one whole generation from one token.

A card gives FlashAttention v2, v1 and none at 2048 and at 8192 tokens. Even on a fast GPU that takes minutes:
what is compared most comes first, and what would not end in time is left out, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from _gpu_points import CARDS, Point

if TYPE_CHECKING:
    from _gpu_points import Loaded
    from gpu import Plan, Run

    from qwenq.results import Row

SLOWER, BEGIN = 1.06, 1.5
"""Times and seconds by which a whole generation is longer than its steps: it chooses tokens, too, and begins.

On an H200 four of them took 0.3 to 1.2 s more than their steps.
"""
NOTE = "attention off: FlashAttention takes no float32; the cards did the same; one generation for all three"


@dataclass(frozen=True)
class Stage:
    """Generations over one loaded model."""

    model: str
    precision: str
    attentions: tuple[str, ...]
    tokens: int


def stages(plan: Plan, models: Sequence[str]) -> Iterator[Stage]:
    """All generations of these models, the most compared first: short ones by the cards' attentions.

    Version 1 over the longest takes as long as all else and comes after it; our own attention is not on any
    card. FP32 is the column that nobody runs.
    """
    shortest, longest = plan.lengths[0], plan.lengths[-1]
    named = [name for name in ("v2", "off", "v1") if name in plan.attentions]
    rounds: list[tuple[tuple[str, ...], int]] = [(tuple(named), shortest)]
    if longest != shortest:
        rounds += [(tuple(each for each in named if each != "v1"), longest)]
        rounds += [(("v1",), longest)] if "v1" in named else []
    own = tuple(name for name in plan.attentions if name not in named)
    rounds += [(own, length) for length in plan.lengths] if own else []
    for model in models:
        for attentions, tokens in rounds:
            for precision in plan.precisions:
                if precision != "fp32":
                    yield Stage(model, precision, attentions, tokens)
        for tokens in plan.lengths:
            if "fp32" in plan.precisions and "off" in plan.attentions:
                yield Stage(model, "fp32", ("off",), tokens)


def expected(rows: list[Row], stage: Stage, attention: str) -> float | None:
    """Seconds of a generation by its steps, which were timed before; None: they were not."""
    for row in rows:
        if (
            (row.metric, row.model.family, row.model.precision)
            == ("speed.decode", stage.model, stage.precision)
            and (row.point["engine"], row.point["attention"]) == ("fast", attention)
            and row.point["tokens"] == stage.tokens
            and row.value is not None
        ):
            return BEGIN + SLOWER * stage.tokens / row.value
    return None


def run_stage(run: Run, stage: Stage) -> None:
    """Each generation of a stage that ends in time; whatever else becomes the reason of its row."""
    from _gpu_points import Loaded, first_line

    left = [name for name in stage.attentions if not known(run, stage, name)]
    todo = [name for name in left if fits(run, stage, name)]
    if not todo:
        return
    try:
        loaded = Loaded(run.plan, "fast", stage.model, stage.precision)
        for name in todo:
            if fits(run, stage, name):
                generate(run, stage, name, loaded)
                run.write()
    except Exception as error:
        # One stage's end is not the run's.
        for name in todo:
            absent(run, stage, name, first_line(error), "failed")


def known(run: Run, stage: Stage, attention: str) -> bool:
    """Whether there is a row already."""
    wanted = (stage.model, stage.precision, attention, stage.tokens)
    return any(
        (row.model.family, row.model.precision, row.point["attention"], row.point["tokens"]) == wanted
        for row in run.rows
        if row.metric == "speed.protocol"
    )


def fits(run: Run, stage: Stage, attention: str) -> bool:
    """Whether it would end in time; if not, a row says so. What is no use to try has its reason, too."""
    seconds, left = expected(run.rows, stage, attention), run.deadline - time.monotonic()
    if seconds is not None and seconds <= left:
        return True
    if seconds is not None:
        why = f"it takes about {seconds:.0f} s, and {max(0.0, left):.0f} s of the time were left"
    else:
        why = "its steps were not measured, so nobody knows how long it takes"
    absent(run, stage, attention, why, again=True)
    return False


def generate(run: Run, stage: Stage, attention: str, loaded: Loaded) -> None:
    """One generation by the clock, after a warm-up that captures graphs."""
    from qwenq.errors import QwenqError

    point = Point(run, "fast", stage.model, stage.precision, attention)
    try:
        engine = loaded.attend(attention)
    except QwenqError as error:
        absent(run, stage, attention, error.what)
        return
    engine.generate([[1]], min(8, stage.tokens), exact_tokens=True)
    if run.plan.device == "cuda":
        loaded.meter.reset()
    start = time.perf_counter()
    made = engine.generate([[1]], stage.tokens, exact_tokens=True)
    speed = stage.tokens / (time.perf_counter() - start)
    assert len(made.answers[0].ids) == stage.tokens
    peak = loaded.meter.peak()
    settings: dict[str, Any] = {"sampling": "greedy", "warm_up": f"{min(8, stage.tokens)} tokens"}
    settings |= {"notes": list(engine.notes)} if engine.notes else {}
    for name in (attention, *(CARDS if stage.precision == "fp32" else ())):
        if name not in run.plan.attentions:
            continue
        said = settings | ({"attention": NOTE} if name != attention else {})
        told = Point(run, "fast", stage.model, stage.precision, name)
        told.add("speed.protocol", stage.tokens, speed, "tokens/s", engine, said)
        told.add("memory.generate", stage.tokens, peak, "bytes", engine, said)
    run.say(f"{point.label}: {speed:.1f} tok/s over {stage.tokens} tokens by the clock")


def absent(
    run: Run, stage: Stage, attention: str, reason: str, status: str = "unavailable", *, again: bool = False
) -> None:
    """Return a row that says why there is no figure; ``again``: a call with more time would have it."""
    why: dict[str, Any] = {"reason": reason, "status": status, "details": {"again": True} if again else {}}
    for name in (attention, *(CARDS if stage.precision == "fp32" else ())):
        if name in run.plan.attentions:
            point = Point(run, "fast", stage.model, stage.precision, name)
            point.add("speed.protocol", stage.tokens, None, "tokens/s", None, {}, **why)
