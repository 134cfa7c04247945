"""Linear attention beside its definition, token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qwenq.compute.delta_rule import CHUNK, convolve, delta_rule

BATCH, HEADS, KEYS, VALUES = 2, 3, 8, 12


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, decay: float = 1.0) -> tuple[Tensor, ...]:
    """Queries, keys, values, log decay and strength."""
    sizes = BATCH, tokens, HEADS
    keys = functional.normalize(drawn(1, *sizes, KEYS), dim=-1)
    values, strength = drawn(2, *sizes, VALUES), drawn(4, *sizes).sigmoid()
    return drawn(0, *sizes, KEYS), keys, values, -decay * drawn(3, *sizes).exp(), strength


def by_definition(parts: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for q, k, v, decay, strength in zip(*(part.double().unbind(1) for part in parts), strict=True):
        state = state * decay.exp()[..., None, None]
        wrong = v - torch.einsum("bhkv,bhk->bhv", state, k)
        state = state + torch.einsum("bhk,bhv->bhkv", k, strength.unsqueeze(-1) * wrong)
        found.append(torch.einsum("bhkv,bhk->bhv", state, q))
    return torch.stack(found, 1), state


@pytest.mark.parametrize("decay", [1e-3, 1.0, 60.0])
@pytest.mark.parametrize("tokens", [1, 2, CHUNK, 3 * CHUNK + 7])
def test_a_prompt_is_its_tokens_one_by_one(tokens: int, decay: float) -> None:
    parts, before = inputs(tokens, decay), drawn(5, BATCH, HEADS, KEYS, VALUES)
    state = before.clone()
    found = delta_rule(*parts, state)
    expected, after = by_definition(parts, before.double())
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(state.double(), after, atol=2e-5, rtol=1e-4)


def test_tokens_without_decay_and_strength_change_nothing() -> None:
    q, k, v, decay, strength = inputs(CHUNK + 9)
    decay[0, 20:], strength[0, 20:] = 0, 0
    state, alone = torch.zeros(BATCH, HEADS, KEYS, VALUES), torch.zeros(1, HEADS, KEYS, VALUES)
    delta_rule(q, k, v, decay, strength, state)
    delta_rule(*(part[:1, :20] for part in (q, k, v, decay, strength)), alone)
    torch.testing.assert_close(state[:1], alone, atol=1e-6, rtol=1e-5)


def test_a_convolution_goes_on_where_each_row_ended() -> None:
    weight, whole = drawn(0, 4, 6), drawn(1, 2, 30, 6)
    padded = functional.pad(whole.mT, (3, 0))
    expected = functional.silu(functional.conv1d(padded, weight.T.unsqueeze(1), groups=6)).mT
    state, counts = torch.zeros(2, 6, 4), torch.tensor([11, 2])
    first = convolve(whole[:, :11], state, weight, counts)
    torch.testing.assert_close(first[0], expected[0, :11])
    torch.testing.assert_close(first[1, :2], expected[1, :2])
    rest = torch.stack([whole[row, count : count + 9] for row, count in enumerate(counts.tolist())])
    found = torch.cat([convolve(part, state, weight) for part in rest.split([1, 1, 7], dim=1)], dim=1)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(found[row], expected[row, count : count + 9])
    torch.testing.assert_close(state, rest[:, 5:].mT)
