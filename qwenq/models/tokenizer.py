"""Load one tokenizer for all rooms: Qwen v1's own, or what transformers loads from the folder.

What decides who reads: a folder that holds ``qwen.tiktoken`` is read by `QwenTokenizer`, every other by
transformers' AutoTokenizer, never with remote code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from qwenq.errors import CorruptFileError, ModelError
from qwenq.models.chatml import DEFAULT_MAX_WINDOW, Message
from qwenq.models.own_files import require_own_files
from qwenq.models.qwen_tokenizer import RANK_COUNT, RANKS_FILE, SPECIAL_TOKENS, QwenTokenizer

_SUFFICIENT = ("tokenizer.json", "vocab.json", "tokenizer.model", RANKS_FILE)


TemplateThinking = Literal["never", "switch", "always"]
"""``switch``: the template reads ``enable_thinking``; ``always``: it opens ``<think>`` in every prompt."""


class TextStream(Protocol):
    """Text of one answer as it grows."""

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this id; empty inside a character."""

    def finish(self) -> str:
        """Return what was held back because a character was never completed."""


class Tokenizer(Protocol):
    """What the other rooms need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Return number of ids that decode: 0 … vocab_size-1 (a model may have more, padded rows)."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return ids that end a generation: the generation config's, and the tokenizer's own."""

    @property
    def bos_id(self) -> int | None:
        """Return the id that begins a text, if the model has one; `encode` never adds it."""

    @property
    def pad_id(self) -> int | None:
        """Return the id to fill batches with, if there is one."""

    @property
    def max_window(self) -> int | None:
        """Return tokens of history that v1's generation config allows in a chat prompt; None elsewhere."""

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits over all that decides the ids."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Return surface forms of the tokens that ``encode(…, special=True)`` parses besides plain text."""

    @property
    def template(self) -> str | None:
        """Return source of the chat template, whose names tell which keys of a message it reads."""

    @property
    def thinking(self) -> TemplateThinking:
        """Return whether prompts of its chat template let the model think before it answers."""

    def with_thinking(self, enabled: bool) -> Tokenizer:
        """Return a tokenizer whose chat template gets ``enable_thinking``; only for ``switch``."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Encode without BOS or EOS; surface forms of special tokens are parsed only if ``special``."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, ``special=False``."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, special tokens spelled out, U+FFFD where the bytes are no UTF-8."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes; UnsupportedError where the tokenizer does not work on bytes."""

    def stream(self) -> TextStream:
        """Return a decoder for one answer as it grows."""

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        max_window: int | None = None,
        tools: Sequence[Any] = (),
    ) -> list[int]:
        """Return the prompt of a conversation that may call ``tools``.

        The oldest rounds are dropped until it fits ``max_window`` tokens.
        """


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model folder, or of one ``*.tiktoken`` or ``tokenizer.json`` file.

    Raises:
        ModelError: nothing there that is a tokenizer, or transformers cannot load it without remote code.
        CorruptFileError: a damaged ranks file or generation_config.json.
    """
    if not path.exists():
        raise ModelError("no such tokenizer", where=path, hint="name a model folder, or a tokenizer file")
    require_own_files(path)
    if path.suffix == ".tiktoken":
        return QwenTokenizer.from_file(path)
    if path.is_dir() and (path / RANKS_FILE).is_file():
        return load_qwen_tokenizer(path)
    if path.is_dir() and not any((path / name).is_file() for name in _SUFFICIENT):
        raise ModelError(
            "the folder holds no tokenizer",
            where=path,
            hint=f"one of {', '.join(_SUFFICIENT)} has to be there",
        )
    from qwenq.models.hf_tokenizer import HfTokenizer

    return HfTokenizer(path, read_json(path / "generation_config.json") if path.is_dir() else {})


def load_qwen_tokenizer(folder: Path) -> QwenTokenizer:
    """Load the tokenizer of a folder that holds ``qwen.tiktoken``, with its chat format and window.

    A config.json with a vocabulary too small for the released ranks file allows a smaller one.
    """
    generation = read_json(folder / "generation_config.json")
    vocab_size = read_json(folder / "config.json").get("vocab_size")
    small = isinstance(vocab_size, int) and vocab_size < RANK_COUNT + len(SPECIAL_TOKENS)
    ranks = QwenTokenizer.from_file(folder / RANKS_FILE, expected_ranks=None if small else RANK_COUNT).ranks
    chats = _is_chat(generation, len(ranks))
    window = generation.get("max_window_size", DEFAULT_MAX_WINDOW if chats else None)
    if window is not None and (type(window) is not int or window < 1):
        raise CorruptFileError(
            f"max_window_size is {window!r}, not a number of tokens", where=folder / "generation_config.json"
        )
    return QwenTokenizer(ranks, chat_format="chatml" if chats else "raw", max_window=window)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds files that a tokenizer can be loaded from."""
    return any((folder / name).is_file() for name in _SUFFICIENT)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"not JSON: {error}", where=path) from error
    if not isinstance(content, dict):
        raise CorruptFileError("not a JSON object", where=path)
    return content


def eos_ids_of(generation: dict[str, Any], own: int | None) -> tuple[int, ...]:
    """Return the generation config's end ids (one or a list), then the tokenizer's own, each once."""
    named = generation.get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(token for token in [*listed, own] if type(token) is int and token >= 0))


def digest(*parts: str) -> str:
    """Return 16 hex digits over texts, each set apart from the next; JSON may hold half a surrogate pair."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part.encode("utf-8", errors="surrogatepass"))
    return whole.hexdigest()[:16]


def _is_chat(generation: dict[str, Any], im_start: int) -> bool:
    """Return whether a v1 model answers in ChatML: by its chat_format, or by its end ids after conversion."""
    return generation.get("chat_format") == "chatml" or im_start + 2 in eos_ids_of(generation, None)
