"""config.json from strangers, as the engines take it: refused in words, or one and the same model in both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attempts import Tally, attempt, budget
from hostile_bytes import as_json, damaged_tree
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_families import write_family

from qwenq.models.safetensors_files import open_safetensors
from qwenq.runtime.engine import load

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 325,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
POSITIONS = {
    "max_position_embeddings": 256, "rope_theta": 10000.0, "layer_types": ["full_attention"] * 3,
    "partial_rotary_factor": 1.0, "sliding_window": None,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.1}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}
ROPES: list[dict[str, Any]] = [
    {"rope_scaling": YARN},
    {"rope_parameters": LLAMA3},
    {"rope_parameters": PLAIN},
    {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "rope_theta": 10000.0}},
]
VALUES: list[Any] = [
    None, True, 0, -1, 0.5, 1, 2, 7, 64, 1e-9, 1e300, 2**70, "x", "4", "linear", "dynamic", "yarn", "llama3",
    "default", "longrope", [], [1.0], {}, {"full_attention": PLAIN}, ["full_attention"], YARN, LINEAR,
]  # fmt: skip
KINDS = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    made = {kind: write_family(folder / kind, kind) for kind in KINDS}
    for path in made.values():
        source = open_safetensors(path)
        assert source is not None
        # Far from each other, so that positions are seen in the logits.
        save_file(
            {name: 4 * source.read(name).float() for name in source.names()}, path / "model.safetensors"
        )
        attempt(
            Tally(), 10**9, lambda path=path: [logits(path, engine) for engine in ("fast", "transformers")]
        )
    return made


def logits(folder: Path, engine: str) -> torch.Tensor:
    """Of two rows, after a prompt each and after one step more."""
    runner = load(folder, device="cpu", dtype="float32", engine=engine)
    cache = runner.new_cache(2, 24)
    prompts = [list(range(10, 30)), [5, 6, 7]]
    return torch.cat([runner.prefill(prompts, cache), runner.decode(torch.tensor([8, 9]), cache)])


@budget()
@given(
    kind=st.sampled_from(KINDS),
    config=st.sampled_from(ROPES).flatmap(lambda rope: damaged_tree({**POSITIONS, **rope}, VALUES)),
)
@example(kind="qwen2", config={**POSITIONS, "rope_scaling": YARN, "rope_parameters": PLAIN})
@example(kind="llama", config={**POSITIONS, "rope_scaling": LINEAR, "partial_rotary_factor": 0.5})
@example(kind="qwen2", config={**POSITIONS, "rope_parameters": {"full_attention": PLAIN}})
@example(kind="qwen3", config={**POSITIONS, "layer_types": ["full_attention"]})
def test_what_both_engines_run_is_one_model(
    models: dict[str, Path], tally: Tally, kind: str, config: dict[str, Any]
) -> None:
    folder, found = models[kind], []
    raw = as_json({**SIZES, **config, "model_type": kind})
    (folder / "config.json").write_bytes(raw)
    size = (folder / "model.safetensors").stat().st_size + len(raw)
    for engine in ("fast", "transformers"):
        attempt(tally, size, lambda engine=engine: found.append(logits(folder, engine)))
    if len(found) == 2 and torch.isfinite(found[1]).all():
        torch.testing.assert_close(*found, atol=1e-3, rtol=1e-4)
