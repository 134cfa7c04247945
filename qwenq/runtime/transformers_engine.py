"""Run the modelling code of transformers over the same cache as the lean decoder.

Keys and values go into our cache, row by row at their own positions, so that ragged batches, rewinding and
shared prefixes work the same in both engines. Quantised linears are swapped for kernels of the same table,
and attention is one of our backends, called through transformers' attention interface.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer
from transformers.distributed import DistributedConfig

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.config import PLAIN_ROPE, by_inspection, rope_parameters
from qwenq.models.inspection import ClassHead
from qwenq.models.qwen_v1 import LongContext, long_context_of
from qwenq.models.transformers_model import as_cache, assemble_unfused, build_whole_model, transformers_config
from qwenq.runtime.attention.plain import Attention, Off, Sdpa
from qwenq.runtime.cache import KVCache, Span, StateShape, plan
from qwenq.runtime.generation import Engine
from qwenq.runtime.linear import Linear
from qwenq.runtime.weights import Weights

_ATTENTION = "qwenq"
_LINEAR = "linear_attention"
_WINDOW = "sliding_attention"
_OF_TWO_MODELS = "config.json and the weights are not of one model: copy the folder again"
_SDPA = Sdpa()
_DENSE = "run a dense Qwen or Llama model"


class TransformersEngine(Engine):
    """A causal language model of transformers; the arguments are those of `engine.load`.

    Among several ``processes`` the model is sharded, see ``tensor_parallel``.
    """

    name = "transformers"

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        attention: Attention,
        kernel: str = "auto",
        real_vocab: int | None = None,
        processes: int = 1,
    ) -> None:
        self.device, self.dtype, self._attention = device, dtype, attention
        weights = Weights(checkpoint, device, dtype, kernel, processes)
        self._processes = processes
        self._model = _build(checkpoint, weights, dtype, processes)
        if processes == 1:  # else each tensor was put where it belongs as it came
            self._model.to(device)
        self._config = self._model.config
        kinds = getattr(self._config, "layer_types", None)
        self._kinds: list[str] = kinds or ["full_attention"] * self._config.num_hidden_layers
        self._states = _state_shapes(self._model)
        self.notes = weights.notes + _attention_notes(self._config, self._kinds, attention)
        self._after: ClassHead | None = None
        self._widths = _config_widths(self._config)
        if by_inspection(checkpoint.config):
            self._after = ClassHead(self._model, self._model.get_output_embeddings())
            self._widths = _probe(self._model, self._kinds, device)
        self.implementation = (
            f"transformers {transformers.__version__}, kernel {weights.kernel}, "
            f"attention {attention.name}: {attention.implementation}; torch {torch.__version__}"
        )
        self.vocab_size = int(checkpoint.config["vocab_size"])
        self.context = checkpoint.config.get("max_position_embeddings")
        real = (checkpoint.config.get("qwen_v1") or {}).get("real_vocab") or self.vocab_size
        self.real_vocab = min(int(real), real_vocab or self.vocab_size)
        self._long_context = long_context_of(checkpoint.config)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty cache."""
        layers = self._config.num_hidden_layers - len(self._states)
        heads, width = self._widths.heads // self._processes, self._widths.stored
        sizes = (layers, batch, heads, capacity, width)
        return KVCache(*sizes, self.device, self.dtype, self._states)

    def forward(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run new tokens through transformers' model without its head."""
        if cache.states and len(set(counts)) > 1:
            return self._forward_by_count(ids, counts, cache)
        span = cache.span(counts)
        _refuse_long_v1(self._long_context, span.end)
        _forget_longest(self._model.base_model)
        view = Cache(layers=_layers(self._kinds, cache, span))
        output = self._model.base_model(
            input_ids=ids,
            position_ids=span.positions.expand(len(counts), -1),
            attention_mask=span.mask,
            **as_cache(self._model.base_model, view),
            use_cache=True,
            qwenq_attention=self._attention,
            qwenq_span=span,
        )
        cache.advance(counts)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _forward_by_count(self, ids: Tensor, counts: Sequence[int], cache: KVCache) -> Tensor:
        """Run rows of unlike length apart: padding would go into their recurrent states."""
        hidden: Tensor | None = None
        for count in sorted(set(counts) - {0}):
            rows = [row for row, own in enumerate(counts) if own == count]
            part = cache.take(rows, max(cache.lengths[row] for row in rows) + count)
            found = self.forward(ids[rows, :count], [count] * len(rows), part)
            cache.put(rows, part)
            if hidden is None:
                hidden = found.new_zeros(len(counts), ids.shape[1], found.shape[-1])
            hidden[rows, :count] = found
        if hidden is None:
            raise UsageError("there is no token to run")
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Return float32 logits."""
        logits: Tensor = (self._after or self._model.get_output_embeddings())(hidden)
        return logits.float()


# Find out how wide keys and values are, where only the model's code says so.


@dataclass(frozen=True)
class _Widths:
    """Key/value heads of a layer, and the widths of their keys and values."""

    heads: int
    keys: int
    values: int

    @property
    def stored(self) -> int:
        """Return the width of both in the cache: the narrower one is filled up with zeros."""
        return max(self.keys, self.values)


def _config_widths(config: Any) -> _Widths:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return _Widths(heads, head_dim, head_dim)


class _Probe(DynamicLayer):  # type: ignore[misc]
    """One layer of a cache that keeps no more than the sizes of what it is given."""

    widths: _Widths | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Note the sizes."""
        self.widths = _Widths(key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the tokens before this pass."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots are read, and the first of them."""
        return query_length, 0


@torch.inference_mode()
def _probe(model: Any, kinds: Sequence[str], device: torch.device) -> _Widths:
    """Run one token and return what each layer wants to keep of it."""
    layers, span = [_Probe() for _ in kinds], plan([0], [1], device)
    model.base_model(
        input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device),
        position_ids=span.positions,
        **as_cache(model.base_model, Cache(layers=layers)),
        use_cache=True,
        qwenq_attention=_only_value,
        qwenq_span=span,
    )
    found = {layer.widths for layer in layers}
    if len(found) != 1 or (widths := next(iter(found))) is None:
        raise UnsupportedError(
            f"the layers of transformers' {type(model).__name__} differ in what they keep of a token",
            hint=_DENSE,
        )
    return widths


def _only_value(queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    """Return the values of the one token that there is."""
    del keys, span
    return values.repeat_interleave(queries.shape[1] // values.shape[1], dim=1)


class _Slots(DynamicLayer):  # type: ignore[misc]
    """One layer of our cache during one forward pass, with transformers' interface."""

    def __init__(self, cache: KVCache, layer: int, span: Span) -> None:
        super().__init__()
        self._cache, self._layer, self._span = cache, layer, span
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens, return all slots."""
        width = self._cache.form[2]
        narrow = key_states.shape[-1], value_states.shape[-1]
        wide = _filled(key_states, width), _filled(value_states, width)
        keys, values = self._cache.write(self._layer, *wide, self._span)
        return keys[..., : narrow[0]], values[..., : narrow[1]]

    def get_seq_length(self) -> int:
        """Return the tokens before this pass; only asked where all rows are alike."""
        return self._span.start or 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many slots are read, and the first of them."""
        del query_length
        return self._span.end, 0


class _States(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one layer of our cache, with transformers' interface: it changes them in place."""

    def __init__(self, conv: Tensor, recurrent: Tensor) -> None:
        super().__init__()
        self.conv_states, self.recurrent_states = {0: conv}, {0: recurrent}
        self.is_conv_states_initialized = self.is_recurrent_states_initialized = {0: True}
        self.has_previous_state = {0: True}  # zeros are what it would begin with
        self.conv_kernel_size = {0: conv.shape[-1]}
        self.device, self.dtype = conv.device, conv.dtype


def _layers(kinds: Sequence[str], cache: KVCache, span: Span) -> list[Any]:
    """Return transformers' view of the cache: slots of layers that attend, states of those that do not."""
    slots = iter([_Slots(cache, layer, span) for layer in range(len(cache.keys))])
    states = iter([_States(*state) for state in cache.states])
    return [next(states) if kind == _LINEAR else next(slots) for kind in kinds]


def _state_shapes(model: Any) -> list[StateShape]:
    """Return the sizes of the states of each linear-attention layer."""
    blocks = getattr(model.base_model, "layers", ())  # some architectures call them otherwise, and have none
    layers = (getattr(block, "linear_attn", None) for block in blocks)
    return [
        StateShape(
            (layer.conv1d.weight.shape[0], layer.conv1d.weight.shape[-1]),
            (layer.num_v_heads, layer.head_k_dim, layer.head_v_dim),
        )
        for layer in layers
        if layer is not None
    ]


def _forget_longest(model: Any) -> None:
    """Reset dynamic rope scaling, by which the longest input so far decides how shorter ones are rotated."""
    rope: Any = getattr(model, "rotary_emb", None)
    if getattr(rope, "rope_type", None) == "dynamic":
        rope.max_seq_len_cached = rope.original_max_seq_len
        rope.inv_freq = rope.original_inv_freq.to(rope.inv_freq.device)


def _refuse_long_v1(context: LongContext | None, end: int) -> None:
    if context is not None and (context.dynamic_ntk or context.logn) and end > context.seq_length:
        raise UsageError(
            f"{end} tokens are more than the {context.seq_length} up to which this Qwen v1 model is a plain "
            "Qwen2; transformers has neither its dynamic NTK nor its logn attention",
            hint="use --engine fast",
        )


class _Linear(torch.nn.Module):
    """A kernel as a module, in the place of a linear layer."""

    def __init__(self, kernel: Linear) -> None:
        super().__init__()
        self._kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel(x)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    qwenq_attention: Attention | None = None,
    qwenq_span: Span | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Call one of our backends as transformers calls attention; return [batch, tokens, heads, d]."""
    if qwenq_attention is None or qwenq_span is None:
        raise UnsupportedError(
            f"transformers' {type(module).__name__} does not pass the arguments of our attention on",
            hint=_DENSE,
        )
    del attention_mask  # the span says the same, and more
    if softcap != getattr(getattr(module, "config", None), "attn_logit_softcapping", None):
        raise UnsupportedError(
            f"the soft cap of scores is not passed on by {type(module).__name__}", hint=_DENSE
        )
    if s_aux is not None:
        raise UnsupportedError(f"attention sinks ({type(module).__name__}) are not supported", hint=_DENSE)
    natural = query.shape[-1] ** -0.5
    if scaling is not None and scaling != natural:
        query = query * (scaling / natural)
    own, width = value.shape[-1], max(query.shape[-1], value.shape[-1])
    if width > query.shape[-1]:  # zeros change no score, but the width by which a backend scales them
        query = query * (width / query.shape[-1]) ** 0.5
    query, key, value = (_filled(states, width) for states in (query, key, value))
    span, chosen = qwenq_span, qwenq_attention
    if sliding_window is not None and sliding_window < span.end:
        span, chosen = _within(span, sliding_window), _SDPA
    if softcap is not None:  # no fused kernel here has it
        chosen = Off(softcap)
    mixed = chosen(query, key, value, span)
    return mixed[..., :own].transpose(1, 2).contiguous(), None


def _filled(states: Tensor, width: int) -> Tensor:
    """Return states [..., d] with zeros behind them up to a width."""
    missing = width - states.shape[-1]
    return functional.pad(states, (0, missing)) if missing else states


def _within(span: Span, window: int) -> Span:
    """Return the span of queries that see the last ``window`` tokens, their own among them."""
    slots = torch.arange(span.end, device=span.positions.device)
    positions = span.positions.unsqueeze(-1)  # [batch or 1, tokens, 1]
    mask = (slots <= positions) & (slots > positions - window)
    return replace(span, causal=False, mask=mask.unsqueeze(1))


def _attention_notes(config: Any, kinds: Sequence[str], attention: Attention) -> tuple[str, ...]:
    """Return the note on layers whose attention is torch's, whatever was chosen."""
    if getattr(config, "attn_logit_softcapping", None) is not None and attention.name != "off":
        return ("attention scores are soft-capped: no fused kernel computes that, attention off runs",)
    windowed = kinds.count(_WINDOW)
    if not windowed or attention.name == "sdpa":
        return ()
    return (
        f"attention of {windowed} of {len(kinds)} layers slides a window of {config.sliding_window} tokens: "
        "where a text fills it, torch's sdpa runs there",
    )


def _build(checkpoint: Checkpoint, weights: Weights, dtype: torch.dtype, processes: int) -> Any:
    """Build the model on the CPU, all but the kernels; or this process's slice, in place."""
    config = transformers_config(checkpoint.config, checkpoint.folder)
    if config.model_type in PLAIN_ROPE:
        rope_parameters(checkpoint.config)  # refuses what transformers reads otherwise
    _refuse_what_attention_lacks(config, checkpoint)
    AttentionInterface.register(_ATTENTION, _attend)
    if any(".experts." in name and name.endswith(".gate_proj.weight") for name in weights.names):
        if processes > 1:
            raise UnsupportedError(
                "a mixture of experts is not sharded among processes here", where=checkpoint.folder
            )
        model = assemble_unfused(checkpoint, config, weights.plain(), dtype, attn_implementation=_ATTENTION)
    else:
        model = build_whole_model(
            checkpoint,
            config,
            weights.plain() if processes == 1 else weights.lazy(),
            dtype,
            attn_implementation=_ATTENTION,
            distributed_config=None if processes == 1 else DistributedConfig(tp_size=processes),
        )
    _refuse_surplus(model, weights)
    places = dict(model.named_modules())
    for module in sorted(weights.quantised):
        if not isinstance(places.get(module), torch.nn.Linear):
            raise ModelError(
                f"{module} is quantised, and is not a linear layer of this architecture",
                where=f"{module}.qweight",
                hint=_OF_TWO_MODELS,
            )
        model.set_submodule(module, _Linear(weights.linear(module)))
    return model


def _refuse_surplus(model: Any, weights: Weights) -> None:
    """Refuse tensors of blocks that the model has no place for: they are another model's."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    blocks = f"{model.base_model_prefix}.layers."
    surplus = (name for name in sorted(weights.names - model.state_dict().keys()) if name.startswith(blocks))
    for name in surplus:
        if not name.endswith(".rotary_emb.inv_freq") and not any(re.search(each, name) for each in ignored):
            raise ModelError(f"{name} has no place in this architecture", where=name, hint=_OF_TWO_MODELS)


def _refuse_what_attention_lacks(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse attention other than softmax over earlier tokens."""
    known = {"full_attention", _WINDOW} | (set() if by_inspection(checkpoint.config) else {_LINEAR})
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - known)
    if getattr(config, "use_bidirectional_attention", None):
        strange.append("queries that see later tokens")
    if strange:
        raise UnsupportedError(
            f"this model's attention ({', '.join(strange)}) is not supported: the cache here serves causal "
            "attention over all earlier tokens or the last of them",
            where=checkpoint.folder,
            hint=_DENSE,
        )
