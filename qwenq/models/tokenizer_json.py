"""Export Qwen v1's tokenizer as a ``tokenizer.json``, which clients load without remote code."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from qwenq.errors import UnsupportedError
from qwenq.models.chatml import CHAT_TEMPLATE
from qwenq.models.qwen_tokenizer import RANKS_FILE, SPECIAL_TOKENS, SPLIT_PATTERN, QwenTokenizer
from qwenq.storage import atomic_write_bytes, atomic_write_json

WRITTEN = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer_json(tokenizer: QwenTokenizer, folder: Path, *, max_length: int | None = None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``: the same ids as ``tokenizer``.

    The chat template renders what `chatml.build_context` encodes.

    Args:
        tokenizer: the ranks, and whether the model chats.
        folder: made if it is missing; files of these names are replaced.
        max_length: the model's context in tokens, if known.
    """
    content = as_tokenizers(tokenizer).to_str()
    chats = tokenizer.im_end_id in tokenizer.eos_ids
    config: dict[str, object] = {
        "tokenizer_class": "Qwen2Tokenizer",  # the same pipeline, in transformers 4 and 5
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>" if chats else "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    if max_length is not None:
        config["model_max_length"] = max_length
    atomic_write_bytes(folder / WRITTEN[0], content.encode("utf-8"))
    atomic_write_json(folder / WRITTEN[1], config)


def as_tokenizers(tokenizer: QwenTokenizer) -> Tokenizer:
    """Build the same tokenizer for the ``tokenizers`` library."""
    spell = {value: char for char, value in byte_of_char().items()}

    def spelled(token: bytes) -> str:
        return "".join(spell[value] for value in token)

    vocab = {spelled(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in recover_merges(tokenizer.ranks)]
    fast = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return fast


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pair that each token of two bytes or more is merged from, in rank order.

    Merging a token's own bytes with the lower ranks alone ends in two parts; no other pair can ever meet in
    any text, because merges of lower rank come first there too.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge_below(token, rank, ranks)
        if len(parts) != 2:
            raise UnsupportedError(
                f"the token {token!r} (rank {rank}) cannot be built by merges of lower rank",
                where=RANKS_FILE,
                hint="use the ranks file itself; a tokenizer.json could not hold it",
            )
        merges.append((parts[0], parts[1]))
    return merges


def byte_of_char() -> dict[str, int]:
    """Map the printable character that stands for each byte in byte-level vocabularies to that byte.

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 onwards.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in own}
    others = [value for value in range(256) if value not in set(own)]
    return table | {chr(0x100 + place): value for place, value in enumerate(others)}


def _merge_below(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the token's bytes after all merges of a rank below ``limit``, lowest first, leftmost first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        lowest, at = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < lowest:
                lowest, at = rank, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
