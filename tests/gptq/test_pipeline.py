"""The pipeline over layers, without files around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import usual
from safetensors.torch import load_file, save_file
from tiny_families import random_tokens, write_family

from qwenq.errors import CalibrationError, CorruptFileError, QuantisationError, UnsupportedError, UsageError
from qwenq.gptq import pipeline
from qwenq.gptq.linears import ModuleStats
from qwenq.gptq.pipeline import LayerDone, module_errors, quantise_layers, run_facts
from qwenq.gptq.settings import Settings, check_packable, choose_group_size
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import LAYER_PARTS
from qwenq.models.quantized_folder import LayerStore
from qwenq.models.shapes import fitting_group_sizes

USUAL = usual()


def open_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> BlockwiseDecoder:
    return BlockwiseDecoder(open_checkpoint(folder), torch.device("cpu"), dtype)


def run(
    decoder: BlockwiseDecoder, folder: Path, settings: Settings = USUAL
) -> tuple[LayerStore, list[LayerDone]]:
    store = LayerStore(folder, {}, resume=True)
    done: list[LayerDone] = []
    tokens = random_tokens(decoder.checkpoint.folder, 5, 32)
    quantise_layers(decoder, tokens, settings, store, done.append)
    return store, done


def set_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_linear_of_every_block_is_packed_and_reported(tmp_path: Path) -> None:
    decoder = open_decoder(write_family(tmp_path / "m", "qwen2"))
    store, done = run(decoder, tmp_path / "w")
    assert [(d.index, d.total, d.resumed) for d in done] == [(0, 3, False), (1, 3, False), (2, 3, False)]
    expected = {
        f"model.layers.{index}.{room}.{part}"
        for index in range(3)
        for room in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
        for part in LAYER_PARTS
    }
    assert set(store.source(range(3)).names()) == expected
    errors = dict(module_errors(store, 3))
    assert len(errors) == 21
    for stats in errors.values():
        assert 0 < stats["error"] < stats["rtn_error"]
    for d in done:
        assert d.error < d.rtn_error


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    decoder = open_decoder(write_family(tmp_path / "m"), torch.bfloat16)
    whole, _ = run(decoder, tmp_path / "whole")
    whole_files = sorted(f.name for f in (tmp_path / "whole/layers").iterdir())
    for kept in (0, 1, 2, 3):
        part = tmp_path / f"part{kept}"
        store, _ = run(decoder, part)
        for index in range(kept, 3):
            (part / f"layers/{index:05d}.json").unlink()
        store.release()
        again, done = run(decoder, part)
        assert sum(d.resumed for d in done) == kept
        assert sorted(f.name for f in (part / "layers").iterdir()) == whole_files  # content addresses
        assert dict(module_errors(again, 3)) == dict(module_errors(whole, 3))
        again.release()


def test_weights_are_quantised_as_stored_not_as_rounded_to_the_compute_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 model computed in bfloat16: Int8 is finer than bfloat16's eight bits."""
    folder = write_family(tmp_path / "m")
    stored = load_file(folder / "model.safetensors")
    given: dict[str, torch.Tensor] = {}
    solve = pipeline.quantise_group

    def note(weights: dict[str, torch.Tensor], *rest: object) -> object:
        given.update({name: weight.clone() for name, weight in weights.items()})
        return solve(weights, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "quantise_group", note)
    run(open_decoder(folder, torch.bfloat16), tmp_path / "w")
    assert len(given) == 7
    for name, weight in given.items():
        assert torch.equal(weight, stored[f"model.layers.2.{name}.weight"])


def test_an_activation_that_overflows_names_the_module(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m")
    name = "model.layers.1.post_attention_layernorm.weight"
    set_tensor(folder, name, torch.full((64,), 6e4))  # a weight that float16 has, times more than one
    with pytest.raises(QuantisationError, match="NaN or Inf") as caught:
        run(open_decoder(folder, torch.float16), tmp_path / "w")
    assert caught.value.where == "model.layers.1.mlp.gate_proj"
    assert "--dtype float32" in str(caught.value)


def test_a_weight_that_is_nan_names_the_tensor(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "m")
    name = "model.layers.2.mlp.down_proj.weight"
    set_tensor(folder, name, torch.full((64, 96), torch.nan))
    with pytest.raises(CorruptFileError, match=name):
        run(open_decoder(folder), tmp_path / "w")


def test_raised_damping_is_reported(tmp_path: Path) -> None:
    """One token repeated: every Hessian has rank 1."""
    decoder = open_decoder(write_family(tmp_path / "m"))
    done: list[LayerDone] = []
    tokens = torch.full((2, 8), 7)
    store = LayerStore(tmp_path / "w", {}, resume=True)
    quantise_layers(decoder, tokens, replace(USUAL, damp=1e-9), store, done.append)
    raised = done[0].raised_damping(1e-9)
    assert raised
    assert all(damp > 1e-9 for damp in raised)
    assert "self_attn.q_proj" in next(iter(raised.values()))


def test_damping_that_was_not_raised_is_not_reported() -> None:
    stats = ModuleStats(0.01, 0.02, 0.01, 0)
    assert LayerDone(0, 1, 0.0, {"q": stats}, False).raised_damping(0.01) == {}


@pytest.mark.parametrize(("widths", "size"), [
    ({"q": 256, "down": 640}, 128), ({"q": 576, "down": 1536}, 64), ({"q": 96}, 32),
])  # fmt: skip
def test_auto_takes_the_largest_group_that_divides_every_width(widths: dict[str, int], size: int) -> None:
    chosen, why = choose_group_size("auto", widths)
    assert chosen == size == fitting_group_sizes(widths.values())[0]  # what a plan goes by
    assert str(size) in why


@pytest.mark.parametrize(("wanted", "width", "hint"), [
    (128, 192, "use 64 or 32 or -1"), ("auto", 40, "use -1"), (64, 40, "use -1"),
])  # fmt: skip
def test_a_group_size_that_does_not_divide_names_the_module(wanted: int | str, width: int, hint: str) -> None:
    with pytest.raises(UsageError, match=rf"the {width} input columns of down") as caught:
        choose_group_size(wanted, {"q": 256, "down": width})
    assert hint in str(caught.value)
    assert caught.value.where == "--group-size"


def test_group_size_minus_one_fits_any_width() -> None:
    assert choose_group_size(-1, {"q": 40})[0] == -1


@pytest.mark.parametrize("bad", [-1, 10**9])
def test_tokens_out_of_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    decoder = open_decoder(write_family(tmp_path / "m"))
    with pytest.raises(CalibrationError, match=rf"token id {bad} is outside the model's vocabulary"):
        quantise_layers(decoder, torch.tensor([[1, 2, bad]]), usual(), None, lambda _: None)


def test_widths_that_are_no_multiple_of_a_word_are_refused(tmp_path: Path) -> None:
    decoder = open_decoder(write_family(tmp_path / "m", intermediate_size=100))
    with pytest.raises(UnsupportedError, match=r"mlp.gate_proj is 100 × 64.*multiples of 8") as caught:
        check_packable(decoder, usual(bits=4))
    assert "--bits 8" in str(caught.value)
    check_packable(decoder, usual(bits=8))
    odd = open_decoder(write_family(tmp_path / "odd", intermediate_size=98))
    with pytest.raises(UnsupportedError, match=r"98 × 64.*multiples of 8") as caught:
        check_packable(odd, usual(bits=4))
    assert "--bits 8" not in str(caught.value)  # which would be refused as well


def test_the_facts_of_a_run_tell_runs_apart(tmp_path: Path) -> None:
    decoder = open_decoder(write_family(tmp_path / "m"))
    usual = run_facts(decoder.checkpoint, "cal", USUAL, decoder)
    assert usual == run_facts(decoder.checkpoint, "cal", USUAL, decoder)
    assert usual != run_facts(decoder.checkpoint, "other", USUAL, decoder)
    assert usual != run_facts(decoder.checkpoint, "cal", replace(USUAL, damp=0.02), decoder)
    other = open_decoder(tmp_path / "m", torch.bfloat16)
    assert usual != run_facts(other.checkpoint, "cal", USUAL, other)


def test_the_facts_of_a_run_name_the_code_that_fits_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where C kernels are compiled between two runs: the second would go on with other last bits."""
    decoder = open_decoder(write_family(tmp_path / "m"))
    plain = replace(USUAL, coordinate_descent=False)
    found = []
    for why in (None, "the library is not compiled"):
        monkeypatch.setattr("qwenq.gptq.pipeline.fallback_reason", lambda _, why=why: why)
        found.append([run_facts(decoder.checkpoint, "cal", settings, decoder) for settings in (USUAL, plain)])
    (compiled, rounded), (by_torch, rounded_by_torch) = found
    assert (compiled["solver"], by_torch["solver"]) == ("compiled", "torch")
    assert rounded == rounded_by_torch
