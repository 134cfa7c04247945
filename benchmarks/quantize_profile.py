"""Where the time of quantising goes, step by step, beside how fast this machine multiplies matrices.

    python benchmarks/quantize_profile.py --calibration TOKENS.safetensors --layers 6

TOKENS: from ``qwenq calibrate``. Quantises the first layers of the bundled model with the default settings
and writes ``reports/benchmarks/quantize_profile.json`` and ``.md``. Operations follow from the
shapes.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from _common import machine, markdown_table, resolve_bundled, versions, write_report

STEPS = {
    "forward": "two streams through the block, the original one and the quantised one",
    "hessian": "H, lower triangle, summed in float32",
    "drift": "Σ x̃ xᵀ; where there are few rows, Σ W (x̃ − x) xᵀ",
    "factor": "damping, Cholesky, triangular inverse",
    "target": "W C H⁻¹",
    "scales": "scale search: 15 candidates a group, no products",
    "columns": "GPTQ's column by column rounding",
    "refining": "descent on GPTQ's objective, two sweeps",
    "statistics": "round-to-nearest's error over all rows, the energy",
}

HEAVY = ("forward", "hessian", "drift")
"""What is done with all of the text."""

_running: list[str] = []  # the step whose time is being taken


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class EnoughError(Exception):
    """Enough layers have been measured."""


class Forgetful:
    """Takes the place of the store of finished layers; keeps nothing."""

    def __init__(self) -> None:
        self._modules: dict[int, Any] = {}

    def finished(self) -> int:
        """None, ever."""
        return 0

    def save(self, index: int, tensors: object, modules: Any) -> None:
        """Only the statistics."""
        del tensors
        self._modules[index] = modules

    def modules(self, index: int) -> Any:
        """As they were saved."""
        return self._modules[index]


def clocked(
    seconds: defaultdict[str, float],
    step: str,
    owner: Any,
    name: str,
    synchronise: Callable[[], None],
    *,
    around: bool = False,
) -> None:
    """Replace a function by one that adds its time to a step's; inside another step it counts to that one.

    Args:
        synchronise: waits for the device.
        around: it holds other steps, which count for themselves as well.
    """
    call: Callable[..., Any] = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        if _running and not around:
            return call(*arguments, **named)
        if not around:
            _running.append(step)
        synchronise()
        begun = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            synchronise()
            seconds[step] += time.perf_counter() - begun
            if not around:
                _running.pop()

    setattr(owner, name, timed)


def measure_layers(
    decoder: Any, tokens: Any, layers: int, group_size: int, synchronise: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Quantise the first layers to Int4; return the seconds of each step per layer.

    Args:
        synchronise: waits for the device, before and after each step.
    """
    from qwenq.gptq import linears as gptq_rows
    from qwenq.gptq import pipeline, solver
    from qwenq.gptq.settings import Settings

    seconds: defaultdict[str, float] = defaultdict(float)
    for step, owner, name in (
        ("hessian", pipeline, "hessian"), ("drift", pipeline, "measure_deviation"),
        ("factor", gptq_rows, "damp_hessian"), ("target", gptq_rows, "shift_targets"),
        ("scales", solver, "search_grid"), ("columns", solver, "gptq"),
        ("refining", solver, "descend"), ("statistics", gptq_rows, "output_error"),
    ):  # fmt: skip
        clocked(seconds, step, owner, name, synchronise)
    clocked(seconds, "solve", pipeline._Layer, "solve", synchronise, around=True)
    settings = Settings(4, group_size, True, True, "hessian", 0.1, 0.5, True)
    store: Any = Forgetful()
    begun = time.perf_counter()

    def stop(done: pipeline.LayerDone) -> None:
        if done.index + 1 == layers:
            raise EnoughError

    with suppress(EnoughError):
        pipeline.quantise_layers(decoder, tokens, settings, store, stop)
    synchronise()
    seconds["layer"] = time.perf_counter() - begun
    seconds["forward"] = seconds["layer"] - seconds.pop("solve")
    return {step: value / layers for step, value in seconds.items()}


def measure(model: Path, calibration: Path, layers: int) -> tuple[dict[str, float], tuple[int, ...]]:
    """Seconds of each step per layer of the bundled model, and the calibration's shape."""
    import torch

    from qwenq.calibration import CalibrationSet
    from qwenq.models.blocks import BlockwiseDecoder
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.machine import product_dtype

    tokens = CalibrationSet.load(calibration).tokens
    decoder = BlockwiseDecoder(open_checkpoint(model), torch.device("cpu"), product_dtype("cpu"))
    return measure_layers(decoder, tokens, layers, 64), tuple(tokens.shape)


def operations(model: Path, shape: tuple[int, ...]) -> dict[str, float]:
    """Floating-point operations of each step in one layer, attention's own products left out."""
    from qwenq.models.checkpoint import open_checkpoint

    config = open_checkpoint(model).config
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    groups = [(hidden + 2 * kv, hidden), (hidden, hidden), (2 * ffn, hidden), (hidden, ffn)]  # (rows, in)
    tokens = shape[0] * shape[1]

    def of_target(rows: int, width: int) -> float:
        return 6 * rows * width**2 if rows <= width else 4 * width**3 + 2 * rows * width**2

    return {
        "forward": 2 * sum(2 * tokens * rows * width for rows, width in groups),
        "hessian": sum(tokens * width**2 for _, width in groups),
        "drift": sum(2 * tokens * width * (2 * rows if rows < width else width) for rows, width in groups),
        "factor": sum(2 * width**3 / 3 for _, width in groups),
        "target": sum(of_target(rows, width) for rows, width in groups),
        "columns": sum(rows * width**2 for rows, width in groups),
        "refining": sum(5 * rows * width**2 for rows, width in groups),
        "statistics": sum(2 * rows * width**2 for rows, width in groups),
    }


def matmul_gflops() -> dict[str, float]:
    """How fast this machine multiplies 2048 × 1536 by 1536 × 1536, best of a second, per dtype."""
    import torch

    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype)
        best, until = float("inf"), time.perf_counter() + 1
        while time.perf_counter() < until:
            begun = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - begun)
        speeds[str(dtype).removeprefix("torch.")] = round(2 * 2048 * 1536 * 1536 / best / 1e9, 1)
    return speeds


def rows_of(seconds: dict[str, float], work: dict[str, float]) -> list[dict[str, Any]]:
    """One row a step, and what is left over."""
    rows: list[dict[str, Any]] = []
    for step, what in STEPS.items():
        row = {"step": step, "what": what, "ms": round(1e3 * seconds[step], 1)}
        if step in work:
            row |= {"gflop": round(work[step] / 1e9, 2), "gflops": round(work[step] / seconds[step] / 1e9, 1)}
        rows.append(row)
    rest = seconds["layer"] - sum(seconds[step] for step in STEPS)
    rows.append({"step": "the rest", "what": "reading, packing, checks", "ms": round(1e3 * rest, 1)})
    return rows


def floor_s(rows: list[dict[str, Any]], facts: dict[str, Any]) -> float:
    """Seconds of a layer's large products at the speed of this machine's matrix product."""
    speed: float = facts["matmul_gflops"][facts["dtype"]]
    return float(sum(row["gflop"] for row in rows if row["step"] in HEAVY)) / speed


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Return the report in Markdown."""
    whole = sum(row["ms"] for row in rows)
    lines = [
        [
            f"{row['step']}: {row['what']}",
            f"{row['ms']:.0f}",
            f"{row['ms'] / whole:.0%}",
            f"{row['gflop']:.1f}" if "gflop" in row else "",
            f"{row['gflops']:.0f}" if "gflops" in row else "",
        ]
        for row in rows
    ]
    peak = facts["matmul_gflops"]
    heavy = sum(row["ms"] for row in rows if row["step"] in HEAVY) / whole
    return (
        "# Where quantising spends its time\n\n"
        f"{markdown_table(['per layer', 'ms', 'share', 'GFLOP', 'GFLOP/s'], lines)}\n"
        f"This machine multiplies at {peak['float32']:.0f} GFLOP/s in float32 and {peak['bfloat16']:.0f} in "
        f"bfloat16. {heavy:.0%} of a layer is running the text through it and multiplying what flows there: "
        "matrix products of fixed size, each done once, the Hessian's with half of them left out. At the "
        f"speed of {facts['dtype']} they alone take {1e3 * floor_s(rows, facts):.0f} ms; only less text "
        "would cut them.\n\n"
        f"{facts['model']}, {facts['calibration']} tokens, {facts['layers']} layers, default settings, "
        f"computing in {facts['dtype']}. {facts['cpu']}, {facts['threads']} threads; torch "
        f"{facts['versions'].get('torch')}; {facts['date']}.\n"
    )


def main() -> None:
    """Measure, report."""
    options = parse_options()
    facts: dict[str, Any] = {**machine(), "threads": options.threads, "layers": options.layers}
    model = resolve_bundled()
    import sys

    import torch

    from qwenq.models.machine import product_dtype

    torch.set_num_threads(options.threads)
    seconds, shape = measure(model, options.calibration, options.layers)
    facts |= {
        "versions": versions(sys.executable, ["qwenq", "torch", "transformers"]),
        "model": model.name,
        "calibration": f"{shape[0]} × {shape[1]}",
        "dtype": str(product_dtype("cpu")).removeprefix("torch."),
        "matmul_gflops": matmul_gflops(),
    }
    rows = rows_of(seconds, operations(model, shape))
    text = table(rows, facts)
    write_report("quantize_profile", {"environment": facts, "rows": rows, "ratios": {}}, text)
    print(text)


if __name__ == "__main__":
    main()
