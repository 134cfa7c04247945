"""Mixtures of experts in the fast engine: which experts run, how their outputs add up, what a step reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runtime.quantised_models import quantised_model
from runtime.small_models import random_ids, reference_logits, small_model
from tiny_published import transformers_of, write_published

from qwenq.models.gptq_config import QuantConfig
from qwenq.profiling.meters import step_bytes, weight_bytes
from qwenq.runtime.block import GatedMLP, Mixture
from qwenq.runtime.cuda_graph import Graphs
from qwenq.runtime.engine import FastEngine, load

INT4 = QuantConfig(bits=4, group_size=32)


class Times:
    """A linear layer that multiplies by a number, and notes how many rows it was given."""

    name, nbytes = "times", 10

    def __init__(self, factor: float) -> None:
        self.factor, self.rows = factor, list[int]()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return self.factor * x


def mixture(router: torch.Tensor, active: int, normalised: bool) -> Mixture:
    """Expert n multiplies by 10ⁿ."""
    experts = tuple(GatedMLP(Times(1.0), Times(10.0**number)) for number in range(len(router)))
    return Mixture(router, experts, active, normalised)


def run(mixed: Mixture, x: torch.Tensor) -> torch.Tensor:
    operations: Any = SimpleNamespace(gated=lambda gate_up: gate_up)
    return mixed(x, operations)


def rows_of(mixed: Mixture) -> list[list[int]]:
    return [expert.down.rows for expert in mixed.experts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("normalised", [True, False])
def test_each_token_is_the_weighted_sum_of_its_experts(normalised: bool) -> None:
    torch.manual_seed(0)
    x, router = torch.randn(2, 9, 6), torch.randn(5, 6)
    mixed = mixture(router, 3, normalised)
    found = run(mixed, x)
    shares, chosen = torch.softmax(x.double() @ router.double().T, -1).topk(3)
    if normalised:
        shares /= shares.sum(-1, keepdim=True)
    expected = x * (shares * 10.0**chosen).sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert rows_of(mixed) == [[n] if n else [] for n in chosen.flatten().bincount(minlength=5).tolist()]


def test_no_other_expert_runs() -> None:
    mixed = mixture(torch.eye(5), 2, True)
    run(mixed, torch.tensor([[[0.0, 3.0, 0.0, 2.0, 0.0]]]))
    assert rows_of(mixed) == [[], [1], [], [1], []]
    assert mixed.step_bytes == 5 * 5 * 4 + 2 * 20
    assert len(mixed.linears) == 10


def test_a_step_reads_the_active_experts() -> None:
    shapes = {"hidden_size": 128, "num_experts": 8, "moe_intermediate_size": 64}
    held, read = [], []
    for active in (2, 4):
        engine = load(
            small_model("qwen3-moe", **shapes, num_experts_per_tok=active)[1], device="cpu", dtype="bfloat16"
        )
        held.append(weight_bytes(engine))
        read.append(step_bytes(engine))
    assert held[0] == held[1]
    assert read[1] - read[0] == 2 * 2 * (3 * 128 * 64 * 2)  # layers, experts, their weights
    dense = load(small_model("qwen3")[1], device="cpu", dtype="bfloat16")
    assert step_bytes(dense) == weight_bytes(dense)  # tied: the embedding is the head


def test_graphs_are_refused_with_the_reason() -> None:
    engine = load(small_model("qwen3-moe")[1], device="cpu")
    assert isinstance(engine, FastEngine)
    on_gpu: Any = SimpleNamespace(
        device=torch.device("cuda"), attend=SimpleNamespace(name="sdpa"), spec=engine.decoder.spec
    )
    assert Graphs.unsupported_reason(on_gpu) == "which experts a step reads is known only as it runs"


def test_qwen3_vl_moe_always_normalises_whatever_its_config_says(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "vl", "qwen3_vl_moe", norm_topk_prob=False)
    ids = list(range(5, 30))
    with torch.inference_mode():
        expected = transformers_of(folder)(input_ids=torch.tensor([ids])).logits[0]
    for engine in ("fast", "transformers"):
        (found,) = load(folder, device="cpu", dtype="float32", engine=engine).logits([ids])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen3-moe-partly"])
def test_int4_experts_in_float32_are_the_weights_that_their_integers_stand_for(family: str) -> None:
    checkpoint = quantised_model(family, INT4)
    ids = [random_ids(20, 1), random_ids(3, 2)]
    engines = [
        load(checkpoint, device="cpu", dtype="float32", engine=name) for name in ("fast", "transformers")
    ]
    for ours, theirs in zip(*(engine.logits(ids) for engine in engines), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_bfloat16_is_within_its_rounding_of_float32() -> None:
    model, checkpoint = small_model("qwen3-moe")
    ids = random_ids(40)
    exact = reference_logits(model, ids)
    ours, theirs = (
        load(checkpoint, device="cpu", dtype="bfloat16", engine=name).logits([ids])[0]
        for name in ("fast", "transformers")
    )
    error, rounding = ((logits - exact).norm(dim=-1).median() for logits in (ours, theirs))
    assert error <= 1.25 * rounding  # the median: where two experts are near a tie, either may be chosen
