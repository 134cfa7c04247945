"""What prompts pass between products: compiled code beside torch's, alone and in whole decoders."""

from __future__ import annotations

import pytest
import torch
from native.native_functions import needs_bfloat16
from runtime.small_models import FAMILIES, random_ids, small_model
from torch import Tensor

from qwenq.models.checkpoint import Checkpoint
from qwenq.native import support
from qwenq.runtime.block_parts import CompiledParts, TorchParts, block_parts, passed_over
from qwenq.runtime.engine import FastEngine, load
from qwenq.runtime.rope import Rope

CPU = torch.device("cpu")
BOTH = CompiledParts(1e-6), TorchParts(1e-6)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def near(got: Tensor, expected: Tensor) -> None:
    """Within two roundings to bfloat16."""
    assert got.dtype is expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


@needs_bfloat16
@pytest.mark.parametrize("tokens", [1, 9])
def test_both_compute_the_same(tokens: int) -> None:
    x, weight = drawn(0, 3, tokens, 64), drawn(1, 64)
    near(*(parts.norm(x, weight) for parts in BOTH))
    near(*(parts.activate(x) for parts in BOTH))


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alike", [True, False])
def test_both_rotate_alike_by_the_tables_of_a_model(family: str, alike: bool) -> None:
    """Qwen v1's tables are float32: its heads are torch's to rotate."""
    _, checkpoint = small_model(family)
    decoder = bfloat16_engine(checkpoint).decoder
    d = decoder.spec.shape.head_dim
    qkv = drawn(2, 2, 7, 5, d)
    positions = torch.arange(7).unsqueeze(0) if alike else torch.tensor([[3], [40]]) + torch.arange(7)
    table = Rope(decoder.spec, CPU, torch.bfloat16).at(positions, [1, 1], 64)
    kept = qkv.clone()
    turned = [parts.rotate(qkv.clone()[:, :, :4], *table) for parts in BOTH]
    near(*turned)
    assert not torch.equal(turned[0], kept[:, :, :4])
    CompiledParts(1e-6).rotate(qkv[:, :, :4], *table)
    assert torch.equal(qkv[:, :, 4], kept[:, :, 4]), "values do not turn"


def bfloat16_engine(checkpoint: Checkpoint) -> FastEngine:
    engine = load(checkpoint, device="cpu", dtype="bfloat16", engine="fast")
    assert isinstance(engine, FastEngine)
    return engine


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_with_compiled_code_is_as_near_to_float32_as_with_torchs(family: str) -> None:
    """Ragged prompts behind a shared beginning, and more behind them."""
    _, checkpoint = small_model(family)
    exact = load(checkpoint, device="cpu", dtype="float32", engine="fast")
    compiled, plain = bfloat16_engine(checkpoint), load(checkpoint, dtype="bfloat16", attention="sdpa")
    assert isinstance(plain, FastEngine)
    plain.decoder.parts = TorchParts(plain.decoder.spec.eps)
    found = []
    for engine in (exact, compiled, plain):
        shared = engine.new_cache(1, 33)
        engine.prefill([random_ids(33)], shared)
        cache = shared.fork(3, 130)
        first = engine.prefill([random_ids(n, n) for n in (40, 1, 17)], cache)
        every = engine.logits([random_ids(n, 2 * n) for n in (5, 30, 12)], cache)
        found.append(torch.cat([first, *every]))
    ours, torchs = ((logits - found[0]).norm() for logits in found[1:])
    assert ours <= 1.25 * torchs
    assert not torch.equal(found[1], found[2]), "both ran the same code"


@needs_bfloat16
def test_where_compiled_code_runs_and_what_is_said_where_not() -> None:
    _, checkpoint = small_model("llama")
    spec = bfloat16_engine(checkpoint).decoder.spec
    assert isinstance(block_parts(spec, CPU, torch.bfloat16), CompiledParts)
    assert passed_over(spec, CPU, torch.bfloat16) is None
    for device, dtype in ((CPU, torch.float16), (torch.device("cuda"), torch.bfloat16)):
        assert isinstance(block_parts(spec, device, dtype), TorchParts)
        assert passed_over(spec, device, dtype) is None, "none is made for it: nothing is missed"


@needs_bfloat16
def test_a_machine_without_the_compiler_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "why_not", lambda *_: "llvmlite, which compiles it, is not installed")
    _, checkpoint = small_model("llama")
    engine = bfloat16_engine(checkpoint)
    assert isinstance(engine.decoder.parts, TorchParts)
    (said,) = (note for note in engine.notes if "prompts" in note)
    assert said == (
        "prompts take longer than with code compiled for this CPU, because llvmlite, which compiles it, "
        "is not installed"
    )
    assert "compiled for this CPU" not in engine.implementation
