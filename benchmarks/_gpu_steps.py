"""The steps of gpu.py that measure in its own process: checks, products, batches, quantising."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from _gpu_kernels import SHAPES, TINY, kernel_checks, kernel_speeds, on_cpu, random_packed, wait
from torch import Tensor

if TYPE_CHECKING:
    from gpu import Run

BATCHES = (1, 4, 16, 64)
CONTEXT = 512  # tokens in the cache while a step is timed
QUANTISED = ("qwen3-8b", 4, 128, 2048)
"""Shape, layers of it, sequences and tokens of each: the rest of the depth takes as long a layer."""


def checks(run: Run, until: float) -> dict[str, Any]:
    """Compare every kernel with float64; all of them, however long it takes."""
    del until
    found = [
        {"name": check.name, "error": check.error, "passed": check.passed}
        for check in kernel_checks(run.device, run.tiny)
    ]
    for check in found:
        if not check["passed"]:
            run.say(f"WRONG: {check['name']}: {check['error']:.3g} times what rounding explains")
    return {"complete": True, "passed": all(check["passed"] for check in found), "checks": found}


def products(run: Run, until: float) -> dict[str, Any]:
    """Time products by themselves: ours, and torch's own where it has one."""
    rows = [*kernel_speeds(run.device, run.tiny, until), *_torch_products(run, until)]
    shapes = 1 if run.tiny else len(SHAPES)
    ours = sum("microseconds" in row and row["kernel"].startswith("triton") for row in rows)
    return {"complete": ours == 2 * shapes * (1 if run.tiny else 5), "rows": rows}


def _torch_products(run: Run, until: float) -> Iterator[dict[str, Any]]:
    """Yield torch's BF16 product and its Int4 one (``_weight_int4pack_mm``), or why it has none."""
    from _gpu_kernels import seconds_of

    shapes = [(128, 96)] if run.tiny else SHAPES
    for inputs, outputs in shapes:
        for rows in (1,) if run.tiny else (1, 4, 16):
            if time.monotonic() > until:
                return
            x = torch.randn(rows, inputs, device=run.device).bfloat16()
            for name, make in (("torch bf16", _bf16), ("torch int4pack", _int4pack)):
                row: dict[str, Any] = {"kernel": name, "in": inputs, "out": outputs, "rows": rows}
                try:
                    multiply, nbytes, error = make(inputs, outputs, x)
                    seconds = seconds_of(partial(multiply, x), run.device)
                except Exception as problem:
                    yield row | {"unavailable": f"{type(problem).__name__}: {str(problem)[:120]}"}
                    continue
                speed = {"microseconds": seconds * 1e6, "gb_per_s": nbytes / seconds / 1e9}
                yield row | speed | {"error": error}


Product = tuple[Callable[[Tensor], Tensor], int, float]
"""A product, the bytes of its weights, and its largest error over the standard deviation of the result."""


def _bf16(inputs: int, outputs: int, x: Tensor) -> Product:
    weight = torch.randn(outputs, inputs, device=x.device).bfloat16() * 0.02
    return lambda x: torch.nn.functional.linear(x, weight), weight.nbytes, 0.0


def _int4pack(inputs: int, outputs: int, x: Tensor) -> Product:
    from qwenq.models.gptq_format import dequantise

    layer = random_packed(inputs, outputs, 4, 128, True, x.device)
    weight = dequantise(on_cpu(layer), 4, "gptq", torch.float32)
    scales = layer.scales.float().t()  # [out, groups]
    groups = weight.to(x.device).view(outputs, -1, 128) / scales[..., None]
    integers = (groups.round() + 8).to(torch.int32).view(outputs, inputs)  # [out, in], 0 to 15
    halves = (integers[:, ::2] << 4 | integers[:, 1::2]).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(halves, 8)
    both = torch.stack([layer.scales, torch.zeros_like(layer.scales)], -1).bfloat16().contiguous()

    def multiply(x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x, packed, 128, both)

    wanted = x.double() @ weight.to(x.device).double().t()
    error = float((multiply(x).double() - wanted).abs().max() / wanted.std())
    return multiply, packed.nbytes + both.nbytes, error


def batches(run: Run, until: float) -> dict[str, Any]:
    """Time decode steps of several sequences, each with so many tokens in the cache."""
    from qwenq.models.random_weights import random_checkpoint
    from qwenq.models.rounded import rounded
    from qwenq.runtime.engine import load

    rows: list[dict[str, Any]] = []
    complete = True
    for model in (TINY,) if run.tiny else ("qwen-1.8b-chat", "qwen-7b-chat", "qwen3-8b"):
        for bits in (4,) if run.tiny else (None, 8, 4):
            if time.monotonic() > until:
                complete = False
                continue
            plain = random_checkpoint(model, device=run.device)
            engine = load(
                plain if bits is None else rounded(plain, bits),
                device=str(run.device),
                dtype="bfloat16",
                attention="split" if run.device.type == "cuda" else "off",
            )
            for batch in (1, 2) if run.tiny else BATCHES:
                seconds = _step_seconds(engine, batch, 2 if run.tiny else 40)
                row = {
                    "model": model if isinstance(model, str) else "tiny",
                    "precision": f"int{bits}" if bits else "bf16",
                }
                rows.append(row | {"batch": batch, "tokens_per_s": batch / seconds, "step_ms": 1e3 * seconds})
            del engine
            _free(run)
    return {"complete": complete, "context": CONTEXT, "rows": rows}


def _step_seconds(engine: Any, batch: int, steps: int) -> float:
    """Return the seconds of a step, the median of three rounds; graphs and kernels are made before."""
    cache = engine.new_cache(batch, CONTEXT + 4 * steps + 8)
    cache.lengths = [CONTEXT] * batch
    tokens = torch.ones(batch, dtype=torch.long, device=engine.device)
    rounds = []
    for number in range(4):
        wait(engine.device)
        start = time.perf_counter()
        for _ in range(steps):
            tokens = engine.decode(tokens, cache).argmax(-1)
        wait(engine.device)
        if number:
            rounds.append((time.perf_counter() - start) / steps)
    return sorted(rounds)[1]


def quantising(run: Run, until: float) -> dict[str, Any]:
    """Quantise layers of the shape of Qwen3-8B: seconds a layer by phase, peak of the GPU's memory."""
    from quantize_profile import STEPS, measure_layers

    from qwenq.models.blocks import BlockwiseDecoder
    from qwenq.models.random_weights import random_checkpoint

    del until  # a layer cannot be cut off; four of them take a minute or less where this is worth running
    model, layers, samples, length = (TINY, 1, 2, 16) if run.tiny else QUANTISED
    checkpoint = random_checkpoint(model, layers=layers, device=run.device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, checkpoint.config["vocab_size"], (samples, length), generator=generator)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    group_size = 32 if run.tiny else 128
    decoder = BlockwiseDecoder(checkpoint, run.device, dtype)
    seconds = measure_layers(decoder, tokens, layers, group_size, lambda: wait(run.device))
    peak = torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None
    _free(run)
    return {
        "complete": True,
        "model": model if isinstance(model, str) else "tiny",
        "layers_measured": layers,
        "samples": samples,
        "seq_len": length,
        "seconds_per_layer": seconds["layer"],
        "phases": {step: seconds[step] for step in STEPS},
        "peak_gpu_bytes": peak,
    }


def _free(run: Run) -> None:
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
