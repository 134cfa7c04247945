from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny_families import random_tokens, write_family
from tiny_published import STRANGERS, write_published
from torch import Tensor, nn

from qwenq.errors import QuantisationError
from qwenq.gptq.sequential import run_sequential, shared_inputs
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.transformers_model import linears_of

ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GROUPS = [*ATTENTION, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


class Bench:
    """One block with weights, hidden states in three batches, and how to run it."""

    def __init__(self, folder: Path, family: str) -> None:
        write_family(folder, family)
        self.decoder = BlockwiseDecoder(open_checkpoint(folder), torch.device("cpu"), torch.float32)
        self.batches = self.decoder.embed(random_tokens(folder, 5, 12).split(2))

    def forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return self.decoder.forward(block, hidden)


def coarse(block: nn.Module, name: str) -> Tensor:
    """Some other weight."""
    return linears_of(block)[name].weight.data.round(decimals=1)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("walk") / "m", request.param)


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def test_linears_that_read_the_same_tensor_are_found_in_order(bench: Bench) -> None:
    with bench.decoder.block(0) as block:
        found = shared_inputs(block, lambda h: bench.forward(block, h), bench.batches[0][:1])
    assert found == GROUPS


def test_without_new_weights_the_outputs_are_those_of_a_plain_forward(bench: Bench) -> None:
    asked: list[list[str]] = []
    with bench.decoder.block(0) as block:
        plain = [bench.forward(block, states) for states in bench.batches]
        walked, _ = run_sequential(
            block,
            lambda h: bench.forward(block, h),
            bench.batches,
            GROUPS,
            lambda names, *_: asked.append(list(names)) or {},
        )
    assert asked == GROUPS
    assert all(torch.equal(a, b) for a, b in zip(plain, walked, strict=True))


def test_each_linear_is_evaluated_once_a_batch(bench: Bench) -> None:
    calls: Counter[str] = Counter()
    with bench.decoder.block(0) as block:
        handles = [
            linear.register_forward_hook(lambda *_, name=name: calls.update([name]))
            for name, linear in linears_of(block).items()
        ]
        run_sequential(block, lambda h: bench.forward(block, h), bench.batches, GROUPS, lambda *_: {})
        for handle in handles:
            handle.remove()
    assert calls == {name: len(bench.batches) for names in GROUPS for name in names}


def test_later_linears_are_given_what_the_replaced_ones_before_them_make(bench: Bench) -> None:
    """o_proj's inputs under new q, k and v, down_proj's under all: what a second run sees."""
    seen: dict[str, list[Tensor]] = {}
    with bench.decoder.block(0) as block:

        def replace(names: Sequence[str], inputs: list[Tensor], *_: object) -> dict[str, Tensor]:
            seen.update(dict.fromkeys(names, inputs))
            return {name: coarse(block, name) for name in names}

        walked, _ = run_sequential(block, lambda h: bench.forward(block, h), bench.batches, GROUPS, replace)
        again: dict[str, list[Tensor]] = {name: [] for name in seen}
        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: again[name].append(args[0]))
            for name, linear in linears_of(block).items()
        ]
        outputs = [bench.forward(block, states) for states in bench.batches]
        for handle in handles:
            handle.remove()
    for name, inputs in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(inputs, again[name], strict=True)), name
    assert all(torch.equal(a, b) for a, b in zip(outputs, walked, strict=True))


def test_reference_batches_pass_through_the_original_block(bench: Bench) -> None:
    """Both streams pause at the same places; the reference knows nothing of new weights."""
    given: dict[str, list[Tensor]] = {}
    with bench.decoder.block(0) as block:
        expected: dict[str, list[Tensor]] = {names[0]: [] for names in GROUPS}
        handles = [
            linears_of(block)[name].register_forward_pre_hook(
                lambda _, args, name=name: expected[name].append(args[0])
            )
            for name in expected
        ]
        plain = [bench.forward(block, states) for states in bench.batches[:2]]
        for handle in handles:
            handle.remove()

        def replace(
            names: Sequence[str], _: object, reference: list[Tensor], *__: object
        ) -> dict[str, Tensor]:
            given[names[0]] = reference
            return {name: coarse(block, name) for name in names}

        walked, original = run_sequential(
            block, lambda h: bench.forward(block, h), bench.batches, GROUPS, replace, bench.batches[:2]
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, original, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(walked[:2], original, strict=True))
    for name, inputs in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(inputs, given[name], strict=True)), name


def test_an_error_in_between_leaves_no_hook_behind(bench: Bench) -> None:
    def fail(names: Sequence[str], *_: object) -> dict[str, Tensor]:
        if names == GROUPS[1]:
            raise QuantisationError("no")
        return {}

    with bench.decoder.block(0) as block:
        plain = bench.forward(block, bench.batches[0])
        with pytest.raises(QuantisationError, match="no"):
            run_sequential(block, lambda h: bench.forward(block, h), bench.batches, GROUPS, fail)
        assert not any(linear._forward_pre_hooks for linear in linears_of(block).values())
        assert torch.equal(bench.forward(block, bench.batches[0]), plain)


def test_ctrl_c_inside_a_forward_reaches_the_caller(bench: Bench) -> None:
    with bench.decoder.block(0) as block:

        def interrupted(hidden: Tensor) -> Tensor:
            bench.forward(block, hidden)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_sequential(block, interrupted, bench.batches, GROUPS, lambda *_: {})
        assert not any(linear._forward_pre_hooks for linear in linears_of(block).values())


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_the_original_model_meets_no_weight_that_is_replaced_already(tmp_path: Path, family: str) -> None:
    """Linears that share an input are not always evaluated in a row: latent attention; bits that differ."""
    model = write_published(tmp_path / "m", family) if family in STRANGERS else write_family(tmp_path / "m")
    decoder = BlockwiseDecoder(open_checkpoint(model), torch.device("cpu"), torch.float32)
    batches = decoder.embed(random_tokens(model, 2, 12).split(1))
    with decoder.block(0) as block:

        def forward(hidden: Tensor) -> Tensor:
            return decoder.forward(block, hidden)

        plain = [forward(states) for states in batches]
        groups = shared_inputs(block, forward, batches[0], lambda name: "k_proj" in name)
        _, original = run_sequential(
            block,
            forward,
            batches,
            groups,
            lambda names, *_: {name: coarse(block, name) for name in names},
            batches,
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, original, strict=True))
    if family == "qwen3":
        assert groups[:3] == [["self_attn.q_proj"], ["self_attn.k_proj"], ["self_attn.v_proj"]]
