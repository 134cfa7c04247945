"""Scales distilled on the whole model's divergence: the gradient, what counts, what goes wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import usual
from safetensors.torch import load_file
from tiny_families import random_tokens, write_family
from tiny_published import write_published
from torch.func import functional_call

from qwenq.gptq import distill
from qwenq.gptq.distill import Distilled, Student, distil, split_sequences
from qwenq.gptq.pipeline import quantise_layers
from qwenq.gptq.settings import Settings
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import LAYER_PARTS
from qwenq.models.gptq_format import PackedLinear, unpack
from qwenq.models.quantized_folder import DISTILLING, LayerStore
from qwenq.stopping import Terminated

CPU = torch.device("cpu")
COARSE = {"initializer_range": 0.15}  # blocks that matter, so that quantising costs something
Problem = tuple[BlockwiseDecoder, torch.Tensor, Settings, LayerStore]


def made(folder: Path, model: Path, samples: int = 24, **changes: Any) -> Problem:
    """A quantised model whose integers are rounded from too little text, and more of it to learn from."""
    decoder = BlockwiseDecoder(open_checkpoint(model), CPU, torch.float32)
    settings = usual(coordinate_descent=False, **changes)
    store = LayerStore(folder, {}, resume=True)
    tokens = random_tokens(model, samples, 32)
    quantise_layers(decoder, tokens[:2], settings, store, lambda _: None)
    return decoder, tokens, settings, store


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    return made(tmp_path / "w", write_family(tmp_path / "m", "qwen2", **COARSE))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text"])
@pytest.mark.parametrize("sym", [True, False])
def test_the_gradient_is_that_of_the_whole_model(tmp_path: Path, family: str, sym: bool) -> None:
    """Oracle: transformers' model in one piece, its weights made of the scales, torch's own divergence."""
    if "_" in family:
        model = write_published(tmp_path / "m", family)
    else:
        model = write_family(tmp_path / "m", family, **COARSE)
    decoder, tokens, settings, store = made(tmp_path / "w", model, sym=sym)
    student = Student(
        BlockwiseDecoder(decoder.checkpoint, CPU, torch.float32, differentiable=True), store, settings
    )
    rows = tokens[:2]
    with torch.no_grad():
        (hidden,) = student._decoder.embed([rows])
    (wanted,) = distill._behind_last_block(decoder, [rows])
    loss = student.descend(hidden, wanted)
    values = {name: value.float().requires_grad_() for name, value in student.tensors(student.change).items()}
    weights = dict(values)
    for index, prefix in enumerate(decoder.names):
        packed = store.tensors(index)
        for module in {name.rpartition(".")[0] for name in packed}:
            linear = PackedLinear(*(packed[f"{module}.{part}"] for part in LAYER_PARTS))
            bits = settings.bits_of(module.removeprefix(f"{prefix}."))
            integers, _, zeros = unpack(linear, bits, settings.checkpoint_format)
            steps = integers.unflatten(1, (zeros.shape[1], -1)).float() - zeros[..., None].float()
            weights[f"{module}.weight"] = (steps * weights.pop(f"{module}.scales").T[..., None]).flatten(1)
    whole = BlockwiseDecoder(decoder.checkpoint, CPU, torch.float32, differentiable=True)._model
    tied = {"lm_head.weight"} if decoder.checkpoint.tied else set()
    base = {name: decoder.checkpoint.read(name).float() for name in whole.state_dict() if name not in tied}
    assert base.keys() >= weights.keys()
    expected = functional_call(whole, base, (rows,)).logits.log_softmax(-1)
    found = functional_call(whole, base | weights, (rows,)).logits.log_softmax(-1)
    divergence = torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True) / rows.numel()
    divergence.backward()
    assert loss == pytest.approx(divergence.item(), rel=1e-4)
    assert loss > 1e-4
    largest = float(student.gradient.abs().max())
    for prefix, linears in zip(decoder.names, student._linears, strict=True):
        for name, linear in linears.items():
            value = values[f"{prefix}.{name}.scales"]
            relative = torch.zeros_like(value) if value.grad is None else value.grad * value
            got = student.gradient[linear.where].view(relative.T.shape)
            torch.testing.assert_close(got, relative.T, rtol=1e-3, atol=5e-5 * largest, msg=name)


def test_held_back_sequences_come_nearer_and_only_scales_change(problem: Problem) -> None:
    decoder, tokens, settings, store = problem
    found = distil(decoder, tokens, settings, store, 4, 0)
    assert found is not None
    done, tuned = found
    assert done.kept and done.stopped is None
    assert done.after < 0.99 * done.before
    assert (done.sequences, done.deciding) == (21, 3)
    assert all(name.endswith(".scales") for name in tuned)
    for index in range(3):
        for name, stored in store.tensors(index).items():
            if name.endswith(".scales"):
                assert tuned[name].dtype is torch.float16
                assert tuned[name].shape == stored.shape
                assert not torch.equal(tuned[name], stored)
    again = distil(decoder, tokens, settings, without_state(store), 4, 0)
    assert again is not None and again[0] == done
    assert all(torch.equal(again[1][name], tuned[name]) for name in tuned)
    other = distil(decoder, tokens, settings, without_state(store), 4, 1)
    assert other is not None and other[0] != done


def without_state(store: LayerStore) -> LayerStore:
    (store.folder / DISTILLING).unlink()
    return store


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    problem: Problem, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, tokens, settings, store = problem
    monkeypatch.setattr(distill, "TOKENS_PER_STEP", 256)
    whole = distil(decoder, tokens, settings, store, 2, 0)
    without_state(store)
    made_steps = 0

    def asked() -> bool:
        return made_steps == stop

    descend = Student.descend

    def count(self: Student, *given: torch.Tensor) -> float:
        nonlocal made_steps
        made_steps += 1
        return descend(self, *given)

    monkeypatch.setattr(distill, "asked", asked)
    monkeypatch.setattr(Student, "descend", count)
    with pytest.raises(Terminated):
        distil(decoder, tokens, settings, store, 2, 0)
    assert made_steps == stop
    monkeypatch.setattr(distill, "asked", lambda: False)
    resumed = distil(decoder, tokens, settings, store, 2, 0)
    assert whole is not None and resumed is not None
    assert made_steps == whole[0].steps == 6
    assert resumed[0] == whole[0]
    assert all(torch.equal(resumed[1][name], whole[1][name]) for name in whole[1])


def test_a_state_of_other_layers_or_settings_is_not_gone_on_from(problem: Problem) -> None:
    decoder, tokens, settings, store = problem
    first = distil(decoder, tokens, settings, store, 1, 0)
    state = load_file(store.folder / DISTILLING)
    distil(decoder, tokens, settings, store, 2, 0)
    assert not torch.equal(load_file(store.folder / DISTILLING)["change"], state["change"])
    (store.folder / DISTILLING).write_bytes(b"damaged")
    again = distil(decoder, tokens, settings, store, 1, 0)
    assert first is not None and again is not None and again[0] == first[0]


def test_a_run_that_diverges_leaves_the_scales_of_gptq(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, tokens, settings, store = problem
    monkeypatch.setattr(distill, "RATE", 0.5)
    found = distil(decoder, tokens, settings, store, 4, 0)
    assert found is not None
    done, tuned = found
    assert tuned == {} and not done.kept
    assert "the divergence rose from" in done.sentence
    assert "GPTQ's scales are kept" in done.sentence


def test_a_gradient_that_is_not_finite_names_the_block(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, tokens, settings, store = problem
    backward = distill._Dequantised.backward
    calls = 0

    def spoilt(ctx: Any, *gradients: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        scales, *rest = backward(ctx, *gradients)
        return (scales * torch.nan if calls == 10 else scales, *rest)

    monkeypatch.setattr(distill._Dequantised, "backward", staticmethod(spoilt))
    found = distil(decoder, tokens, settings, store, 4, 0)
    assert found is not None
    assert found[1] == {}
    assert found[0].stopped == "the gradient in model.layers.1 is not finite"


@pytest.mark.parametrize(
    ("count", "sizes"), [(3, None), (4, (2, 2)), (16, (14, 2)), (48, (42, 6)), (128, (112, 16))]
)
def test_an_eighth_decides_and_takes_no_other_part(count: int, sizes: tuple[int, int] | None) -> None:
    parts = split_sequences(count)
    assert (None if parts is None else tuple(map(len, parts))) == sizes
    if parts is not None:
        assert sorted([*parts[0], *parts[1]]) == list(range(count))


def test_what_is_said_of_a_result() -> None:
    better = Distilled(0.2, 0.1, 8, 14, 2)
    assert (
        better.sentence
        == "distilled: KL of 2 sequences that were not learned from fell from 0.2000 to 0.1000"
    )
    same = dataclasses.replace(better, after=0.2)
    assert same.sentence.startswith("distilled without gain")
