"""Triton kernels against float64, in Triton's interpreter.

A program of its own, because the interpreter is chosen before triton is imported. Prints one JSON object a
case: {"case": …, "error": … or null}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch
from runtime.attention_oracle import CPU, SPANS, error
from runtime.small_models import FAMILIES, random_ids
from runtime.test_cuda_graph import S, fast, prefilled, static, test_qwen_v1_beyond_its_trained_length
from torch import Tensor

from qwenq.compute.gpu import unsupported_reason
from qwenq.compute.triton.linear import multiply_row, multiply_rows, plan_row, unpack_weight
from qwenq.models.gptq_format import PackedLinear, dequantise, pack
from qwenq.runtime.attention import attention_backend
from qwenq.runtime.linear import Requirements
from qwenq.runtime.quantised_linear import TritonInt4, TritonInt8

# Steps between neighbouring numbers below 2. The interpreter cuts off where a GPU rounds, hence a whole step.
STEP = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random_layer(
    bits: int, group_size: int, inputs: int, outputs: int, symmetric: bool, seed: int
) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else inputs // group_size
    integers = torch.randint(0, 2**bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = torch.randn(outputs, groups, generator=generator) * 0.02  # of either sign
    zeros = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(1, 2**bits, (outputs, groups), generator=generator, dtype=torch.uint8)
        zeros[0], zeros[-1] = 1, 2**bits - 1
    return pack(integers, scales, zeros, bits, "gptq")


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Each number within ``tolerance`` of itself and of the usual size of all."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert torch.isfinite(found).all()
    error = (found.double() - wanted).abs() / (wanted.abs() + wanted.std())
    assert error.max() < tolerance, f"{error.max():.2e} off at {error.argmax().item()}"


def linear(bits: int, group_size: int, symmetric: bool, shape: tuple[int, int], rows: int) -> None:
    """The three kernels by themselves, in float32, so that nothing but the sums is rounded."""
    layer = random_layer(bits, group_size, *shape, symmetric, seed=rows)
    need = Requirements(bits, group_size, "gptq", CPU, torch.bfloat16)
    kernel = (TritonInt4 if bits == 4 else TritonInt8)(layer, need, None)
    weight = dequantise(layer, bits, "gptq", torch.float64)
    parts = (kernel._words, kernel._scales, kernel._zeros, bits)
    assert (kernel._zeros is None) == symmetric
    x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(1))
    x[:, ::7] *= 30  # outliers, as activations have them
    wanted = x.double() @ weight.t()
    if rows == 1:
        close(multiply_row(x, *parts), wanted, STEP[torch.float32])
    close(multiply_rows(x, *parts), wanted, STEP[torch.float32])
    assert torch.equal(unpack_weight(*parts, torch.float32).t(), weight.float())


def layer_class(bits: int, dtype: torch.dtype, rows: int, symmetric: bool) -> None:
    """The class: dtypes, batches of sequences, a bias, each number of rows by its own kernel."""
    layer = random_layer(bits, 64, 256, 72, symmetric, seed=3)
    need = Requirements(bits, 64, "gptq", CPU, dtype)
    bias = torch.randn(72, generator=torch.Generator().manual_seed(2)).to(dtype)
    cls = TritonInt4 if bits == 4 else TritonInt8
    assert cls.unsupported_reason(need) is None
    x = torch.randn(1, rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = x.double() @ dequantise(layer, bits, "gptq", torch.float64).t() + bias.double()
    found = cls(layer, need, bias)(x)
    assert found.dtype == dtype
    # Rows enough for a plain product multiply weights that were rounded to the dtype before.
    close(found, wanted, STEP[dtype] * (2 if rows <= 16 else 4))


def activation_order() -> None:
    """Columns whose groups lie scattered, as AutoGPTQ's desc_act writes them."""
    layer = random_layer(4, 32, 128, 48, symmetric=False, seed=5)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(6))
    scattered = PackedLinear(layer.qweight, layer.qzeros, layer.scales, layer.g_idx[order])
    need = Requirements(4, 32, "gptq", CPU, torch.float16)
    weight = dequantise(scattered, 4, "gptq", torch.float64)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(7)).half()
        close(TritonInt4(scattered, need, None)(x), x.double() @ weight.t(), 4 * STEP[torch.float16])


def same_bits() -> None:
    """Split over several programs, the sum still has one order."""
    layer = random_layer(4, 32, 2048, 32, symmetric=True, seed=8)
    kernel = TritonInt4(layer, Requirements(4, 32, "gptq", CPU, torch.bfloat16), None)
    assert plan_row(256, 32, 132)[-1] > 1
    x = torch.randn(1, 2048, generator=torch.Generator().manual_seed(9)).bfloat16()
    assert torch.equal(kernel(x), kernel(x))


def fused_step(family: str, lengths: list[int]) -> None:
    """What lies between products in kernels of our own, beside torch's: logits and what is in the cache."""
    engine = fast(family)
    plain, fused = prefilled(engine, lengths), prefilled(engine, lengths)
    assert unsupported_reason(engine.decoder.device) is None
    for seed in range(2):
        tokens = torch.tensor(random_ids(len(lengths), seed))
        torch.testing.assert_close(
            static(engine, fused, tokens, 32), engine.decode(tokens, plain), atol=1e-4, rtol=1e-4
        )
    for ours, theirs in zip((*fused.keys, *fused.values), (*plain.keys, *plain.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def attention(name: str, dtype: torch.dtype, heads: tuple[int, int], d: int, span: str) -> None:
    """A backend over a real cache: prompts, prefixes, rows of unequal length, against float64."""
    backend = attention_backend(name, CPU, dtype)
    assert "interpreter" in backend.implementation
    assert (found := error(backend, dtype, heads, d, *SPANS[span])) < 2 * STEP[dtype], found


def cases() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {"activation-order": activation_order, "same-bits": same_bits}
    for bits, sizes in ((4, (32, 64, 128, -1)), (8, (32, 128, -1))):
        for place, size in enumerate(sizes):
            for symmetric in (True, False):
                for rows in (1, 5) if symmetric else (1, 16):
                    shape = (256, 96) if size != -1 else (352, 40)
                    name = f"linear-{bits}-group{size}-{'sym' if symmetric else 'asym'}-{rows}"
                    found[name] = partial(linear, bits, size, symmetric, shape, rows)
            dtype = torch.bfloat16 if place % 2 else torch.float16
            for rows in (1, 3, 16, 17):
                found[f"class-{bits}-{dtype}-{rows}-{place}"] = partial(
                    layer_class, bits, dtype, rows, place > 1
                )
    found["linear-several-steps"] = partial(linear, 4, 32, True, (2304, 16), 1)
    for family in FAMILIES:
        for lengths in ([9], [3, 17, 8]):
            found[f"fused-step-{family}-{len(lengths)}"] = partial(fused_step, family, lengths)
    found["fused-step-qwen-v1"] = partial(test_qwen_v1_beyond_its_trained_length, [3, S + 30, S - 1])
    for name in ("v1", "split"):
        for span in SPANS if name == "v1" else ("prompt", "step", "step-ragged"):
            for dtype, heads, d in ((torch.float16, (2, 2), 64), (torch.bfloat16, (6, 2), 40)):
                found[f"attention-{name}-{span}-{dtype}"] = partial(attention, name, dtype, heads, d, span)
    return found


if __name__ == "__main__":
    for name, case in cases().items():
        try:
            with torch.inference_mode():
                case()
            failure = None
        except Exception:
            failure = traceback.format_exc()
        json.dump({"case": name, "error": failure}, sys.stdout)
        print(flush=True)
