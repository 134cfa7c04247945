"""The transformers engine: its own modelling code, over the same cache as the lean decoder.

Keys and values go into our cache, row by row at their own positions, so that ragged batches, rewinding and
shared prefixes work the same in both engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.cache_utils import Cache, DynamicLayer

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.integrity import check_finite
from qwenq.runtime.cache import KVCache, Span
from qwenq.runtime.engine import CachedEngine
from qwenq.runtime.spec import LongContext, long_context_of
from qwenq.runtime.weights import readable


class TransformersEngine(CachedEngine):
    """A causal language model of transformers, its GPTQ linears dequantised at load.

    Raises:
        UnsupportedError: transformers does not know the architecture.
        ModelError: tensors are missing or of another shape; names the first.
    """

    name = "transformers"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        real_vocab: int | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self._model = _build(checkpoint, dtype).to(device)
        self._config = self._model.config
        attention = self._config._attn_implementation
        self.implementation = f"transformers {transformers.__version__} ({attention})"
        self.vocab_size = int(checkpoint.config["vocab_size"])
        self.context = checkpoint.config.get("max_position_embeddings")
        real = checkpoint.config.get("qwen_v1", {}).get("real_vocab", self.vocab_size)
        self.real_vocab = min(int(real), real_vocab or self.vocab_size)
        self._long_context = long_context_of(checkpoint.config)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache."""
        config = self._config
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        return KVCache(layers, batch, heads, capacity, head_dim, self.device, self.dtype)

    def _hidden(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        span = cache.span(counts)
        _refuse_long_v1(self._long_context, span.end)
        view = Cache(layers=[_Slots(cache, layer, span) for layer in range(len(cache.keys))])
        output = self._model.base_model(
            input_ids=ids,
            position_ids=span.positions.expand(len(counts), -1),
            attention_mask=span.mask,
            past_key_values=view,
            use_cache=True,
        )
        cache.advance(counts)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.get_output_embeddings()(hidden)
        return logits.float()


class _Slots(DynamicLayer):  # type: ignore[misc]
    """One layer of our cache during one forward pass, as transformers wants to see it."""

    def __init__(self, cache: KVCache, layer: int, span: Span) -> None:
        super().__init__()
        self._cache, self._layer, self._span = cache, layer, span
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens, give back all slots."""
        return self._cache.write(self._layer, key_states, value_states, self._span)

    def get_seq_length(self) -> int:
        """Tokens before this pass; only asked where all rows are alike."""
        return self._span.start or 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that are read, and the first of them."""
        del query_length
        return self._span.end, 0


def _refuse_long_v1(context: LongContext | None, end: int) -> None:
    if context is not None and (context.dynamic_ntk or context.logn) and end > context.seq_length:
        raise UsageError(
            f"{end} tokens are more than the {context.seq_length} up to which this Qwen v1 model is a plain "
            "Qwen2; transformers has neither its dynamic NTK nor its logn attention",
            hint="use --engine fast",
        )


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model with its weights, on the CPU."""
    settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    kind = settings.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **settings)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (ValueError, KeyError) as error:
        raise UnsupportedError(
            f"transformers has no causal language model of type {kind!r}", where=checkpoint.folder
        ) from error
    source = readable(checkpoint, dtype)
    tensors = {name: check_finite(name, source.read(name), checkpoint.folder) for name in source.names()}
    with _quiet():
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    wrong = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors are missing or have the wrong shape, the first is {wrong[0]}",
            where=checkpoint.folder,
            hint="copy the model again",
        )
    return model.eval().requires_grad_(False)


class _quiet:  # noqa: N801 - reads as a statement
    """transformers' own progress bar off for a while: the caller shows progress."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was_on = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        if self._was_on:
            logging.enable_progress_bar()
