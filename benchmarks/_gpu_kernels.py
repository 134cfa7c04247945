"""Measure Triton kernels on a GPU: errors against float64, and the speed at which they read weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from _gpu_solver import solver_checks
from torch import Tensor

from qwenq.models.gptq_format import PackedLinear, dequantise, pack_zeros, trivial_g_idx
from qwenq.models.random_weights import random_checkpoint
from qwenq.models.rounded import rounded
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.cache import KVCache
from qwenq.runtime.cuda_graph import Graphs
from qwenq.runtime.engine import FastEngine, load
from qwenq.runtime.linear import Linear, Requirements
from qwenq.runtime.quantised_linear import TritonInt4, TritonInt8

KERNELS = {4: TritonInt4, 8: TritonInt8}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""Half a step between neighbouring numbers, over the number."""
SHAPES = (
    (2048, 6144), (2048, 2048), (2048, 11008), (5504, 2048),
    (4096, 12288), (4096, 22016), (11008, 4096),
    (4096, 24576), (12288, 4096), (2048, 1536), (768, 2048),
)  # fmt: skip
"""(in, out) of layers of Qwen-1.8B, Qwen-7B, Qwen3-8B and of 30B-A3B's experts."""
L2_BYTES = 256 << 20  # weights in turn are read from at least so many bytes: more than any L2 holds


def random_packed(
    inputs: int, outputs: int, bits: int, group_size: int, symmetric: bool, device: torch.device
) -> PackedLinear:
    """One layer of random bits; scales of either sign."""
    generator = torch.Generator(device).manual_seed(inputs + outputs + bits)
    groups = inputs // group_size
    zeros = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(1, 2**bits, (outputs, groups), dtype=torch.uint8)
    words = torch.empty((inputs * bits // 32, outputs), dtype=torch.int32, device=device)
    return PackedLinear(
        words.random_(-(2**31), 2**31 - 1, generator=generator),
        pack_zeros(zeros, bits, "gptq").to(device),
        torch.empty((groups, outputs), device=device).normal_(0, 0.02, generator=generator).half(),
        trivial_g_idx(inputs, group_size).to(device),
    )


@dataclass(frozen=True)
class Check:
    """One kernel against float64: the largest error over what rounding alone may do, hence at most 1."""

    name: str
    error: float

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.error <= 1


def kernel_checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    """All of them. ``tiny``: small enough for the interpreter."""
    shape, bf16, fp16 = (128, 48) if tiny else (2048, 6144), torch.bfloat16, torch.float16
    # Each line is a kernel of its own to build; these are the ones that differ.
    kinds = [(128, True, bf16), (128, False, bf16), (32, False, bf16), (64, True, fp16)]
    for bits in (4, 8):
        for group_size, symmetric, dtype in kinds:
            layer = random_packed(*shape, bits, group_size, symmetric, device)
            kernel = KERNELS[bits](layer, Requirements(bits, group_size, "gptq", device, dtype), None)
            weight = dequantise(on_cpu(layer), bits, "gptq", torch.float64).to(device)
            for rows in (1, 5) if tiny else (1, 2, 5, 16, 17, 300):
                x = _normal((rows, shape[0]), dtype, device)
                found, wanted = kernel(x), x.double() @ weight.t()
                # Above 16 rows the weights are rounded too; the interpreter cuts off where a GPU rounds.
                allowed = ROUNDING[dtype] * (1.5 if rows <= 16 else 4) * (2 if tiny else 1)
                symmetry = "sym" if symmetric else "asym"
                name = f"int{bits} group {group_size} {symmetry} {dtype} rows {rows}"
                yield Check(name, _error(found, wanted, wanted.std().item()) / allowed)
                again = torch.equal(found, kernel(x))
                yield Check(f"{name}: same bits twice", 0.0 if again else float("inf"))
    yield from _attention_checks(device, tiny)
    yield from (Check(*found) for found in solver_checks(device, tiny))
    if device.type == "cuda":
        yield _graph_check(device)


def _attention_checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    lengths = [(5, 3), (70, 1)] if tiny else [(0, 600), (600, 17), (1, 1), (777, 1), (8000, 1)]
    for (before, tokens), heads, dtype in product(lengths, ((4, 4), (6, 2)), (torch.bfloat16, torch.float16)):
        for name, d in (("v1", 128), ("split", 64), ("v2", 128), ("off", 128)):
            if name == "v2" and device.type != "cuda":
                continue
            cache = KVCache(1, 2, heads[1], before + tokens, d, device, dtype)
            for tensor in (*cache.keys, *cache.values):
                tensor.normal_()
            cache.lengths = [before, before]
            span = cache.span([tokens, tokens])
            queries = _normal((2, heads[0], tokens, d), dtype, device)
            found = attention_backend(name, device, dtype)(queries, cache.keys[0], cache.values[0], span)
            wanted = _exact(queries, cache.keys[0], cache.values[0], before)
            label = f"attention {name} {dtype} heads {heads} {tokens} after {before}"
            # Scores' weights are rounded to the dtype as well, before they meet the values.
            yield Check(label, _error(found, wanted, 1.0) / (4 * ROUNDING[dtype] * (2 if tiny else 1)))


def _graph_check(device: torch.device) -> Check:
    """Logits of steps in a CUDA graph beside those of the same steps without."""
    engine = load(
        rounded(random_checkpoint(TINY, device=device), 4),
        device=str(device),
        dtype="bfloat16",
        attention="split",
    )
    assert isinstance(engine, FastEngine)
    graphs = Graphs(engine.decoder)
    plain, graphed = engine.new_cache(2, 400), engine.new_cache(2, 400)
    worst = 0.0
    with torch.inference_mode():
        for cache in (plain, graphed):
            engine.prefill([[1, 2, 3], [4, 5, 6, 7]], cache)
        for step in range(8):
            if step == 4:  # over the bound of the first graph
                plain.lengths, graphed.lengths = [254, 200], [254, 200]
            tokens = torch.tensor([step, step + 9], device=device)
            hidden = engine.decoder.forward(tokens.unsqueeze(1), [1, 1], plain)
            wanted = engine.decoder.logits(hidden[:, 0]).double()
            found = graphs.decode(tokens, graphed)
            worst = max(worst, _error(found, wanted, wanted.std().item()))
    name = f"CUDA graph beside plain steps, {graphs.captured} graphs"
    return Check(name, worst / (8 * ROUNDING[torch.bfloat16]))


TINY = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
"""A model for the graph check, and for a dry run."""


def kernel_speeds(device: torch.device, tiny: bool, deadline: float) -> Iterator[dict[str, Any]]:
    """Seconds and GB/s of products in a row over more weights than the L2 holds, in one CUDA graph."""
    for (inputs, outputs), bits in product([(128, 96)] if tiny else SHAPES, (4, 8)):
        for rows in (1,) if tiny else (1, 2, 4, 8, 16):
            if time.monotonic() > deadline:
                return
            need = Requirements(bits, 64 if tiny else 128, "gptq", device, torch.bfloat16)
            layer = random_packed(inputs, outputs, bits, need.group_size, True, device)
            first = KERNELS[bits](layer, need, None)
            count = 1 if tiny else -(-L2_BYTES // first.nbytes)
            kernels = [first, *(KERNELS[bits](_copy(layer), need, None) for _ in range(count - 1))]
            x = _normal((rows, inputs), torch.bfloat16, device)
            seconds = seconds_of(partial(_each, kernels, x), device) / count
            yield {
                "kernel": first.name, "in": inputs, "out": outputs, "rows": rows,
                "microseconds": seconds * 1e6, "gb_per_s": first.nbytes / seconds / 1e9,
            }  # fmt: skip


def _each(kernels: Sequence[Linear], x: Tensor) -> list[Tensor]:
    """Return the same product by every layer: their weights do not all fit the cache."""
    return [kernel(x) for kernel in kernels]


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run, the median of five; on a GPU captured in a graph, so that Python's calls are not in it."""
    if device.type == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    seconds = []
    for _ in range(6 if device.type == "cuda" else 2):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[len(seconds[1:]) // 2]


def wait(device: torch.device) -> None:
    """For what the GPU was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy(layer: PackedLinear) -> PackedLinear:
    return replace(layer, qweight=layer.qweight.clone(), scales=layer.scales.clone())


def on_cpu(layer: PackedLinear) -> PackedLinear:
    return PackedLinear(layer.qweight.cpu(), layer.qzeros.cpu(), layer.scales.cpu(), layer.g_idx.cpu())


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.empty(shape, device=device).normal_(generator=generator).to(dtype)


def _exact(queries: Tensor, keys: Tensor, values: Tensor, before: int) -> Tensor:
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = queries.double() @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    tokens, end = scores.shape[-2:]
    steps = torch.arange(tokens, device=queries.device).unsqueeze(1)
    hidden = torch.arange(end, device=queries.device) > before + steps
    output: Tensor = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values
    return output


def _error(found: Tensor, wanted: Tensor, size: float) -> float:
    """Return the largest error over the number's own size and the usual one; NaN counts as infinite."""
    error = ((found.double() - wanted).abs() / (wanted.abs() + size)).max().item()
    return error if error == error else float("inf")  # noqa: PLR0124
