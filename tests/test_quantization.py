"""The whole pipeline on tiny models: what is in the folder, and is it what was computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, manifest_of, recipe_for, run
from safetensors.torch import load_file
from tiny_families import save_calibration, write_family

from qwenq import quantization as pipeline
from qwenq.errors import CalibrationError, StorageError, UsageError, VerificationError
from qwenq.gptq.pipeline import quantise_layers
from qwenq.models import quantized_folder
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource
from qwenq.models.integrity import verify_files
from qwenq.models.quantized_folder import LayerStore
from qwenq.quantization import quantize

ALWAYS = {
    "README.md",
    "config.json",
    "quantize_config.json",
    "qwenq.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
LINEARS = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


FAMILIES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("llama", "bfloat16", {}, {"bits": 4}),
    ("llama", "float32", {"attention_bias": True, "mlp_bias": True}, {"bits": 8}),
    ("qwen2", "float16", {"tie_word_embeddings": False}, {"bits": 4, "sym": False, "any_engine": True}),
    ("qwen2", "bfloat16", {}, {"bits": 4, "group_size": -1, "dtype": "bfloat16"}),
    ("qwen3", "bfloat16", {"tie_word_embeddings": False}, {"bits": 8, "group_size": 32, "act_order": "none"}),
    ("qwen3", "float32", {}, {"bits": 4, "scale_search": "none", "coordinate_descent": False}),
]


@pytest.mark.parametrize(("family", "dtype", "shape", "settings"), FAMILIES)
def test_the_folder_is_a_whole_checkpoint(
    tmp_path: Path, family: str, dtype: str, shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    model, out = write_family(tmp_path / "m", family, dtype, **shape), tmp_path / "out"
    result = run(model, out, **settings)
    assert {file.name for file in out.iterdir()} == ALWAYS | {"model.safetensors"}
    assert sorted(verify_files(out)) == sorted(ALWAYS - {"qwenq.json", "README.md"} | {"model.safetensors"})
    assert not (tmp_path / "out.partial").exists()
    assert result.folder == out

    base, written = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    quantised = [f"model.layers.{index}.{name}" for index in range(3) for name in LINEARS]
    expected = set(base) - {f"{name}.weight" for name in quantised}
    packed = {f"{name}.{part}" for name in quantised for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert set(written) == expected | packed
    for name in expected:  # embedding, norms, biases, head: bit for bit, in their own dtype
        assert written[name].dtype is base[name].dtype
        assert torch.equal(written[name], base[name])
    assert {written[f"{name}.scales"].dtype for name in quantised} == {torch.float16}

    config, short = (json.loads((out / name).read_text()) for name in ("config.json", "quantize_config.json"))
    said = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert short.items() <= said.items()
    assert said["quant_method"] == "gptq"
    assert said["bits"] == settings["bits"]
    assert said["sym"] == settings.get("sym", True)
    assert said["group_size"] == settings.get("group_size", 32)
    assert said["desc_act"] is False  # static groups leave the natural order
    size = 64 if said["group_size"] == -1 else 32
    g_idx = written["model.layers.0.self_attn.q_proj.g_idx"]
    assert torch.equal(g_idx, torch.arange(64, dtype=torch.int32) // size)


def test_what_is_on_disk_is_what_the_pipeline_computed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that each block held when its outputs were computed, against the folder dequantised."""
    model, out = write_family(tmp_path / "m", "qwen2"), tmp_path / "out"
    held: dict[str, torch.Tensor] = {}

    def spy(decoder: Any, *rest: Any) -> None:
        forget = decoder.block

        def block(index: int) -> Any:
            context = forget(index)
            leave = context.__exit__

            class Watched:
                def __enter__(self) -> Any:
                    self.block = context.__enter__()
                    return self.block

                def __exit__(self, *error: Any) -> Any:
                    for name in LINEARS:
                        weight = self.block.get_submodule(name).weight
                        held[f"model.layers.{index}.{name}.weight"] = weight.clone()
                    return leave(*error)

            return Watched()

        decoder.block = block
        quantise_layers(decoder, *rest)
        del decoder.block

    monkeypatch.setattr("qwenq.gptq.pipeline.quantise_layers", spy)
    run(model, out)
    written = open_checkpoint(out)
    source = DequantisedSource(written.source, QuantConfig.read(written.config), torch.float32)
    assert len(held) == 21
    for name, weight in held.items():
        assert torch.equal(source.read(name), weight), name


def test_the_manifest_tells_how_it_was_made(tmp_path: Path) -> None:
    model, out = write_family(tmp_path / "m"), tmp_path / "out"
    ear = Recorder()
    result = run(model, out, ear, damp=0.02)
    manifest = manifest_of(out)
    assert manifest["base"]["fingerprint"] == open_checkpoint(model).fingerprint
    assert (manifest["base"]["name"], manifest["base"]["folder"]) == ("m", "../m")
    assert manifest["resumed_layers"] == 0
    assert manifest["recipe"]["quantize"]["damp"] == 0.02
    assert manifest["calibration"]["samples"] == 4
    assert set(manifest["versions"]) >= {"python", "qwenq", "torch", "transformers", "safetensors"}
    told = manifest["computed_in"]
    parts = tuple(told.pop(name) for name in ("attention", "sums", "solver"))
    assert parts in (
        ("qwenq_causal", "compiled", "compiled"),
        ("sdpa", "torch", "torch"),
    )  # as machines have it
    assert told.pop("threads") == torch.get_num_threads()
    assert told == {"dtype": "float32", "device": "cpu"}
    assert set(manifest["seconds"]) == {"calibration", "layers", "write", "check"}
    assert len(manifest["modules"]) == 21
    assert all(m["error"] < m["rtn_error"] for m in manifest["modules"].values())
    assert result.check is not None
    assert manifest["check"] == result.check.to_json()
    assert result.to_json()["check"]["kl"]["value"] > 0
    assert ear.total == 3
    assert [done.index for done in ear.done] == [0, 1, 2]


def test_large_models_are_written_in_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_family(tmp_path / "m")
    write = quantized_folder.write_shards
    monkeypatch.setattr(quantized_folder, "write_shards", lambda *args: write(*args, max_bytes=50_000))
    out = run(model, tmp_path / "out").folder
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert {*shards, "model.safetensors.index.json"} <= set(verify_files(out))
    monkeypatch.undo()
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    whole = run(model, tmp_path / "whole").folder
    together = {name: t for shard in shards for name, t in load_file(out / shard).items()}
    assert all(torch.equal(together[n], t) for n, t in load_file(whole / "model.safetensors").items())


def test_companions_travel_along(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m")
    (model / "LICENSE").write_text("Apache-2.0")
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    (model / "modeling_custom.py").write_text("raise SystemExit")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_custom.X"}}))
    ear = Recorder()
    out = run(model, tmp_path / "out", ear).folder
    assert {f.name for f in out.iterdir()} == ALWAYS | {
        "model.safetensors",
        "LICENSE",
        "generation_config.json",
    }
    assert "auto_map" not in (out / "config.json").read_text()
    assert any("auto_map" in line and "ignored" in line for line in ear.lines)


def test_transformers_reads_config_and_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    out = run(write_family(tmp_path / "m", "qwen3"), tmp_path / "out").folder
    config = AutoConfig.from_pretrained(out)
    assert config.model_type == "qwen3"
    assert config.quantization_config["bits"] == 4
    assert AutoTokenizer.from_pretrained(out).encode("Quantise")


def test_the_same_command_gives_the_same_bits(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m")
    first, second = (run(model, tmp_path / name).folder for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_broken_result_is_not_published_and_its_layers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenq.comparison import judge_check

    check = pipeline.check
    monkeypatch.setattr(
        pipeline, "check", lambda *a, **k: replace(check(*a, **k), verdict=judge_check(float("nan"), 0.0, 4))
    )
    with pytest.raises(VerificationError, match="broken") as caught:
        run(write_family(tmp_path / "m"), tmp_path / "out")
    assert "nothing was published" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial/layers").glob("*.safetensors"))) == 3


def test_what_is_checked_is_what_was_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales ruined between writing and checking: the check has to see it."""
    write = quantized_folder.write_shards

    def ruined(folder: Path, entries: Any, read: Callable[[str], torch.Tensor]) -> Any:
        return write(
            folder, entries, lambda name: read(name) * (-40 if name.endswith("o_proj.scales") else 1)
        )

    monkeypatch.setattr(quantized_folder, "write_shards", ruined)
    with pytest.raises(VerificationError):
        run(write_family(tmp_path / "m"), tmp_path / "out")


def test_an_interrupted_write_leaves_nothing_in_the_published_folder(tmp_path: Path) -> None:
    """A kill in mid-write leaves a temporary file behind; the next run must not publish it."""
    model = write_family(tmp_path / "m")
    staged = tmp_path / "out.partial" / "checkpoint"
    staged.mkdir(parents=True)
    (staged / ".model.safetensors.123.tmp").write_bytes(b"half a file")
    (staged / "model-00001-of-00002.safetensors").write_bytes(b"a shard of another plan")
    out = run(model, tmp_path / "out").folder
    assert {file.name for file in out.iterdir()} == ALWAYS | {"model.safetensors"}


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert verify_files(run(write_family(tmp_path / "m"), tmp_path / "out").folder)


def test_a_name_is_made_from_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_family(tmp_path / "Tiny-1B")
    recipe = recipe_for(model, bits=8)
    monkeypatch.chdir(model)
    made = quantize(recipe.override({"model": "."}), None, Recorder(), device="cpu")
    assert made.folder == model / "Tiny-1B-GPTQ-Int8"


def test_without_a_model_the_name_is_the_bundled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_family(tmp_path / "cached")
    monkeypatch.setattr("qwenq.models.bundled.bundled_model", lambda: model)
    monkeypatch.chdir(tmp_path)
    recipe = replace(recipe_for(model), model=None)
    made = quantize(recipe, None, Recorder(), device="cpu").folder
    assert made == tmp_path / "SmolLM2-135M-Instruct-GPTQ-Int4"
    assert manifest_of(made)["base"].keys() == {"model", "name", "fingerprint"}


def test_sequences_are_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    """``auto`` fits a model whose context is shorter than the default."""
    model = write_family(tmp_path / "m", max_position_embeddings=64)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{n} squared is {n * n}. " * 90 for n in range(40)))
    for samples, why in ((2, "in part as asked"), ("auto", "few enough for a CPU")):
        ear, out = Recorder(), tmp_path / f"out-{samples}"
        recipe = recipe_for(model, text).override(calibration={"samples": samples, "held_out": 1})
        assert manifest_of(quantize(recipe, out, ear, device="cpu").folder)["calibration"]["seq_len"] == 64
        assert f"× 64 tokens ({why}" in "\n".join(ear.lines)


def test_a_set_without_held_out_text_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m")
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    path = save_calibration(model, tmp_path / "c.safetensors", tokens, tokens[:0])
    with pytest.raises(CalibrationError, match="no held-out") as caught:
        quantize(recipe_for(model, path), tmp_path / "out", Recorder(), device="cpu")
    assert "--held-out" in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_random_weights_are_quantised_but_not_judged(tmp_path: Path) -> None:
    from qwenq.models.random_weights import write_random_checkpoint

    model = write_family(tmp_path / "m", "qwen2")
    config = json.loads((model / "config.json").read_text())
    random = tmp_path / "random"
    write_random_checkpoint(config, random, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (random / name).write_bytes((model / name).read_bytes())
    ear = Recorder()
    result = run(random, tmp_path / "out", ear)
    assert result.check is None
    assert manifest_of(result.folder)["check"] is None
    assert any("random weights" in line for line in ear.lines)


def test_random_weights_in_a_folder_of_any_name_keep_their_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``random-weights`` is also what a model that lies on no disk is called in messages."""
    from qwenq.models.random_weights import write_random_checkpoint

    model = write_family(tmp_path / "m", "qwen2")
    monkeypatch.chdir(tmp_path)
    named = Path("random-weights")
    write_random_checkpoint(json.loads((model / "config.json").read_text()), named, seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (named / name).write_bytes((model / name).read_bytes())
    result = run(named, tmp_path / "out")
    assert (result.folder / "tokenizer.json").is_file()


def test_the_lock_is_released_when_a_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_family(tmp_path / "m")

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(quantized_folder, "stage", full)
    recipe = recipe_for(model)
    with pytest.raises(StorageError):
        quantize(recipe, tmp_path / "out", Recorder(), device="cpu")
    monkeypatch.undo()
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    ear = Recorder()
    assert quantize(recipe, tmp_path / "out", ear, device="cpu").resumed_layers == 3
    assert any("resuming: 3 of 3" in line for line in ear.lines)
    assert manifest_of(tmp_path / "out")["resumed_layers"] == 3  # its seconds are the second run's alone


def test_a_run_with_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m")
    LayerStore(tmp_path / "out.partial", {"settings": "others"}, resume=True).release()
    with pytest.raises(UsageError, match="other settings"):
        run(model, tmp_path / "out")
    made = quantize(recipe_for(model), tmp_path / "out", Recorder(), device="cpu", resume=False)
    assert made.resumed_layers == 0
