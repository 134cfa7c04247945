"""How long a sequence may be where plain RoPE is all there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.plain_qwen_v1 import MemorySource, forward, random_tensors, small_config

from qwenq.errors import ModelError, UsageError
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.qwen_v1 import long_context_of, longest_plain, qwen2_config, qwen2_view, require_plain


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 64),
        ({"use_logn_attn": False}, 64),
        ({"use_dynamic_ntk": False}, 64),
        ({"use_dynamic_ntk": False, "use_logn_attn": False}, 128),
        ({"seq_length": 256}, 128),
        ({"max_position_embeddings": None}, 64),
    ],
)
def test_a_v1_model_goes_as_far_as_its_flags_leave_it_plain(changes: dict[str, Any], longest: int) -> None:
    config = qwen2_config(small_config(**changes))
    assert longest_plain(config) == longest
    require_plain(config, longest, option="--seq-len", where="m")
    with pytest.raises(UsageError, match=f"--seq-len is {longest + 1} tokens") as raised:
        require_plain(config, longest + 1, option="--seq-len", where="m")
    assert ("dynamic NTK" in str(raised.value)) == (longest == 64)
    assert f"give at most {longest}" in str(raised.value)


def test_a_newer_model_goes_as_far_as_its_positions() -> None:
    assert longest_plain({"max_position_embeddings": 4096}) == 4096
    assert longest_plain({}) is None
    require_plain({}, 10**9, option="--seq-len", where="m")


@pytest.mark.parametrize("flags", [{}, {"seq_length": "long"}, {"seq_length": 64, "use_dynamic_ntk": True}])
def test_flags_that_are_not_all_there(flags: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="not as `qwenq convert` writes it") as raised:
        long_context_of({"qwen_v1": flags}, Path("model") / "config.json")
    assert raised.value.where == str(Path("model") / "config.json")


def test_blocks_compute_a_v1_model_up_to_there_and_refuse_what_follows() -> None:
    """The oracle stretches its rotary base from 65 tokens on; transformers' blocks would not."""
    config = small_config()
    tensors = random_tensors(config)
    plain, source = qwen2_view(Path("in-memory"), config, MemorySource(tensors))
    decoder = BlockwiseDecoder(
        Checkpoint(Path("in-memory"), plain, source), torch.device("cpu"), torch.float32
    )
    ids = torch.randint(0, 256, (1, 65), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        (hidden,) = decoder.embed([ids[:, :64]])
        for index in range(2):
            with decoder.block(index) as block:
                hidden = decoder.forward(block, hidden)
        with decoder.head() as head:
            found = head(hidden)[0]
    torch.testing.assert_close(found, forward(config, tensors, ids[0, :64].tolist()), atol=1e-4, rtol=0)
    with pytest.raises(UsageError, match="a sequence is 65 tokens, but beyond 64 this Qwen v1 model"):
        decoder.embed([ids])
