"""Show Qwen v1 checkpoints (``QWenLMHeadModel``) as Qwen2, tensor by tensor, without remote code.

Up to ``seq_length`` tokens v1 *is* a Qwen2 without grouped heads: the fused ``c_attn`` holds q, k and v as
three blocks of rows, ``w2`` is the gate and ``w1`` the up projection. Beyond, v1's long-context flags matter,
which the Qwen2 config keeps under ``qwen_v1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.gptq_config import QuantConfig, settings_of
from qwenq.models.qwen_v1_config import V1_KEY, qwen2_config, qwen2_generation_config
from qwenq.models.source import StoredInFiles, TensorInfo, TensorSource, require_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["V1_KEY", "QwenV1Source", "qwen2_config", "qwen2_generation_config", "qwen2_view"]

_TOP = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
}
_IN_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_FUSED = "attn.c_attn"
_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BUFFERS = (".attn.rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # rebuilt, never learnt
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)\.(\w+)")
_OUTPUT_AXIS = {"weight": 0, "bias": 0, "qweight": 1, "scales": 1, "qzeros": 1}


@dataclass(frozen=True)
class _Origin:
    """Where a Qwen2 tensor lies: all of a v1 tensor, or third ``part`` of it along ``axis``."""

    name: str
    axis: int = 0
    part: int | None = None


def qwen2_view(
    folder: Path, config: Mapping[str, Any], source: TensorSource
) -> tuple[dict[str, Any], QwenV1Source]:
    """Show a v1 folder as a Qwen2 config and a lazy source, full precision or GPTQ.

    Args:
        folder: the model folder, for ``quantize_config.json`` where config.json lacks the settings.
        config: config.json as it is on disk.
        source: the tensors as they are on disk.
    """
    quant = settings_of(folder, config, source.names())
    names = set(source.names())
    embedding = "transformer.wte.weight"
    dtype = str(source.info(embedding).dtype).removeprefix("torch.") if embedding in names else None
    plain = qwen2_config(config, dtype, folder / "config.json")
    if quant is not None:
        plain["quantization_config"] = quant.to_config_json()
    return plain, QwenV1Source(source, plain, quant)


class QwenV1Source:
    """The tensors of a Qwen v1 checkpoint under Qwen2's names; one v1 tensor is in memory at a time.

    All-zero biases that AutoGPTQ wrote beside v1's bias-free linears are dropped.

    Args:
        source: the v1 tensors.
        config: the Qwen2 config that belongs to them (see ``qwen2_config``).
        quant: the GPTQ settings, None for full precision.
    """

    def __init__(self, source: TensorSource, config: Mapping[str, Any], quant: QuantConfig | None) -> None:
        self._source = source
        self.files = list(source.files) if isinstance(source, StoredInFiles) else []
        require_tensors(source, dict(_expected(config, quant)), self.files[0].parent if self.files else None)
        if quant is not None:
            _refuse_activation_order(source, quant)
        self._origins = dict(_mapping(source, config["num_hidden_layers"]))

    def names(self) -> Iterable[str]:
        """Return all names in Qwen2's layout, in file order; q, k and v stand where c_attn stood."""
        return list(self._origins)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header alone."""
        origin = self._origin(name)
        whole = self._source.info(origin.name)
        if origin.part is None:
            return whole
        shape = list(whole.shape)
        shape[origin.axis] //= 3
        return TensorInfo(tuple(shape), whole.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor on the CPU, in its stored dtype."""
        import torch

        origin = self._origin(name)
        whole = self._source.read(origin.name)
        if origin.part is None:
            return whole
        third = whole.shape[origin.axis] // 3
        view = whole.narrow(origin.axis, origin.part * third, third)
        return view.clone(memory_format=torch.contiguous_format)  # a view would keep the other two alive

    def _origin(self, name: str) -> _Origin:
        try:
            return self._origins[name]
        except KeyError:
            raise ModelError(f"there is no tensor named {name} in this Qwen v1 model") from None


def _mapping(source: TensorSource, layers: int) -> Iterator[tuple[str, _Origin]]:
    """Yield (Qwen2 name, origin) of every tensor, in file order."""
    for name in source.names():
        if name.endswith(_BUFFERS):
            continue
        module, _, kind = name.rpartition(".")
        if module in _TOP:
            yield f"{_TOP[module]}.{kind}", _Origin(name)
            continue
        found = _BLOCK.fullmatch(name)
        if found is None or int(found[1]) >= layers:
            raise _unknown(name)
        prefix = f"model.layers.{found[1]}"
        if found[2] == _FUSED:
            yield from _split(name, prefix, kind)
        elif found[2] not in _IN_BLOCK:
            raise _unknown(name)
        elif kind != "bias":
            yield f"{prefix}.{_IN_BLOCK[found[2]]}.{kind}", _Origin(name)
        else:
            _require_zero(source, name)


def _split(name: str, prefix: str, kind: str) -> Iterator[tuple[str, _Origin]]:
    """Yield q, k and v of one of c_attn's tensors."""
    if kind not in _OUTPUT_AXIS and kind != "g_idx":
        raise _unknown(name)
    for part, module in enumerate(_SPLIT):
        shared = kind == "g_idx"  # it runs along the input axis
        yield (
            f"{prefix}.{module}.{kind}",
            _Origin(name) if shared else _Origin(name, _OUTPUT_AXIS[kind], part),
        )


def _require_zero(source: TensorSource, name: str) -> None:
    """Refuse a bias that is not zero: Qwen2's layout has none for o, gate, up or down."""
    if bool(source.read(name).any()):
        raise ModelError(
            "a Qwen v1 model has no bias but c_attn's, yet this one is not zero",
            where=name,
            hint="the model was changed; Qwen2's layout has no place for this bias",
        )


def _unknown(name: str) -> ModelError:
    if ".visual." in name or ".audio." in name:
        return UnsupportedError(
            "this is a multimodal Qwen v1 model: only the language models are supported",
            where=name,
            hint="use Qwen-1.8B, 7B, 14B or 72B, base or Chat",
        )
    return ModelError(
        "a tensor that this Qwen v1 model does not have", where=name, hint="is config.json another model's?"
    )


def _expected(config: Mapping[str, Any], quant: QuantConfig | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (v1 name, shape) of the tensors that cannot be missing."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "transformer.wte.weight", (vocab, hidden)
    yield "transformer.ln_f.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)
    sizes = {  # (out, in)
        "attn.c_attn": (3 * hidden, hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.w1": (inner, hidden),
        "mlp.w2": (inner, hidden),
        "mlp.c_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"transformer.h.{layer}"
        yield f"{block}.ln_1.weight", (hidden,)
        yield f"{block}.ln_2.weight", (hidden,)
        yield f"{block}.{_FUSED}.bias", (3 * hidden,)
        for module, size in sizes.items():
            yield from _linear(f"{block}.{module}", *size, quant)


def _linear(
    module: str, n_out: int, n_in: int, quant: QuantConfig | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if quant is None:
        yield f"{module}.weight", (n_out, n_in)
        return
    groups = quant.groups(n_in)
    yield f"{module}.qweight", (n_in * quant.bits // 32, n_out)
    yield f"{module}.qzeros", (groups, n_out * quant.bits // 32)
    yield f"{module}.scales", (groups, n_out)


def _refuse_activation_order(source: TensorSource, quant: QuantConfig) -> None:
    """Refuse activation order: no released v1 model has it, and nothing here was tested on one."""
    from qwenq.models.packing import has_trivial_g_idx

    for name in source.names():
        if not name.endswith(".g_idx"):
            continue
        g_idx = source.read(name)
        if not has_trivial_g_idx(g_idx, quant.groups(g_idx.shape[0])):
            raise UnsupportedError(
                "this quantised Qwen v1 model is in activation order: its g_idx is not trivial",
                where=name,
                hint="quantise the full-precision model again; act-order here keeps the natural order",
            )
