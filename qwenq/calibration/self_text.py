"""Calibrate without data: the model writes the text itself, sampled from BOS at temperature 1.

Each row has a random stream, seeded by (seed, row): its text depends neither on how many rows there are nor,
up to floating point, on how they are batched. (A product over another number of rows may round the last bit
differently; where that moves a token over the edge of its draw, the row goes on with another text. The batch
size follows from the model's shape alone, never from the free memory, so that the same command gives the same
text again on the same machine.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from qwenq.errors import CalibrationError, UsageError
from qwenq.events import Update
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.config import by_inspection
from qwenq.models.integrity import check_finite
from qwenq.models.machine import free_memory, product_dtype
from qwenq.models.tokenizer import Tokenizer
from qwenq.models.transformers_model import as_cache, assemble_unfused, build_whole_model, transformers_config
from qwenq.storage import readable_bytes

_SLACK = 1.2  # activations, logits, the allocator
GIVE_A_FILE = "give a text instead: --calibration FILE (`qwenq calibrate`: --source, `qwenq check`: --text)"


def require_base_model(checkpoint: Checkpoint) -> None:
    """Refuse a quantised checkpoint: calibration text is written by the model as it was."""
    if "quantization_config" in checkpoint.config:
        raise UsageError(
            "this model is already quantised; calibration text is written by the unquantised one",
            where=checkpoint.folder,
            hint="name the base model's folder",
        )


def require_memory(checkpoint: Checkpoint, dtype: torch.dtype, extra: int) -> None:
    """Refuse when the weights in ``dtype`` and ``extra`` bytes do not fit into the free memory."""
    weights = sum(checkpoint.info(name).numel for name in checkpoint.names()) * dtype.itemsize
    needed, free = int((weights + extra) * _SLACK), free_memory()
    if needed > free:
        raise UsageError(
            f"the model would need {readable_bytes(needed)} of memory to write its own text, "
            f"{readable_bytes(free)} are free",
            where=checkpoint.folder,
            hint=GIVE_A_FILE,
        )


def load_whole_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str) -> Any:
    """Return the model as transformers builds it, in ``dtype`` on ``device``, for inference."""
    config = transformers_config(checkpoint.config, checkpoint.folder, GIVE_A_FILE)
    names, folder = checkpoint.names(), checkpoint.folder
    tensors = {name: check_finite(name, checkpoint.read(name), folder) for name in names}
    if by_inspection(checkpoint.config) and any(".experts." in name for name in tensors):
        return assemble_unfused(checkpoint, config, tensors, dtype).to(device)
    return build_whole_model(checkpoint, config, tensors, dtype, hint=GIVE_A_FILE).to(device)


def store_transposed(model: Any) -> None:
    """Lay the weights of the blocks' linears out [in, out] in memory; their shape stays [out, in].

    At a few dozen rows the float32 product over this layout is 1.3–1.6 times as fast on CPUs: MKL need not
    transpose while it packs. The head stays as it is: it is the embedding, and slower the other way.
    """
    for module in model.base_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


HELD_OUT_ROWS = 1 << 32
"""Held-out rows are numbered from here, so that no calibration row ever shares their random stream."""
_MOST_ROWS = 64
_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Vocabulary:
    """Where texts begin and end."""

    start: int  # the id that begins a text: BOS, or the document separator where there is none
    ends: frozenset[int]  # ids after which a row begins a new text
    size: int  # ids below this are real; a padded embedding has more rows


def vocabulary_of(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Vocabulary:
    """Return the ids that sampling needs; refuse a tokenizer that does not fit the model."""
    separator = separator_of(tokenizer)
    start = tokenizer.bos_id if tokenizer.bos_id is not None else separator
    if start is None:
        raise CalibrationError(
            "the tokenizer has neither a BOS nor an end-of-text token to begin a text with",
            where=checkpoint.folder,
            hint=GIVE_A_FILE,
        )
    ends = set(tokenizer.eos_ids) | ({separator} if separator is not None else set())
    rows = int(checkpoint.config["vocab_size"])
    if start >= rows:
        raise CalibrationError(
            f"a text would begin with token {start} of the tokenizer; the model knows 0 … {rows - 1}",
            where=checkpoint.folder,
            hint="tokenizer and model do not belong together: use the tokenizer of this very model",
        )
    real = int(checkpoint.config.get("qwen_v1", {}).get("real_vocab", rows))
    return Vocabulary(start, frozenset(ends), min(rows, real, tokenizer.vocab_size))


def separator_of(tokenizer: Tokenizer) -> int | None:
    """Return the id that parts documents: ``<|endoftext|>`` where it is a token, else the first end id."""
    spelled = tokenizer.encode("<|endoftext|>", special=True)
    if len(spelled) == 1:
        return spelled[0]
    return tokenizer.eos_ids[0] if tokenizer.eos_ids else None


def write_self_text(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    rows: Sequence[int],
    seq_len: int,
    *,
    seed: int,
    device: str = "cpu",
    progress: Update | None = None,
) -> torch.Tensor:
    """Return text that the model writes, int64 [len(rows), seq_len] on the CPU: a sequence for each row.

    A row begins with BOS. Where it ends (an end id), it goes on with a new text, so that it is always full.
    """
    vocabulary = vocabulary_of(checkpoint, tokenizer)
    dtype = product_dtype(device)
    per_row = cache_bytes_per_row(checkpoint.config, seq_len, dtype)
    size = batch_rows(per_row)
    if torch.device(device).type == "cpu":
        require_memory(checkpoint, dtype, min(size, len(rows)) * per_row)
    model = load_whole_model(checkpoint, dtype, device)
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        store_transposed(model)
    written = []
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]

        def report(tokens: int, before: int = first * seq_len, count: int = len(batch)) -> None:
            if progress:
                progress(before + count * tokens, len(rows) * seq_len)

        uniforms = draws(seed, batch, seq_len).to(device)
        written.append(sample_rows(model, checkpoint, vocabulary, uniforms, report))
    return torch.cat(written).cpu()


@torch.inference_mode()
def sample_rows(
    model: Any,
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    uniforms: torch.Tensor,
    report: Callable[[int], None],
) -> torch.Tensor:
    """Sample rows by inverse transform: draw u takes the first id whose cumulative probability exceeds u.

    Args:
        uniforms: float64 [rows, seq_len] in [0, 1).
        report: called with the number of tokens that each row has so far.
    """
    rows, seq_len = uniforms.shape
    ends = torch.tensor(sorted(vocabulary.ends), device=uniforms.device)
    text = torch.full((rows, seq_len), vocabulary.start, dtype=torch.int64, device=uniforms.device)
    kinds = getattr(model.config, "layer_types", None) or [""] * model.config.num_hidden_layers
    cache = Cache(
        layers=[
            LinearAttentionLayer() if kind == "linear_attention" else _GrowingLayer(seq_len) for kind in kinds
        ]
    )
    keeping = as_cache(model, cache)
    for place in range(1, seq_len):
        last = text[:, place - 1 : place]  # [rows, 1]
        logits = model(last, **keeping, use_cache=True).logits[:, -1, : vocabulary.size]
        cumulative = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)  # [rows, vocabulary]
        total = cumulative[:, -1:]
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(
                "the model's logits are not finite, so it cannot write text",
                where=checkpoint.folder,
                hint=f"check its weights; or {GIVE_A_FILE}",
            )
        chosen = torch.searchsorted(cumulative, uniforms[:, place, None] * total, right=True)
        chosen.clamp_(max=vocabulary.size - 1)
        restart = torch.isin(last, ends) & (last != vocabulary.start)
        text[:, place] = torch.where(restart, vocabulary.start, chosen)[:, 0]
        report(place)
    report(seq_len)
    return text


def draws(seed: int, rows: Sequence[int], count: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), float64 [len(rows), count], from one stream per row."""
    streams = []
    for row in rows:
        digest = hashlib.sha256(f"qwenq self text, seed {seed}, row {row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        streams.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(streams)


def cache_bytes_per_row(config: dict[str, Any], seq_len: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one row of ``seq_len`` tokens over all layers."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * kv_heads * head_dim * seq_len * dtype.itemsize)


def batch_rows(bytes_per_row: int) -> int:
    """Return the rows written at once: at most 64, and at most 2 GiB of keys and values; at least one."""
    return max(1, min(_MOST_ROWS, _CACHE_BYTES // bytes_per_row))


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer in one buffer of the final size; attention sees the filled part.

    transformers' DynamicLayer copies all it holds at every token, its StaticLayer attends to the unfilled
    part, too.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity, self._filled = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, heads, _, _ = key_states.shape
        self._keys = key_states.new_empty(rows, heads, self._capacity, key_states.shape[-1])
        self._values = value_states.new_empty(rows, heads, self._capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._filled + key_states.shape[-2]
        self._keys[:, :, self._filled : end] = key_states
        self._values[:, :, self._filled : end] = value_states
        self._filled = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._filled
