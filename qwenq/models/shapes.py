"""Compute sizes from a config.json: every tensor, every parameter, every byte. Imports no torch.

A ``ModelShape`` is read from the config of a Llama or Qwen model: dense, a mixture of experts, or with linear
attention. It always speaks the Qwen2 layout (v1's fused ``c_attn`` is seen as q, k and v; its halved
``intermediate_size`` is undone), and experts are linear layers of their own, as in quantised files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from qwenq.errors import ModelError, UnsupportedError, UsageError
from qwenq.models.block_shapes import (
    NOTHING,
    Block,
    Experts,
    Linear,
    LinearAttention,
    distinct_linears,
    mixture_kept,
    mixture_linears,
    mlp_linears,
)
from qwenq.models.config import HYBRIDS, check_architecture, check_numbers, text_config
from qwenq.models.gptq_config import packed_bytes
from qwenq.models.qwen_v1 import V1_KEY, qwen2_config

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}
"""Bytes per element of the dtypes that are written."""

DENSE = ("llama", "qwen", "qwen2", "qwen3")
"""Model types whose blocks are all alike: attention of all earlier tokens and a dense MLP."""
_MIXTURES = ("qwen3_moe", "qwen3_next", "qwen3_5_moe_text")
KNOWN_SIZES = (*DENSE, "qwen3_moe", *HYBRIDS)
"""Model types whose sizes are known here."""
GROUP_SIZES = (128, 64, 32)
"""What ``--group-size auto`` tries, in order."""


def fitting_group_sizes(widths: Iterable[int]) -> list[int]:
    """Return those of ``GROUP_SIZES`` that divide every input width."""
    every = set(widths)
    return [size for size in GROUP_SIZES if not any(width % size for width in every)]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder, Qwen2 layout."""

    architecture: str  # the model type of the language model; Qwen v1 counts as ``qwen2``
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # width of the dense MLP as it is computed, half of what v1's config says; 0: no layer has one
    vocab: int  # rows of the embedding, padding included
    tied: bool  # the head is the embedding and is not stored again
    context: int | None  # the longest sequence that the config promises; None where it says nothing
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False  # the model's own GPTQ files hold q, k and v as one module (Qwen v1)
    output_gate: bool = False  # q_proj has a second half, which gates what attention gives
    experts: Experts | None = None  # None: all layers have a dense MLP
    linear_attention: LinearAttention | None = None  # None: all layers attend to all earlier tokens
    attending: tuple[int, ...] = ()  # layers that do so in a model with linear attention
    # of multi-token prediction, which lie in the same files and are not quantised (``mtp.``)
    draft_layers: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Read a config.json of a Llama or Qwen model; of a vision-language model, its language model."""
        where = Path("config.json")
        config = {"model_type": "none", **config}
        check_architecture(config, where)
        config = text_config(config)
        kind = config["model_type"]
        if kind not in KNOWN_SIZES:
            raise UnsupportedError(
                f"the sizes of a {kind} model are not known here",
                where=where,
                hint="where an engine can be chosen, use --engine transformers",
            )
        check_numbers(config, where)
        if kind == "qwen":
            config = qwen2_config(config)
            kind = config["model_type"]
        heads = config["num_attention_heads"]
        attention_bias = bool(config.get("attention_bias", False))
        experts = _experts(config, where) if kind in _MIXTURES else None
        dense = experts is None or bool(experts.dense_layers)
        linear_attention = _linear_attention(config, where) if kind in HYBRIDS else None
        return cls(
            architecture=kind,
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=_head_dim(config),
            ffn=_required(config, "intermediate_size", where) if dense else 0,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            context=config.get("max_position_embeddings"),
            qkv_bias=kind == "qwen2" or attention_bias,  # Qwen2 has it in the code, whatever the config says
            o_bias=kind != "qwen2" and attention_bias,
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=kind not in ("llama", "qwen2"),
            fused_qkv=V1_KEY in config,
            output_gate=kind in HYBRIDS,
            experts=experts,
            linear_attention=linear_attention,
            attending=_attending(config) if linear_attention else (),
            draft_layers=config.get("mtp_num_hidden_layers") or 0,
        )

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Return the kinds of blocks, in the order of their first layers."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for layer in range(self.layers):
            attends = self.linear_attention is None or layer in self.attending
            kinds.setdefault((attends, self.is_mixed(layer)), []).append(layer)
        return tuple(self._block(tuple(layers), *kind) for kind, layers in kinds.items())

    def linears(self) -> tuple[Linear, ...]:
        """Return the linear modules that are quantised in some block, named relative to it."""
        return distinct_linears(self.blocks)

    def is_mixed(self, layer: int) -> bool:
        """Return whether a layer has a mixture of experts; else its MLP is dense."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def _block(self, layers: tuple[int, ...], attends: bool, mixed: bool) -> Block:
        """Return a kind of block: what it attends with, then its MLP."""
        norms = [
            (f"{name}.weight", (self.hidden,)) for name in ("input_layernorm", "post_attention_layernorm")
        ]
        if attends or self.linear_attention is None:
            linears, kept = self._attention_linears(), NOTHING
            if self.qk_norm:
                norms = [(f"self_attn.{name}_norm.weight", (self.head_dim,)) for name in "qk"] + norms
        else:
            linears = self.linear_attention.linears(self.hidden)
            kept = self.linear_attention.kept(self.hidden)
        if mixed and self.experts is not None:
            linears += mixture_linears(self.experts, self.hidden)
            kept += mixture_kept(self.experts, self.hidden)
        else:
            linears += mlp_linears("mlp", self.hidden, self.ffn, bias=self.mlp_bias)
        return Block(layers, linears, (*kept, *norms), attends)

    def _attention_linears(self) -> tuple[Linear, ...]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        with_gate = 2 * queries if self.output_gate else queries
        return (
            Linear("self_attn.q_proj", with_gate, self.hidden, self.qkv_bias),
            Linear("self_attn.k_proj", keys, self.hidden, self.qkv_bias),
            Linear("self_attn.v_proj", keys, self.hidden, self.qkv_bias),
            Linear("self_attn.o_proj", self.hidden, queries, self.o_bias),
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of the unquantised checkpoint by name, in layer order."""
        matrix = (self.vocab, self.hidden)
        layers = sorted((layer, number) for number, block in enumerate(self.blocks) for layer in block.layers)
        return {
            "model.embed_tokens.weight": matrix,
            **{
                f"model.layers.{layer}.{name}": size
                for layer, number in layers
                for name, size in self.blocks[number].tensors()
            },
            "model.norm.weight": (self.hidden,),
            **({} if self.tied else {"lm_head.weight": matrix}),
        }

    @property
    def parameters(self) -> int:
        """Return exact number of parameters; a tied head is counted once."""
        return self._outside + sum(block.parameters * len(block.layers) for block in self.blocks)

    @property
    def _outside(self) -> int:
        """Return the elements of embedding, head and last norm."""
        return self.embedding_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def active_parameters(self) -> int:
        """Return the parameters that one token uses: all but those of experts that it is not routed to."""
        idle = sum((block.parameters - block.active_parameters) * len(block.layers) for block in self.blocks)
        return self.parameters - idle

    def bytes(self, dtype: str = "bfloat16") -> int:
        """Return bytes of the unquantised tensors: ``total_size`` of an index, headers excluded."""
        return self.parameters * ITEMSIZE[dtype]

    def quantised_bytes(
        self,
        bits: int,
        group_size: int,
        dtype: str = "float16",
        *,
        zero_biases: bool = False,
        fused_qkv: bool = False,
    ) -> int:
        """Return bytes of the tensors of a GPTQ checkpoint: ``total_size`` of an index, headers excluded.

        Args:
            bits: 4 or 8.
            group_size: columns that share a scale; -1 for all columns of a row.
            dtype: of what is not quantised: embedding, norms, biases, head. `qwenq quantize` keeps the stored
                one, published files have float16.
            zero_biases: every quantised module carries a bias, as AutoGPTQ before 0.7.1 wrote.
            fused_qkv: q, k and v are one module, as in Qwen v1's own files.
        """
        self._check_quantisable(bits, group_size)
        total = self._outside * ITEMSIZE[dtype]
        for block in self.blocks:
            one = sum(prod(size) for _, size in block.kept) * ITEMSIZE[dtype]
            for module in _fuse_qkv(block.linears) if fused_qkv else block.linears:
                one += module.copies * _packed_bytes(module, bits, group_size, dtype, zero_biases)
            total += one * len(block.layers)
        return total

    def idle_bytes(
        self, dtype: str, tokens: int = 1, *, bits: int | None = None, group_size: int = -1
    ) -> int:
        """Return the bytes of experts that a step of that many tokens does not read.

        Tokens choose their experts evenly and on their own. ``bits`` None: nothing is quantised.
        """
        if self.experts is None:
            return 0
        share = 1 - self.experts.distinct(tokens) / self.experts.count
        nbytes = 0
        for block in self.blocks:
            for module in (module for module in block.linears if module.copies > 1):
                one = module.elements * ITEMSIZE[dtype]
                if bits is not None:
                    one = _packed_bytes(module, bits, group_size, dtype, False)
                nbytes += one * module.copies * len(block.layers)
        return int(nbytes * share)

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Return bytes of keys and values that one token leaves in the cache, all layers that have some."""
        layers = sum(len(block.layers) for block in self.blocks if block.attends)
        return 2 * layers * self.kv_heads * self.head_dim * ITEMSIZE[dtype]

    def state_bytes(self, dtype: str = "bfloat16") -> int:
        """Return bytes of one sequence's recurrent states, whatever its length."""
        linear = self.linear_attention
        return self._recurrent_layers * linear.state_bytes(ITEMSIZE[dtype]) if linear else 0

    @property
    def float32_parameters(self) -> int:
        """Return elements that files of Qwen3.5 store in float32, and those of 3.6 and 3.8 do not."""
        linear = self.linear_attention
        return self._recurrent_layers * linear.float32_parameters if linear else 0

    @property
    def _recurrent_layers(self) -> int:
        return sum(len(block.layers) for block in self.blocks if not block.attends)

    @property
    def draft_parameters(self) -> int:
        """Return the elements of draft layers: a block with attention each, a projection and three norms."""
        if not self.draft_layers:
            return 0
        attending = next(block for block in self.blocks if block.attends)
        return self.draft_layers * attending.parameters + 2 * self.hidden**2 + 3 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Return elements of the embedding (and of the head, where it is stored)."""
        return self.vocab * self.hidden

    @property
    def block_parameters(self) -> int:
        """Return elements of the largest decoder block."""
        return max(block.parameters for block in self.blocks)

    def auto_group_size(self) -> int:
        """Return the group size ``auto`` takes: the largest of 128, 64, 32 that divides every input width."""
        if fitting := fitting_group_sizes(module.columns for module in self.linears()):
            return fitting[0]
        raise UsageError(
            f"no group size of {GROUP_SIZES} divides every input width of this model",
            hint="use --group-size -1 (one group per row)",
        )

    def _check_quantisable(self, bits: int, group_size: int) -> None:
        if bits not in (4, 8):
            raise UsageError(f"{bits} bits are not supported", where="--bits", hint="use 4 or 8")
        if group_size != -1 and group_size <= 0:
            raise UsageError(
                f"group size {group_size} is not a size", where="--group-size", hint="use 128 or -1"
            )
        for module in self.linears():
            per_word = 32 // module.bits(bits)
            if group_size != -1 and module.columns % group_size:
                raise UsageError(
                    f"group size {group_size} does not divide the {module.columns} inputs of {module.name}",
                    where="--group-size",
                    hint=f"use --group-size auto: it takes {self.auto_group_size()} here",
                )
            if module.columns % per_word or module.rows % per_word:
                raise UnsupportedError(
                    f"{module.name} [{module.rows}, {module.columns}] does not fill whole 32-bit words",
                    hint=f"both sides have to be multiples of {per_word} at {module.bits(bits)} bits",
                )


def _packed_bytes(module: Linear, bits: int, group_size: int, dtype: str, zero_biases: bool) -> int:
    """Return the bytes of one copy of a quantised module."""
    size = packed_bytes(module.rows, module.columns, module.bits(bits), group_size)
    return size + (module.rows * ITEMSIZE[dtype] if module.bias or zero_biases else 0)


def _fuse_qkv(modules: tuple[Linear, ...]) -> tuple[Linear, ...]:
    q, k, v, *rest = modules
    return (Linear("self_attn.c_attn", q.rows + k.rows + v.rows, q.columns, q.bias), *rest)


_HEAD_DIM = {"qwen3": 128, "qwen3_next": 256, "qwen3_5_text": 256, "qwen3_5_moe_text": 256}
"""Width of a head where config.json says none, whatever the width of the model."""


def _head_dim(config: dict[str, Any]) -> int:
    """Read the width of a head as transformers does."""
    kind = config["model_type"]
    if kind in _HEAD_DIM and "head_dim" not in config:
        return _HEAD_DIM[kind]
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _required(config: dict[str, Any], key: str, where: Path) -> int:
    if config.get(key) is None:
        raise ModelError(f"config.json has no {key}", where=where, hint="copy the model's config.json again")
    return int(config[key])


def _experts(config: dict[str, Any], where: Path) -> Experts | None:
    """Read the mixture of experts; None: every layer has a dense MLP."""
    layers, dense = range(config["num_hidden_layers"]), set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step") or 1
    by_hand = tuple(layer for layer in layers if layer in dense or (layer + 1) % step)
    if len(by_hand) == len(layers):
        return None
    many = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    has_shared = config["model_type"] != "qwen3_moe"
    return Experts(
        count=_required(config, many, where),
        active=_required(config, "num_experts_per_tok", where),
        width=_required(config, "moe_intermediate_size", where),
        shared_width=_required(config, "shared_expert_intermediate_size", where) if has_shared else 0,
        dense_layers=by_hand,
    )


def _linear_attention(config: dict[str, Any], where: Path) -> LinearAttention:
    return LinearAttention(
        key_heads=_required(config, "linear_num_key_heads", where),
        value_heads=_required(config, "linear_num_value_heads", where),
        key_dim=_required(config, "linear_key_head_dim", where),
        value_dim=_required(config, "linear_value_head_dim", where),
        kernel=_required(config, "linear_conv_kernel_dim", where),
        fused=config["model_type"] == "qwen3_next",
    )


def _attending(config: dict[str, Any]) -> tuple[int, ...]:
    """Return the layers that attend to all earlier tokens: as listed, else every fourth."""
    layers = config["num_hidden_layers"]
    interval = config.get("full_attention_interval") or 4
    kinds = config.get("layer_types") or [
        "linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(layers)
    ]
    return tuple(layer for layer, kind in enumerate(kinds) if kind != "linear_attention")
