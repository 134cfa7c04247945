"""A second language model, where one is all that can be had: small, Qwen3-shaped, trained here on real text.

    python benchmarks/_small_model.py OUT MINUTES TEXT…

TEXT are ``.txt`` and ``.jsonl`` (a ``text`` a line). Trains a tokenizer and then a model for that many
minutes of a core; prints its perplexity on text that it never saw as JSON. It is no good language model. What
it is good for: its weights and activations are trained ones, of another tokenizer, width, depth and family
than the bundled model's.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY, SEQ_LEN, BATCH, HELD_OUT = 4096, 256, 8, 64
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.02, 0.1
END = "<|endoftext|>"
CONFIG = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def documents(files: list[Path]) -> Iterator[str]:
    """Of each file in turn."""
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in text.splitlines())
        else:
            yield from text.split("\n = ")  # WikiText's articles


def tokenizer_of(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, as Qwen's is."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def packed(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """Int64 ``[sequences, SEQ_LEN]``: documents one after the other, ``END`` between them."""
    ids = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    return torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)


def loss_of(model: Qwen3ForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(rows).logits[:, :-1]  # [batch, SEQ_LEN - 1, vocabulary]
    return cross_entropy(logits.float().reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1))


def train(model: Qwen3ForCausalLM, rows: Tensor, seconds: float) -> int:
    """AdamW, warmed up and then down to nothing by a cosine of the time spent. The number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    generator, step, started = torch.Generator().manual_seed(0), 0, time.process_time()
    while (spent := (time.process_time() - started) / seconds) < 1:
        rate = min(1.0, spent / WARM_UP) * 0.5 * (1 + math.cos(math.pi * spent))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        chosen = torch.randint(len(rows), (BATCH,), generator=generator)
        loss = loss_of(model, rows[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            print(f"{100 * spent:.0f} %, step {step}, loss {float(loss):.3f}", file=sys.stderr, flush=True)
    return step


def main(out: Path, minutes: float, files: list[Path]) -> dict[str, float]:
    """Train, measure, save."""
    torch.manual_seed(0)
    texts = list(documents(files))
    tokenizer = tokenizer_of(texts)
    rows = packed(texts, tokenizer)
    rows = rows[torch.randperm(len(rows))]
    model = Qwen3ForCausalLM(CONFIG)
    steps = train(model, rows[HELD_OUT:], 60 * minutes)
    model.eval()
    with torch.inference_mode():
        loss = sum(float(loss_of(model, row)) for row in rows[:HELD_OUT].split(1)) / HELD_OUT
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(out)
    return {"perplexity": math.exp(loss), "steps": steps, "tokens": steps * BATCH * SEQ_LEN}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), float(sys.argv[2]), [Path(name) for name in sys.argv[3:]])))
