"""What the leader tells, and whom a follower refuses to work for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import recipe_for
from problems import usual
from tiny_families import write_family

from qwenq.compute import cpu
from qwenq.compute.transformers_blocks import OURS, TORCH
from qwenq.distributed import Team
from qwenq.errors import ModelError
from qwenq.gptq.pipeline import run_rank, send_job
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint

CPU = torch.device("cpu")


class Spoken(Team):
    """Two processes, of which only one is here: what the leader says is kept, or said again."""

    def __init__(self, rank: int, words: dict[str, Any] | None = None) -> None:
        super().__init__(rank=rank, world=2, launched=True)
        self.words = words

    def broadcast_object(self, value: Any = None) -> Any:
        if self.is_rank0:
            self.words = json.loads(json.dumps(value))
        return self.words

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        assert self.is_rank0, "a follower that refuses takes no tokens"


def told_by_a_leader(model: Path, dtype: torch.dtype) -> dict[str, Any]:
    team = Spoken(0)
    decoder = BlockwiseDecoder(open_checkpoint(model), CPU, dtype)
    send_job(team, decoder, torch.zeros(2, 8, dtype=torch.int64), usual())
    assert team.words is not None
    return team.words


def test_a_rank_with_slower_attention_than_rank_0_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the C library is compiled on the first machine alone."""
    model = write_family(tmp_path / "m")
    told = told_by_a_leader(model, torch.bfloat16)
    assert told["attention"] == [OURS, None]
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    with pytest.raises(ModelError) as caught:
        run_rank(recipe_for(model), Spoken(1, told), "cpu")
    assert caught.value.what == (
        "rank 0 computes attention by qwenq_causal, here it would be sdpa, "
        f"because here {cpu.VARIABLE}=torch turns it off"
    )
    assert "qwenq doctor" in str(caught.value.hint)


def test_a_rank_with_faster_attention_than_rank_0_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_family(tmp_path / "m")
    monkeypatch.setenv(cpu.VARIABLE, "torch")
    told = told_by_a_leader(model, torch.bfloat16)
    assert told["attention"] == [TORCH, f"{cpu.VARIABLE}=torch turns it off"]
    monkeypatch.delenv(cpu.VARIABLE)
    with pytest.raises(ModelError, match=f"because there {cpu.VARIABLE}=torch turns it off"):
        run_rank(recipe_for(model), Spoken(1, told), "cpu")


@pytest.mark.parametrize("here", [True, False])
def test_a_rank_that_would_fit_scales_by_other_code_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """In float16 attention is torch's on both; scales are fitted by sums in another order."""
    reason, model = f"{cpu.VARIABLE}=torch turns it off", write_family(tmp_path / "m")
    first, then = ("", "torch") if here else ("torch", "")
    monkeypatch.setenv(cpu.VARIABLE, first)
    told = told_by_a_leader(model, torch.float16)
    assert told["solver"] == (["compiled", None] if here else ["torch", reason])
    monkeypatch.setenv(cpu.VARIABLE, then)
    with pytest.raises(ModelError) as caught:
        run_rank(recipe_for(model), Spoken(1, told), "cpu")
    leaders, own = ("compiled", "torch") if here else ("torch", "compiled")
    assert caught.value.what == (
        f"rank 0 computes integers and scales by {leaders}, here it would be {own}, "
        f"because {'here' if here else 'there'} {reason}"
    )
