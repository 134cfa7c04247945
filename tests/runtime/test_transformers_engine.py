"""The transformers engine with other architectures: right, or refused; never another model's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.plain_qwen_v1 import MemorySource
from runtime.small_models import VOCAB, random_ids, reference_logits
from transformers import AutoConfig, AutoModelForCausalLM

from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.runtime.engine import load


def model_of(kind: str, **changes: Any) -> tuple[Any, Checkpoint]:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        **changes,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()
    tensors = dict(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False):
        del tensors["lm_head.weight"]
    return model, Checkpoint(Path("in-memory"), model.config.to_dict(), MemorySource(tensors))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
        ("gemma", {"num_key_value_heads": 2, "head_dim": 16}),
        ("phi", {}),
        ("gpt2", {}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": None}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
        ("cohere", {"num_key_value_heads": 2}),
        ("granite", {"num_key_value_heads": 2, "logits_scaling": 4.0}),
    ],
)
def test_other_architectures_give_what_transformers_gives(kind: str, changes: dict[str, Any]) -> None:
    model, checkpoint = model_of(kind, **changes)
    engine = load(checkpoint, device="cpu", dtype="float32", engine="transformers")
    rows = [random_ids(17, 1), random_ids(6, 2)]
    expected = [reference_logits(model, row) for row in rows]
    cache = engine.new_cache(2, 17)
    for found, wanted in zip(engine.logits([row[:-1] for row in rows], cache), expected, strict=True):
        torch.testing.assert_close(found, wanted[:-1], atol=1e-4, rtol=0)
    step = engine.decode(torch.tensor([row[-1] for row in rows]), cache)
    torch.testing.assert_close(step, torch.stack([wanted[-1] for wanted in expected]), atol=1e-4, rtol=0)


def test_attention_over_later_tokens_is_refused() -> None:
    changes = {"num_key_value_heads": 2, "head_dim": 16, "use_bidirectional_attention": True}
    with pytest.raises(UnsupportedError, match="queries that see later tokens"):
        load(model_of("gemma2", **changes)[1], device="cpu", dtype="float32", engine="transformers")


def test_a_soft_cap_that_attention_is_not_given_is_refused() -> None:
    _, checkpoint = model_of("llama")
    capped = replace(checkpoint, config={**checkpoint.config, "attn_logit_softcapping": 50.0})
    with pytest.raises(UnsupportedError, match="soft cap of scores is not passed on by LlamaAttention"):
        load(capped, device="cpu", dtype="float32", engine="transformers").logits([[1, 2]])


def test_modelling_code_that_drops_attention_arguments_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match="StableLmAttention does not pass the arguments of our attention on"
    ):
        load(model_of("stablelm")[1], device="cpu", dtype="float32", engine="transformers")


def test_a_null_where_qwen_v1s_settings_would_be_is_no_qwen_v1() -> None:
    model, checkpoint = model_of("llama")
    nothing = replace(checkpoint, config={**checkpoint.config, "qwen_v1": None})
    engine = load(nothing, device="cpu", dtype="float32", engine="transformers")
    assert engine.real_vocab == VOCAB
    torch.testing.assert_close(engine.logits([[1, 2]])[0], reference_logits(model, [1, 2]), atol=1e-4, rtol=0)
