from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.evals.check import ROWS, compare_logits, compare_slab


def shared(p: torch.Tensor, q: torch.Tensor, count: int) -> torch.Tensor:
    """Return the overlap of the likeliest tokens by sets."""
    tops = [[set(row.topk(count).indices.tolist()) for row in logs] for logs in (p, q)]
    return torch.tensor([len(a & b) / count for a, b in zip(*tops, strict=True)], dtype=torch.float64)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 3.0, 100.0]), gap=st.sampled_from([0, 0.01, 1.0])
)
def test_against_float64(seed: int, spread: float, gap: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 500, generator=generator) * spread + 50
    b = a + torch.randn(6, 500, generator=generator) * gap * spread
    targets = torch.randint(0, 500, (6,), generator=generator)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    expected = torch.stack(
        [
            (p.exp() * (p - q)).sum(-1),
            (a.argmax(-1) == b.argmax(-1)).double(),
            -q.gather(1, targets[:, None])[:, 0],
            -p.gather(1, targets[:, None])[:, 0],
            *(shared(p, q, count) for count in (5, 10)),
        ]
    )
    found = compare_logits(a.clone(), b.clone(), targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert bool((found[0] >= 0).all())


def test_logits_that_are_not_finite_show() -> None:
    a, b = torch.zeros(1, 4), torch.zeros(1, 4)
    b[0, 1] = torch.nan
    assert bool(compare_logits(a, b, torch.zeros(1, dtype=torch.int64))[0].isnan())


def test_extreme_logits_do_not_overflow() -> None:
    a = torch.tensor([[0.0, 1e4, -1e4]])
    b = torch.tensor([[1e4, 0.0, -1e4]])
    assert compare_logits(a, b, torch.tensor([0])).squeeze(1).tolist() == [1e4, 0, 0, 1e4, 1, 1]


def test_tokens_keep_their_order_however_many_are_compared_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2 * ROWS + 7, 50, generator=generator) for _ in range(2))
    targets = torch.randint(0, 50, (len(a),), generator=generator)
    found = compare_slab(a.clone(), b.clone(), targets)
    torch.testing.assert_close(found, compare_logits(a, b, targets), rtol=1e-6, atol=1e-6)
