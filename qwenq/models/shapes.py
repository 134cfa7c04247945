"""Compute sizes from a config.json: every tensor, every parameter, every byte. Imports no torch.

A ``ModelShape`` is read from the config of a dense Llama, Qwen2, Qwen3 or Qwen v1 model and always speaks
the Qwen2 layout (v1's fused ``c_attn`` is seen as q, k and v; its halved ``intermediate_size`` is undone).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenq.errors import UnsupportedError, UsageError
from qwenq.models.config import check_architecture, check_numbers
from qwenq.models.qwen_v1 import V1_KEY, qwen2_config

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}
"""Bytes per element of the dtypes that are written."""

DENSE = ("llama", "qwen", "qwen2", "qwen3")
"""Model types whose sizes are known here."""
GROUP_SIZES = (128, 64, 32)
"""What ``--group-size auto`` tries, in order."""


def fitting_group_sizes(widths: Iterable[int]) -> list[int]:
    """Return those of ``GROUP_SIZES`` that divide every input width."""
    every = set(widths)
    return [size for size in GROUP_SIZES if not any(width % size for width in every)]


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a checkpoint: its name, shape and dtype (a key of ``ITEMSIZE``)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Return number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Return bytes of the elements, without any file header."""
        return self.numel * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Linear:
    """A linear module of a block: ``weight`` is [rows, columns] = [out, in]."""

    name: str
    rows: int
    columns: int
    bias: bool


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder, Qwen2 layout.

    Attributes:
        architecture: ``llama``, ``qwen2`` or ``qwen3``; Qwen v1 counts as ``qwen2``.
        ffn: width of the MLP as it is computed (v1's config counts both halves; this does not).
        vocab: rows of the embedding, padding included.
        tied: the head is the embedding and is not stored again.
        context: the longest sequence that the config promises; None where it says nothing.
        fused_qkv: the model's own GPTQ files hold q, k and v as one module (Qwen v1).
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    context: int | None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Read a config.json of a dense Llama, Qwen2, Qwen3 or Qwen v1 model.

        Raises:
            UnsupportedError: another architecture; names what is missing for it.
            ModelError: a size is missing, not a positive integer, or contradicts another one.
        """
        where = Path("config.json")
        config = {"model_type": "none", **config}
        check_architecture(config, where)
        if config["model_type"] not in DENSE:
            raise UnsupportedError(
                f"{config['model_type']} is no dense Llama or Qwen model: its sizes are not known here",
                where=where,
                hint="where an engine can be chosen, use --engine transformers",
            )
        check_numbers(config, where)
        if config["model_type"] == "qwen":
            config = qwen2_config(config)
        kind, heads, hidden = config["model_type"], config["num_attention_heads"], config["hidden_size"]
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=kind,
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=_head_dim(config),
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            context=config.get("max_position_embeddings"),
            qkv_bias=kind == "qwen2" or attention_bias,  # Qwen2 has it in the code, whatever the config says
            o_bias=kind != "qwen2" and attention_bias,
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            fused_qkv=V1_KEY in config,
        )

    def linears(self) -> tuple[Linear, ...]:
        """Return the seven linear modules of a block, named relative to it."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear("self_attn.q_proj", queries, self.hidden, self.qkv_bias),
            Linear("self_attn.k_proj", keys, self.hidden, self.qkv_bias),
            Linear("self_attn.v_proj", keys, self.hidden, self.qkv_bias),
            Linear("self_attn.o_proj", self.hidden, queries, self.o_bias),
            Linear("mlp.gate_proj", self.ffn, self.hidden, self.mlp_bias),
            Linear("mlp.up_proj", self.ffn, self.hidden, self.mlp_bias),
            Linear("mlp.down_proj", self.hidden, self.ffn, self.mlp_bias),
        )

    def tensors(self, dtype: str = "bfloat16") -> list[TensorShape]:
        """Return all tensors of the unquantised checkpoint, in layer order."""
        blocks = (
            TensorShape(f"model.layers.{layer}.{name}", size, dtype)
            for layer in range(self.layers)
            for name, size in self._block_tensors()
        )
        return [*self._before(dtype), *blocks, *self._after(dtype)]

    def quantised_tensors(
        self,
        bits: int,
        group_size: int,
        dtype: str = "float16",
        *,
        zero_biases: bool = False,
        fused_qkv: bool = False,
    ) -> list[TensorShape]:
        """Return all tensors of a GPTQ checkpoint (AutoGPTQ v1 layout).

        Args:
            bits: 4 or 8.
            group_size: columns that share a scale; -1 for all columns of a row.
            dtype: of what is not quantised: embedding, norms, biases, head. `qwenq quantize` keeps the stored
                one, published files have float16.
            zero_biases: every quantised module carries a bias, as AutoGPTQ before 0.7.1 wrote.
            fused_qkv: q, k and v are one module, as in Qwen v1's own files.
        """
        self._check_quantisable(bits, group_size)
        modules = _fuse_qkv(self.linears()) if fused_qkv else self.linears()
        blocks = [
            replace(tensor, name=f"model.layers.{layer}.{tensor.name}")
            for layer in range(self.layers)
            for module in modules
            for tensor in _packed(module, bits, group_size, dtype, zero_biases)
        ]
        norms = [
            TensorShape(f"model.layers.{layer}.{name}", size, dtype)
            for layer in range(self.layers)
            for name, size in self._block_norms()
        ]
        return [*self._before(dtype), *blocks, *norms, *self._after(dtype)]

    @property
    def parameters(self) -> int:
        """Return exact number of parameters; a tied head is counted once."""
        return sum(tensor.numel for tensor in self.tensors())

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
        """Return bytes of the GPTQ tensors: ``total_size`` of an index, headers excluded."""
        tensors = self.quantised_tensors(
            bits, group_size, dtype, zero_biases=zero_biases, fused_qkv=fused_qkv
        )
        return sum(tensor.nbytes for tensor in tensors)

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Return bytes of keys and values that one token leaves in the cache, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ITEMSIZE[dtype]

    @property
    def embedding_parameters(self) -> int:
        """Return elements of the embedding (and of the head, where it is stored)."""
        return self.vocab * self.hidden

    @property
    def block_parameters(self) -> int:
        """Return elements of one decoder block."""
        return sum(TensorShape(name, size, "bfloat16").numel for name, size in self._block_tensors())

    def with_ffn(self, ffn: int) -> ModelShape:
        """Return the same model with an MLP of another width."""
        return replace(self, ffn=ffn)

    def auto_group_size(self) -> int:
        """Return the group size ``auto`` takes: the largest of 128, 64, 32 that divides every input width."""
        if fitting := fitting_group_sizes(module.columns for module in self.linears()):
            return fitting[0]
        raise UsageError(
            f"no group size of {GROUP_SIZES} divides every input width of this model",
            hint="use --group-size -1 (one group per row)",
        )

    def _block_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for module in self.linears():
            yield f"{module.name}.weight", (module.rows, module.columns)
            if module.bias:
                yield f"{module.name}.bias", (module.rows,)
        yield from self._block_norms()

    def _block_norms(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.qk_norm:
            yield "self_attn.q_norm.weight", (self.head_dim,)
            yield "self_attn.k_norm.weight", (self.head_dim,)
        yield "input_layernorm.weight", (self.hidden,)
        yield "post_attention_layernorm.weight", (self.hidden,)

    def _before(self, dtype: str) -> list[TensorShape]:
        return [TensorShape("model.embed_tokens.weight", (self.vocab, self.hidden), dtype)]

    def _after(self, dtype: str) -> list[TensorShape]:
        norm = TensorShape("model.norm.weight", (self.hidden,), dtype)
        head = TensorShape("lm_head.weight", (self.vocab, self.hidden), dtype)
        return [norm] if self.tied else [norm, head]

    def _check_quantisable(self, bits: int, group_size: int) -> None:
        if bits not in (4, 8):
            raise UsageError(f"{bits} bits are not supported", where="--bits", hint="use 4 or 8")
        if group_size != -1 and group_size <= 0:
            raise UsageError(
                f"group size {group_size} is no size", where="--group-size", hint="use 128 or -1"
            )
        per_word = 32 // bits
        for module in self.linears():
            if group_size != -1 and module.columns % group_size:
                raise UsageError(
                    f"group size {group_size} does not divide the {module.columns} inputs of {module.name}",
                    where="--group-size",
                    hint=f"use --group-size auto: it takes {self.auto_group_size()} here",
                )
            if module.columns % per_word or module.rows % per_word:
                raise UnsupportedError(
                    f"{module.name} [{module.rows}, {module.columns}] does not fill whole 32-bit words",
                    hint=f"both sides have to be multiples of {per_word} at {bits} bits",
                )


def _packed(
    module: Linear, bits: int, group_size: int, dtype: str, zero_biases: bool
) -> Iterator[TensorShape]:
    """Yield the tensors of one quantised module; the published layout is [in, out], packed along ``in``."""
    groups = 1 if group_size == -1 else module.columns // group_size
    yield TensorShape(f"{module.name}.qweight", (module.columns * bits // 32, module.rows), "int32")
    yield TensorShape(f"{module.name}.qzeros", (groups, module.rows * bits // 32), "int32")
    yield TensorShape(f"{module.name}.scales", (groups, module.rows), "float16")
    yield TensorShape(f"{module.name}.g_idx", (module.columns,), "int32")
    if module.bias or zero_biases:
        yield TensorShape(f"{module.name}.bias", (module.rows,), dtype)


def _fuse_qkv(modules: tuple[Linear, ...]) -> tuple[Linear, ...]:
    q, k, v, *rest = modules
    return (Linear("self_attn.c_attn", q.rows + k.rows + v.rows, q.columns, q.bias), *rest)


def _head_dim(config: dict[str, Any]) -> int:
    """Read the width of a head as transformers does: Qwen3 has 128 by default, whatever its width."""
    if config["model_type"] == "qwen3" and "head_dim" not in config:
        return 128
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
