"""Sampling: what may be drawn, how often, and that a seed repeats it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import UsageError
from qwenq.runtime.sampling import GREEDY, Sampler, Sampling

PROBABILITIES = torch.tensor([0.05, 0.5, 0.1, 0.3, 0.05])


def drawn(sampling: Sampling, count: int = 4000, real_vocab: int = 5) -> torch.Tensor:
    sampler = Sampler(sampling, 1, real_vocab)
    return torch.cat([sampler(PROBABILITIES.log().unsqueeze(0)) for _ in range(count)])


def test_greedy_takes_the_likeliest() -> None:
    assert drawn(GREEDY, 3).tolist() == [1, 1, 1]


def test_frequencies_are_the_probabilities() -> None:
    shares = drawn(Sampling(seed=3)).bincount(minlength=5) / 4000
    assert (shares - PROBABILITIES).abs().max() < 0.03


def test_temperature_sharpens() -> None:
    shares = drawn(Sampling(temperature=0.5, seed=3)).bincount(minlength=5) / 4000
    squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    assert (shares - squared).abs().max() < 0.03


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, {1}), (0.5, {1}), (0.51, {1, 3}), (0.85, {1, 2, 3})])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn(Sampling(top_p=top_p), 1000).tolist()) == kept


def test_top_k_keeps_the_likeliest() -> None:
    assert set(drawn(Sampling(top_k=2), 500).tolist()) == {1, 3}


@given(seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 0.7, 100.0]), real=st.integers(1, 9))
def test_padded_rows_are_never_drawn(seed: int, temperature: float, real: int) -> None:
    logits = torch.zeros(3, 10)
    logits[:, real:] = 1e4  # a padded row may hold anything
    sampler = Sampler(Sampling(temperature=temperature, seed=seed), 3, real)
    for _ in range(20):
        assert int(sampler(logits).max()) < real


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.7, 100.0]),
    never=st.sets(st.integers(0, 7)),
)
def test_suppressed_ids_are_never_drawn(seed: int, temperature: float, never: set[int]) -> None:
    logits = torch.zeros(3, 10)
    logits[:, sorted(never)] = 1e4
    sampler = Sampler(Sampling(temperature=temperature, seed=seed), 3, 9, never)
    for _ in range(20):
        assert not never & set(sampler(logits).tolist())


def test_suppression_is_transformers_min_length() -> None:
    from transformers import MinLengthLogitsProcessor

    logits = torch.randn(4, 50)
    processed = MinLengthLogitsProcessor(100, [3, 7])(torch.zeros(4, 1, dtype=torch.long), logits.clone())
    shares = Sampler(Sampling(seed=5), 4, 50)(processed), Sampler(Sampling(seed=5), 4, 50, [3, 7])(logits)
    assert torch.equal(*shares)


def test_a_seed_repeats_and_rows_do_not_share_a_stream() -> None:
    logits = torch.zeros(4, 1000)
    first, second = (Sampler(Sampling(seed=11), 4, 1000)(logits) for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(first.tolist())) == 4
    alone = Sampler(Sampling(seed=11), 1, 1000)(logits[:1])
    assert alone.tolist() == first[:1].tolist()  # a row draws the same in any batch


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
)
def test_out_of_range(wrong: dict) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)


@pytest.mark.parametrize("cold", [{"temperature": 1e-39}, {"temperature": 1e-300}, {"top_p": 1e-300}])
def test_however_small_a_setting_is_the_likeliest_is_drawn(cold: dict) -> None:
    """1e-39 is below what float32 divides by, 1e-300 is 0 there."""
    logits = torch.tensor([[-3.0, 5.0, 4.9, 0.0], [7.0, -2.0, 6.5, 6.9]])
    sampler = Sampler(Sampling(seed=3, **cold), 2, 4)
    assert all(sampler(logits).tolist() == [1, 0] for _ in range(20))
