"""The cache: one length a row, spans, rewinding, forks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import OutOfMemoryError, UsageError
from qwenq.runtime.cache import KVCache

CPU = torch.device("cpu")


def small_cache(batch: int, capacity: int = 32) -> KVCache:
    return KVCache(1, batch, heads=2, capacity=capacity, head_dim=4, device=CPU, dtype=torch.float32)


@given(rounds=st.lists(st.lists(st.integers(1, 5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_slots_are_positions_whatever_the_other_rows_hold(rounds: list[list[int]]) -> None:
    cache, sequences = small_cache(3), [torch.zeros(2, 0, 4) for _ in range(3)]
    for number, counts in enumerate(rounds):
        fresh = torch.randn(3, 2, max(counts), 4, generator=torch.Generator().manual_seed(number))
        span = cache.span(counts)
        keys, values = cache.write(0, fresh, -fresh, span)
        cache.advance(counts)
        for row, count in enumerate(counts):
            sequences[row] = torch.cat([sequences[row], fresh[row, :, :count]], dim=1)
            assert torch.equal(keys[row, :, : cache.lengths[row]], sequences[row])
            assert torch.equal(values[row, :, : cache.lengths[row]], -sequences[row])
    assert cache.lengths == [sequence.shape[1] for sequence in sequences]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_a_query_sees_its_row_up_to_itself(lengths: list[int], counts: list[int]) -> None:
    cache = small_cache(len(lengths))
    cache.lengths = lengths
    counts = counts[: len(lengths)]
    span = cache.span(counts)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for step in range(count):
            if span.causal:
                seen = step + 1
            elif span.mask is None:
                seen = span.end
            else:
                mask = span.mask.expand(len(lengths), -1, -1, -1)[row, 0, step]
                seen = int(mask.sum())
                assert mask[:seen].all()
            assert seen == length + step + 1


def test_what_does_not_fit_is_refused() -> None:
    cache = small_cache(2, capacity=8)
    cache.advance([3, 7])
    with pytest.raises(UsageError, match="9 tokens do not fit into a cache of 8"):
        cache.span([1, 2])
    assert cache.lengths == [3, 7]


@pytest.mark.parametrize("wanted", [[4, 7], [-1, 0], [3]])
def test_rewinding_only_goes_back(wanted: list[int]) -> None:
    cache = small_cache(2)
    cache.advance([3, 7])
    with pytest.raises(UsageError, match="cannot be rewound"):
        cache.rewind(wanted)


@pytest.mark.parametrize(("batch", "capacity"), [(-1, 8), (1, -8)])
def test_negative_sizes_are_refused(batch: int, capacity: int) -> None:
    with pytest.raises(UsageError, match=f"cannot have {batch} rows of {capacity} tokens"):
        small_cache(batch, capacity)


def test_growth_beyond_free_memory_is_refused() -> None:
    cache = small_cache(2, capacity=8)
    with pytest.raises(OutOfMemoryError, match=r"2 rows of 10000000000000 tokens instead of 8 needs .* GiB"):
        cache.reserve(10**13)
    assert cache.capacity == 8


def test_an_interrupt_while_growing_leaves_a_usable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends an answer of `qwenq chat`, and the next one has the same cache."""
    cache = KVCache(3, 1, heads=2, capacity=4, head_dim=4, device=CPU, dtype=torch.float32)
    for layer, tensor in enumerate((*cache.keys, *cache.values)):
        tensor.fill_(layer + 1)
    cache.advance([4])
    zeros, left = torch.Tensor.new_zeros, [4]

    def new_zeros(tensor: torch.Tensor, *sizes: object) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return zeros(tensor, *sizes)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    with pytest.raises(KeyboardInterrupt):
        cache.reserve(16)
    assert cache.capacity == 4
    cache.reserve(9)
    assert min(tensor.shape[2] for tensor in (*cache.keys, *cache.values)) == cache.capacity == 9
    for layer, tensor in enumerate((*cache.keys, *cache.values)):
        assert tensor[:, :, :4].eq(layer + 1).all()


def test_at_least_one_row_is_kept() -> None:
    cache = small_cache(2)
    with pytest.raises(UsageError, match="at least one"):
        cache.keep([])
    assert cache.batch == 2


def test_rows_that_are_taken_are_copies() -> None:
    cache = small_cache(1)
    ones = torch.ones(1, 2, 3, 4)
    cache.write(0, ones, ones, cache.span([3]))
    cache.advance([3])
    copy = cache.take([0, 0], 5)
    copy.keys[0].zero_()
    assert cache.keys[0][:, :, :3].eq(1).all()
    assert copy.values[0][:, :, :3].eq(1).all()
    assert (copy.batch, copy.capacity, copy.lengths) == (2, 5, [3, 3])


def numbered_cache(batch: int, capacity: int = 8) -> KVCache:
    """Row r holds r + 2 tokens, all of value r + 1."""
    cache = small_cache(batch, capacity)
    counts = [row + 2 for row in range(batch)]
    values = torch.arange(1.0, batch + 1).view(-1, 1, 1, 1).expand(batch, 2, max(counts), 4)
    cache.write(0, values, -values, cache.span(counts))
    cache.advance(counts)
    cache.alphas = [10 + row for row in range(batch)]
    return cache


def test_rows_are_taken_in_any_order_and_more_than_once() -> None:
    cache = numbered_cache(3)
    copy = cache.take([2, 0, 2], capacity=5)
    assert (copy.lengths, copy.alphas, copy.capacity) == ([4, 2, 4], [12, 10, 12], 5)
    for row, (length, value) in enumerate([(4, 3), (2, 1), (4, 3)]):
        assert copy.keys[0][row, :, :length].eq(value).all()
        assert copy.values[0][row, :, :length].eq(-value).all()
    with pytest.raises(UsageError, match="4 tokens do not fit into a cache of 3"):
        cache.take([2], capacity=3)


def test_a_row_is_replaced_and_the_others_stay() -> None:
    cache, other = numbered_cache(3), numbered_cache(2)
    cache.put([2, 0], other)
    assert (cache.lengths, cache.alphas) == ([3, 3, 2], [11, 11, 10])
    for row, (length, value) in enumerate([(3, 2), (3, 2), (2, 1)]):
        assert cache.keys[0][row, :, :length].eq(value).all()
    for rows in ([0], [1, 1], [0, 3]):
        with pytest.raises(UsageError, match="row"):
            cache.put(rows, other)
    with pytest.raises(UsageError, match="do not fit"):
        small_cache(1, capacity=2).put([0], numbered_cache(3).take([2]))


def test_single_rows_are_emptied() -> None:
    cache = numbered_cache(3)
    cache.clear([1])
    assert (cache.lengths, cache.alphas) == ([2, 0, 4], [10, 1, 12])
    with pytest.raises(UsageError, match="no row 3"):
        cache.clear([3])


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize(
    ("kept", "order"),
    [
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        ([0, 2, 4], [0, 4, 2]),
        ([3, 4], [4, 3]),
        ([4, 0], [0, 4]),
        ([2], [2]),
    ],
)
def test_rows_are_dropped_and_the_last_ones_fill_the_gaps(
    kept: list[int], order: list[int], arranged: bool
) -> None:
    cache = numbered_cache(5)
    if arranged:
        cache.step()
    assert cache.keep(kept) == order
    assert (cache.batch, cache.capacity) == (len(order), 8)
    assert (cache.lengths, cache.alphas) == ([was + 2 for was in order], [10 + was for was in order])
    step = cache.step() if arranged else None
    for row, was in enumerate(order):
        held = was + 2
        assert cache.keys[0][row, :, :held].eq(was + 1).all()
        assert cache.values[0][row, :, :held].eq(-was - 1).all()
        if step is not None:  # what steps read is the same
            assert step.keys[0].unflatten(0, (-1, 2))[row, :, :, :held].eq(was + 1).all()
            assert step.values[0].unflatten(0, (-1, 2))[row, :, :held].eq(-was - 1).all()
    with pytest.raises(UsageError, match="no row 5"):
        cache.keep([5])


def test_compiled_code_gets_gaps_between_layers_only() -> None:
    cache = KVCache(3, 5, heads=2, capacity=8, head_dim=4, device=CPU, dtype=torch.float32)
    for layer, tensor in enumerate(cache.keys):
        tensor[:, :, :2] = torch.arange(5.0).view(5, 1, 1, 1) + 10 * layer
    cache.advance([2] * 5)
    before = cache.laid_out_for_step()
    assert cache.keep([0, 4]) == [0, 4]
    keys, values = cache.laid_out_for_step()
    for tensor, whole in zip((keys, values), before, strict=True):
        assert tensor.data_ptr() == whole.data_ptr()  # nothing was copied
        assert tensor.stride() == whole.stride()
        assert all(layer.is_contiguous() for layer in tensor)
    assert keys.stride(0) == values.stride(0)
    expected = torch.tensor([[10.0 * layer, 10.0 * layer + 4] for layer in range(3)])
    assert keys[..., :2].eq(expected.view(3, 2, 1, 1, 1)).all()
    keys.zero_()
    assert all(layer.eq(0).all() for layer in cache.keys)  # which are views of it


def test_an_empty_cache_grows_as_it_is_laid_out_for_steps() -> None:
    cache = small_cache(2, capacity=1)
    cache.arrange_for_steps(20)
    assert cache.capacity == 20
    cache.put([1, 0], numbered_cache(2))
    assert cache.step().end == 4
    assert cache.keys[0][1, :, :2].eq(1).all()
    assert cache.keys[0][0, :, :3].eq(2).all()
