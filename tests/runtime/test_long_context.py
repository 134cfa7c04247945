"""Qwen v1 beyond its trained length: dynamic NTK and logn, against the plain v1 forward pass."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.plain_qwen_v1 import MemorySource, forward, random_tensors, small_config
from runtime.small_models import small_model

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.qwen_v1 import qwen2_view
from qwenq.runtime.engine import Engine, load
from qwenq.runtime.spec import Rope, inverse_frequencies, logn_scales, ntk_alpha, read_spec

S = 64  # seq_length of the small models


def v1_engine(engine: str = "fast", **changes) -> tuple[dict, dict[str, torch.Tensor], Engine]:
    config = small_config(max_position_embeddings=512, **changes)
    tensors = random_tensors(config)
    plain, source = qwen2_view(Path("in-memory"), config, MemorySource(tensors))
    runner = load(Checkpoint(Path("in-memory"), plain, source), device="cpu", dtype="float32", engine=engine)
    return config, tensors, runner


def ids_of(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of whole sequences: up to the trained length v1 is a plain Qwen2, and has to be it to 1e-4."""
    if expected.ndim == 2 and len(expected) <= S:
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    else:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "alpha"),
    [(1, 1), (8192, 1), (8193, 3), (16384, 3), (16385, 7), (32768, 7), (32769, 15)],
)
def test_alpha_is_a_staircase(tokens: int, alpha: int) -> None:
    assert ntk_alpha(tokens, 8192) == alpha


@given(tokens=st.integers(1, 1 << 20), seq_length=st.integers(16, 1 << 16))
def test_alpha_is_the_published_formula(tokens: int, seq_length: int) -> None:
    published = max(2 ** math.ceil(math.log2(tokens / seq_length) + 1) - 1, 1)
    assert ntk_alpha(tokens, seq_length) == published


def test_logn_scales_start_beyond_the_trained_length() -> None:
    scales = logn_scales(torch.tensor([0, 62, 63, 64, 127, 4095]), 64)
    assert scales[:3].tolist() == [1, 1, 1]
    torch.testing.assert_close(scales[3], torch.tensor(math.log(65) / math.log(64)))
    torch.testing.assert_close(scales[4:], torch.tensor([7 / 6, 2.0]))


def test_stretched_frequencies() -> None:
    _, _, runner = v1_engine()
    frequencies, factor = inverse_frequencies(runner.decoder.spec, alpha=3)
    base = 10_000 * 3 ** (16 / 14)
    assert factor == 1.0
    torch.testing.assert_close(frequencies, torch.tensor([base ** (-2 * i / 16) for i in range(8)]))


@pytest.mark.parametrize("tokens", [1, 17, S, S + 1, 2 * S, 2 * S + 1, 300])
@pytest.mark.parametrize(("ntk", "logn"), [(True, True), (True, False), (False, True), (False, False)])
def test_prefill_of_any_length(tokens: int, ntk: bool, logn: bool) -> None:
    config, tensors, runner = v1_engine(use_dynamic_ntk=ntk, use_logn_attn=logn)
    ids = ids_of(tokens)
    assert_close(runner.logits([ids])[0], forward(config, tensors, ids))


def test_each_row_is_stretched_by_its_own_length() -> None:
    config, tensors, runner = v1_engine()
    rows = [ids_of(n, n) for n in (10, 64, 65, 130, 300)]
    cache = runner.new_cache(5, 300)
    for found, row in zip(runner.logits(rows, cache), rows, strict=True):
        assert_close(found, forward(config, tensors, row))
    assert cache.alphas == [1, 1, 3, 7, 15]


def test_alpha_is_fixed_at_prefill_and_logn_is_not() -> None:
    """A prompt of 60 tokens generates past 64: still unstretched, but queries are scaled."""
    config, tensors, runner = v1_engine()
    plain = {**config, "use_dynamic_ntk": False}
    ids = ids_of(80)
    cache = runner.new_cache(1, 80)
    runner.prefill([ids[:60]], cache)
    expected = forward(plain, tensors, ids)
    for place in range(60, 80):
        assert_close(runner.decode(torch.tensor([ids[place]]), cache)[0], expected[place])
    assert cache.alphas == [1]


def test_alpha_of_a_long_prompt_holds_for_its_answer() -> None:
    config, tensors, runner = v1_engine()
    ids = ids_of(135)  # 128 tokens mean alpha 3; 135 at once would mean 7
    cache = runner.new_cache(1, 135)
    runner.prefill([ids[:128]], cache)
    for token in ids[128:]:
        found = runner.decode(torch.tensor([token]), cache)
    # The oracle takes its base from the length, so it is given the base of alpha 3 outright.
    fixed = {**config, "use_dynamic_ntk": False, "rotary_emb_base": 10_000 * 3 ** (16 / 14)}
    assert_close(found[0], forward(fixed, tensors, ids)[-1])


def test_rewound_to_nothing_a_cache_is_fresh() -> None:
    config, tensors, runner = v1_engine()
    cache = runner.new_cache(1, 128)
    runner.prefill([ids_of(128)], cache)
    cache.rewind(0)
    assert_close(runner.logits([ids_of(20)], cache)[0], forward(config, tensors, ids_of(20)))


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_up_to_the_trained_length_v1_is_a_plain_qwen2(engine: str) -> None:
    config, tensors, runner = v1_engine(engine)
    assert_close(runner.logits([ids_of(S)])[0], forward(config, tensors, ids_of(S)))


def test_transformers_refuses_what_it_would_compute_wrongly() -> None:
    _, _, runner = v1_engine("transformers")
    with pytest.raises(UsageError, match="64 up to which this Qwen v1 model is a plain Qwen2"):
        runner.logits([ids_of(S + 1)])
    _, _, plain = v1_engine("transformers", use_dynamic_ntk=False, use_logn_attn=False)
    assert plain.logits([ids_of(S + 1)])[0].shape == (S + 1, 256)


def test_v1_rotates_in_float32_even_in_bfloat16() -> None:
    _, checkpoint = small_model("qwen2-tied")
    _, _, runner = v1_engine()
    for spec, dtype in ((read_spec(checkpoint.config), torch.bfloat16), (runner.decoder.spec, torch.float32)):
        cos, _ = Rope(spec, torch.device("cpu"), torch.bfloat16).at(torch.tensor([[5]]), [1], 6)
        assert cos.dtype == dtype
