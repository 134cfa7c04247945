"""Tokenize as Qwen v1 does, byte-level BPE over ``qwen.tiktoken``, and export it as ``tokenizer.json``.

Text is brought to NFC by the ``tokenizers`` library, not by Python's own tables: so the ids depend neither on
the Python version nor on whether ``qwen.tiktoken`` or the exported ``tokenizer.json`` is read. The two tables
differ only on about a hundred combining marks that entered Unicode after version 9 (2016), where these stand
in a non-canonical order or would compose.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from qwenq.models.chatml import CHAT_TEMPLATE, Message, build_context, without_surrogates
from qwenq.storage import atomic_write_bytes, atomic_write_json

RANKS_FILE = "qwen.tiktoken"
RANK_COUNT = 151_643  # of every released v1 model
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ANY_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_LONGEST_RANK = 9  # digits
_NFC = normalizers.NFC()


def read_ranks(path: Path, expected: int | None = RANK_COUNT) -> dict[bytes, int]:
    """Read the ranks file, one ``base64(token) SP rank`` a line, LF or CRLF: token bytes to rank.

    The ranks are 0 … n-1, ``expected`` many (None: any number), and hold all 256 single bytes.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"the ranks file cannot be read: {error.strerror}", where=path) from error
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        token, rank = _parse_line(line, where=f"{path}, line {number}")
        if token in ranks:
            raise _corrupt(f"the token {token!r} already has rank {ranks[token]}", f"{path}, line {number}")
        if rank in line_of:
            raise _corrupt(f"rank {rank} already occurred on line {line_of[rank]}", f"{path}, line {number}")
        ranks[token], line_of[rank] = rank, number
    found = len(ranks)
    missing = next((rank for rank in range(found) if rank not in line_of), None)
    if missing is not None:
        raise _corrupt(f"rank {missing} is missing ({found} ranks, up to {max(line_of)})", path)
    if expected is not None and found != expected:
        raise _corrupt(f"{found} ranks instead of {expected}", path)
    for value in range(256):
        if bytes([value]) not in ranks:
            raise _corrupt(f"{found} ranks, but none for the single byte 0x{value:02x}", path)
    return ranks


class StreamDecoder:
    """Text of a growing sequence of ids, piece by piece, never cutting a character.

    The pieces and `finish` joined are exactly the text of all ids decoded at once.
    """

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes]) -> None:
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this id; empty inside a character."""
        return self._utf8.decode(self._decode_bytes([token_id]))

    def finish(self) -> str:
        """Return what was held back: U+FFFD where the sequence ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class QwenTokenizer:
    """Encodes as Qwen v1 does.

    Attributes:
        im_start_id, im_end_id, eod_id: ids of the three named special tokens.
        vocab_size: number of real ids (151,851); the model's padded rows beyond are never valid.
        eos_ids: ids that end a generation.
        max_window: tokens of history that a chat prompt may hold, or None.
    """

    bos_id: int | None = None

    def __init__(
        self, ranks: dict[bytes, int], *, chat_format: str = "chatml", max_window: int | None = None
    ) -> None:
        self.ranks = ranks
        self.special_ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._bpe = tiktoken.Encoding(
            "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
        self.eod_id = self.special_ids["<|endoftext|>"]
        self.im_start_id = self.special_ids["<|im_start|>"]
        self.im_end_id = self.special_ids["<|im_end|>"]
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        self.pad_id: int | None = self.eod_id
        chats = chat_format == "chatml"
        self.eos_ids = (self.im_end_id, self.eod_id, self.im_start_id) if chats else (self.eod_id,)
        self.max_window = max_window
        self.special_tokens: tuple[str, ...] = SPECIAL_TOKENS
        self.template: str | None = CHAT_TEMPLATE

    @classmethod
    def from_file(cls, path: Path, *, expected_ranks: int | None = RANK_COUNT) -> QwenTokenizer:
        """Read a ranks file; errors as `read_ranks`."""
        return cls(read_ranks(path, expected_ranks))

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits over all that decides the ids."""
        digest = hashlib.sha256(SPLIT_PATTERN.encode())
        for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %s\n" % (rank, base64.b64encode(token)))
        return digest.hexdigest()[:16]

    @property
    def thinking(self) -> Literal["never"]:
        """Return "never": models of this generation answer at once."""
        return "never"

    def with_thinking(self, enabled: bool) -> QwenTokenizer:
        """Refuse: this chat format has no such switch."""
        raise UsageError("this model's chat format has no enable_thinking", hint="leave out --thinking")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return ids of a text, without BOS or EOS.

        With ``special=False`` the surface form of a special token is ordinary text: safe for user input.

        Raises:
            UnsupportedError: about a million white-space characters in a row, on which tiktoken gives up.
        """
        if not special:
            return self._encode_ordinary(text)
        # Special tokens are found before NFC, as in the exported tokenizer.json: what follows one can
        # therefore not compose with its last character and undo it.
        ids: list[int] = []
        for place, piece in enumerate(_ANY_SPECIAL.split(text)):
            ids += [self.special_ids[piece]] if place % 2 else self._encode_ordinary(piece)
        return ids

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """Encode each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes, which may begin or end inside a UTF-8 character."""
        require_ids(ids, self.vocab_size)
        return self._bpe.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; U+FFFD where the bytes are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """Return a decoder for one answer as it grows."""
        return StreamDecoder(self.decode_bytes)

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] = (),
    ) -> list[int]:
        """Encode the ChatML prompt of a conversation, as `chatml.build_context` does.

        Qwen v1 calls no tools: ``tools`` are left out, as `template` tells.
        """
        return build_context(self, messages, add_generation_prompt=add_generation_prompt).ids

    def _encode_ordinary(self, text: str) -> list[int]:
        text = to_nfc(text)
        try:
            return self._bpe.encode(text, allowed_special=set(), disallowed_special=())
        except ValueError as error:
            raise UnsupportedError(
                f"a text of {len(text):,} characters cannot be split into words: {error}",
                hint="shorten its longest run of white space",
            ) from error


def require_ids(ids: Sequence[int], vocab_size: int, where: Path | None = None) -> None:
    """Refuse ids that no vocabulary of that size has."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            what = f"token id {token_id} is not in the vocabulary (0 … {vocab_size - 1})"
            raise ModelError(what, where=where)


def to_nfc(text: str) -> str:
    """Bring a text to NFC by the tables of ``tokenizers``; lone surrogates become U+FFFD."""
    text = without_surrogates(text)
    # Python's tables are newer, and what is normal by newer tables is normal by older ones.
    return text if unicodedata.is_normalized("NFC", text) else _NFC.normalize_str(text)


def _parse_line(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.rstrip(b"\r").split(b" ")
    if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > _LONGEST_RANK:
        raise _corrupt(f"no `base64 rank` pair: {line[:60]!r}", where)
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise _corrupt(f"bad base64 {fields[0][:60]!r}: {error}", where) from error
    if not token:
        raise _corrupt("an empty token", where)
    return token, int(fields[1])


def _corrupt(what: str, where: str | Path) -> CorruptFileError:
    return CorruptFileError(
        f"the ranks file is damaged: {what}", where=where, hint=f"fetch {RANKS_FILE} of the model again"
    )


WRITTEN = ("tokenizer.json", "tokenizer_config.json")


def write_tokenizer_json(tokenizer: QwenTokenizer, folder: Path, *, max_length: int | None = None) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into a folder: the same ids as ``tokenizer``.

    The chat template renders what `chatml.build_context` encodes. ``max_length`` is the model's context.
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
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # merge the pair of the lowest rank, the leftmost first
            pairs = ((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            lowest, at = min(pairs)
            if lowest >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
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
