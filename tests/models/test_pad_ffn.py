"""Padding the MLP: where the zeros go, and that nobody can tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models.plain_qwen_v1 import MemorySource

from qwenq.errors import UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.pad_ffn import interleave_zeros, padded_groups, padded_width, widened

MLP = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def checkpoint_of(tensors: dict[str, torch.Tensor], ffn: int) -> Checkpoint:
    return Checkpoint(Path("base"), {"intermediate_size": ffn}, MemorySource(tensors))


def padded_mlp(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, to: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three matrices as a checkpoint that is ``to`` wide gives them."""
    wide = widened(checkpoint_of(dict(zip(MLP, (gate, up, down), strict=True)), len(gate)), to)
    wider_gate, wider_up, wider_down = (wide.read(name) for name in MLP)
    return wider_gate, wider_up, wider_down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_channels_and_the_output_are_bit_for_bit_the_same(dtype: torch.dtype) -> None:
    """Summed channel by channel, as no zero changes a sum: not close, but equal."""
    ffn, to, hidden = 12, 20, 8
    gate, up = (torch.randn(ffn, hidden).to(dtype) for _ in range(2))
    down = torch.randn(hidden, ffn).to(dtype)
    padded = padded_mlp(gate, up, down, to)
    added = torch.tensor([channel % 2 == 1 and channel < 2 * (to - ffn) for channel in range(to)])
    for before, after in ((gate, padded[0]), (up, padded[1]), (down.T, padded[2].T)):
        assert torch.equal(after[~added], before)
        assert torch.equal(after[added], torch.zeros(to - ffn, hidden, dtype=dtype))
    x = torch.randn(5, hidden).to(dtype)
    assert torch.equal(by_channel(x, *padded), by_channel(x, gate, up, down))


def by_channel(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The MLP's output, one channel added after the other: [rows, hidden]."""
    total = torch.zeros(x.shape[0], down.shape[0], dtype=x.dtype)
    for channel in range(gate.shape[0]):
        opened = torch.nn.functional.silu((x * gate[channel]).sum(-1)) * (x * up[channel]).sum(-1)
        total = total + opened[:, None] * down[:, channel]
    return total


def test_one_zero_follows_each_of_the_first_channels() -> None:
    column = torch.arange(1, 6)
    assert interleave_zeros(column, 8, 0).tolist() == [1, 0, 2, 0, 3, 0, 4, 5]
    assert interleave_zeros(column, 5, 0).tolist() == [1, 2, 3, 4, 5]
    assert interleave_zeros(column, 10, 0).tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    down = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.bfloat16)
    padded = interleave_zeros(down, 4, 1)
    assert padded.tolist() == [[1, 0, 2, 3], [4, 0, 5, 6]]
    assert padded.dtype == torch.bfloat16
    assert padded.is_contiguous()


def test_no_group_of_the_first_ones_is_all_zero() -> None:
    """Qwen's 29568 → 29696: the 128 zeros spread over two groups of 128, each half full."""
    padded = interleave_zeros(torch.ones(29568), 29696, 0)
    filled = padded.reshape(232, 128).sum(1)  # [groups]
    assert filled[:2].tolist() == [64, 64]
    assert set(filled[2:].tolist()) == {128}


def test_widths_of_qwens_own_fix() -> None:
    assert padded_width(29568, 128, (1, 2, 4, 8)) == 29696
    assert padded_width(13696, 128, (1, 2, 4, 8)) == 14336
    assert padded_width(27648, 128, (1, 2, 4, 8)) == 27648
    assert (padded_groups(29696, 128), padded_groups(14336, 128)) == (232, 112)


@given(
    ffn=st.integers(1, 50_000),
    group=st.sampled_from([32, 64, 128]),
    gpus=st.lists(st.integers(1, 8), min_size=1, max_size=4),
)
def test_the_padded_width_is_the_smallest_that_can_be_shared(ffn: int, group: int, gpus: list[int]) -> None:
    def shared(width: int) -> bool:
        return width % group == 0 and all(width // group % count == 0 for count in gpus)

    to = padded_width(ffn, group, gpus)
    assert shared(to)
    assert not any(shared(width) for width in range(-(-ffn // group) * group, to, group))


@pytest.mark.parametrize("to", [3, 9])
def test_widths_out_of_range_are_refused(to: int) -> None:
    with pytest.raises(UsageError, match="cannot be padded"):
        interleave_zeros(torch.ones(4), to, 0)


def test_a_width_that_is_no_multiple_is_refused_with_the_next_that_is() -> None:
    with pytest.raises(UsageError, match="100 channels is no multiple of the group size 32") as raised:
        padded_groups(100, 32)
    assert raised.value.hint == "choose 128, the next one, or auto"
    assert padded_groups(128, 32) == 4


def test_a_padded_view_of_a_checkpoint() -> None:
    block = "model.layers.0."
    gate, up, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    tensors = dict(zip(MLP, (gate, up, down), strict=True))
    tensors |= {
        f"{block}self_attn.q_proj.weight": torch.randn(4, 4),
        f"{block}mlp.up_proj.bias": torch.ones(6),
    }
    view = widened(checkpoint_of(tensors, 6), 8)
    assert list(view.names()) == list(tensors)
    for name in view.names():
        assert view.info(name).shape == tuple(view.read(name).shape)
    for name, tensor, axis in zip(MLP, (gate, up, down), (0, 0, 1), strict=True):
        assert torch.equal(view.read(name), interleave_zeros(tensor, 8, axis))
    assert view.read(f"{block}mlp.up_proj.bias").tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert torch.equal(
        view.read(f"{block}self_attn.q_proj.weight"), tensors[f"{block}self_attn.q_proj.weight"]
    )


def test_a_wider_checkpoint_is_known_by_its_base_and_width() -> None:
    tensors = {"model.layers.0.mlp.gate_proj.weight": torch.randn(6, 4)}
    base = checkpoint_of(tensors, 6)
    wide = widened(base, 8)
    assert wide.config["intermediate_size"] == 8 and base.config["intermediate_size"] == 6
    assert wide.info(next(iter(tensors))).shape == (8, 4)
    assert widened(base, 6) is base
    known = {base.fingerprint, wide.fingerprint, widened(base, 9).fingerprint}
    assert len(known) == 3
    assert widened(base, 8).fingerprint == wide.fingerprint
    tensors["model.layers.0.mlp.gate_proj.weight"][0, 0] += 1
    other = checkpoint_of(tensors, 6)
    assert widened(other, 8).fingerprint != wide.fingerprint
    for to in (5, 13):
        with pytest.raises(UsageError, match="cannot be padded"):
            widened(base, to)
