"""Random models: seeded, the same tensor by tensor, loadable, marked, and written in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwenq.errors import ModelError, UsageError
from qwenq.models import catalogue
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.random_weights import (
    RANDOM_KEY,
    is_random,
    random_checkpoint,
    refuse_random,
    write_random_checkpoint,
)
from qwenq.models.rounded import rounded
from qwenq.models.shapes import ModelShape
from qwenq.runtime.engine import load

SMALL: dict[str, Any] = catalogue.config_for("qwen3-0.6b") | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "vocab_size": 1000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_what_is_written_is_what_is_read_without_a_disk(tmp_path: Path) -> None:
    write_random_checkpoint(SMALL, tmp_path, seed=7)
    written = load_file(tmp_path / "model.safetensors")
    made = random_checkpoint(SMALL, seed=7)
    assert set(written) == set(made.names())
    for name in reversed(list(made.names())):  # the order does not matter
        assert torch.equal(written[name], made.read(name))
    assert made.config[RANDOM_KEY] == {"seed": 7}
    assert json.loads((tmp_path / "config.json").read_text()) == made.config
    assert sorted(item.name for item in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_values_are_normal_and_norms_are_ones() -> None:
    made = random_checkpoint(SMALL, dtype="float32")
    embedding = made.read("model.embed_tokens.weight")
    assert embedding.shape == (1000, 64)
    assert embedding.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(embedding.mean().item()) < 5e-4
    inside = (embedding.abs() < 0.02).float().mean().item()
    assert inside == pytest.approx(0.6827, abs=0.01)  # within one standard deviation
    assert torch.equal(made.read("model.norm.weight"), torch.ones(64))
    assert torch.equal(made.read("model.layers.0.self_attn.q_norm.weight"), torch.ones(32))


def test_seed_and_name_make_the_tensor() -> None:
    def read(seed: int, name: str, **options: Any) -> torch.Tensor:
        return random_checkpoint(SMALL, seed, **options).read(name)

    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(read(3, up), read(3, up, layers=48))  # the depth changes nothing
    assert not torch.equal(read(3, up), read(4, up))
    assert not torch.equal(read(3, up), read(3, up.replace("up", "gate")))
    single, half = read(3, up, dtype="float32"), read(3, up, dtype="bfloat16")
    assert torch.equal(single.bfloat16(), half)  # the same model in another dtype


def test_the_stream_never_changes() -> None:
    """Golden values: a report names a seed, and the seed has to mean the same model tomorrow."""
    read = random_checkpoint(SMALL, 0, "float32").read("model.layers.0.self_attn.k_proj.weight")
    golden = [-0.0116183944, 0.0122112688, 0.0166702308, 0.00710840523]
    torch.testing.assert_close(read.flatten()[:4], torch.tensor(golden), rtol=1e-6, atol=1e-9)


def test_the_fingerprint_follows_from_what_decides_the_values_and_draws_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(*_: object) -> torch.Tensor:
        raise AssertionError("a tensor was drawn")

    monkeypatch.setattr("qwenq.models.random_weights.RandomSource.read", drawn)
    usual = random_checkpoint(SMALL, 3).fingerprint
    assert usual == random_checkpoint(SMALL, 3).fingerprint
    assert len(usual) == 16
    others = [
        random_checkpoint(SMALL, 4),
        random_checkpoint(SMALL, 3, "float32"),
        random_checkpoint(SMALL, 3, layers=2),
        random_checkpoint(SMALL, 3, device="cuda"),
        random_checkpoint(SMALL | {"initializer_range": 0.1}, 3),
    ]
    monkeypatch.setattr("qwenq.models.random_weights._STREAM", 2)
    others.append(random_checkpoint(SMALL, 3))
    assert len({usual, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_a_random_model_on_the_disk_is_known_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    written = write_random_checkpoint(SMALL, tmp_path / "m", seed=7)
    before = written.fingerprint
    assert before == open_checkpoint(tmp_path / "m").fingerprint
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_checkpoint(tmp_path / "m").fingerprint != before


def test_tensors_longer_than_a_chunk_do_not_repeat() -> None:
    config = SMALL | {"vocab_size": 40_000}
    table = random_checkpoint(config).read("model.embed_tokens.weight").flatten()
    chunk = 1 << 20
    assert table.numel() > 2 * chunk
    assert not torch.equal(table[:1000], table[chunk : chunk + 1000])
    assert table[-1000:].float().std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen2.5-0.5b-instruct", "smollm2-135m-instruct"])
def test_transformers_loads_and_runs_it(name: str, tmp_path: Path) -> None:
    small = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "bos_token_id")}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2}
    write_random_checkpoint(catalogue.config_for(name) | small, tmp_path, layers=2, max_bytes=100_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = model(torch.arange(10)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


MIXED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "vocab_size": 1000,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "name", ["qwen3-30b-a3b", "qwen3-next-80b-a3b-instruct", "qwen3.5-9b", "qwen3.5-35b-a3b"]
)
def test_mixtures_and_hybrids_run_plain_and_rounded(name: str) -> None:
    """What `qwenq profile --weights random` measures; linear attention has 8 bits."""
    known = catalogue.config_for(name)
    made = random_checkpoint(known | {key: MIXED[key] for key in MIXED if key in known})
    int4 = rounded(made, 4)
    for checkpoint in (made, int4):
        fast, other = (
            load(checkpoint, device="cpu", dtype="float32", engine=engine).logits([[5, 6, 7, 8]])[0]
            for engine in ("fast", "transformers")
        )
        torch.testing.assert_close(fast, other, atol=1e-4, rtol=0)
        assert fast.std() > 0
    shape = ModelShape.from_config(made.config)
    total = sum(int4.info(name).numel * int4.info(name).dtype.itemsize for name in int4.names())
    assert total == shape.quantised_bytes(4, 32, "bfloat16")


def test_random_models_are_marked_and_refused() -> None:
    config = random_checkpoint("qwen-7b-chat", seed=1, layers=4).config
    assert config["num_hidden_layers"] == 4
    assert is_random(config)
    assert not is_random(catalogue.config_for("qwen-7b-chat"))
    refuse_random(catalogue.config_for("qwen-7b-chat"), "accuracy")
    with pytest.raises(UsageError, match="accuracy would mean nothing"):
        refuse_random(config, "accuracy")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="something else"):
        write_random_checkpoint(SMALL, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_an_unfinished_model_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenq.models.random_weights import RandomSource

    read = RandomSource.read

    def fails_late(self: RandomSource, name: str) -> torch.Tensor:
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(RandomSource, "read", fails_late)
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(SMALL, tmp_path / "m", max_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_wishes_that_cannot_be_met() -> None:
    with pytest.raises(UsageError, match="dtype"):
        random_checkpoint("qwen-7b", dtype="int8")
    with pytest.raises(UsageError, match="layers"):
        random_checkpoint("qwen-7b", layers=0)
    with pytest.raises(UsageError, match="catalogue"):
        random_checkpoint("qwen-8b")
    with pytest.raises(ModelError, match="no tensor"):
        random_checkpoint(SMALL).read("model.layers.3.mlp.up_proj.weight")


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """4 layers and 24 layers of 12 MB each: the second peak is higher by less than two layers."""
    script = """
import json, resource, sys
from pathlib import Path
from qwenq.models.random_weights import write_random_checkpoint
config = json.loads(sys.argv[1])
for layers in (4, 24):
    write_random_checkpoint(config, Path(sys.argv[2], str(layers)), layers=layers)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    config = SMALL | {"hidden_size": 512, "intermediate_size": 3584, "head_dim": 64, "num_attention_heads": 8}
    output = subprocess.run(
        [sys.executable, "-c", script, json.dumps(config), str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    shallow, deep = map(int, output.split())
    assert deep - shallow < 24e6
