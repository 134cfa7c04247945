"""Load a tokenizer: Qwen v1's own, or what transformers loads from the folder, never with remote code.

A folder that holds ``qwen.tiktoken`` is read by `QwenTokenizer`, every other by transformers' AutoTokenizer.
Its chat templates are rendered in a process with limits (`chatml.TemplateProcess`); the rendered text is then
encoded with special tokens parsed: a special token that a *user* typed becomes that token here. Only Qwen
v1's own path (`chatml.build_context`) is safe against that; filter untrusted input.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tokenizers import decoders

from qwenq import stopping
from qwenq.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from qwenq.models.chatml import DEFAULT_MAX_WINDOW, PROCESS, Message, without_surrogates
from qwenq.models.config import check_labels
from qwenq.models.folders import refuse_foreign_links, refuse_large
from qwenq.models.qwen_tokenizer import (
    RANK_COUNT,
    RANKS_FILE,
    SPECIAL_TOKENS,
    QwenTokenizer,
    StreamDecoder,
    byte_of_char,
    read_ranks,
    require_ids,
)
from qwenq.storage import read_json

# Refuse tokenizer files that blow up: a text, by their rules, or the tokenizer, by its ids.
#
# Thirty rules "a" → "aa" make a gigabyte of one letter. A vocabulary with one id of two thousand million is
# written out by the library with a list of all ids that are missing: gigabytes, and where there is no
# memory for them, the library ends the process.


MOST = 256.0
"""Times that a text may grow in normalising or decoding; real tokenizers stay below ten."""
HOLES = 1_000_000
"""Ids that a vocabulary may leave out: a bound of ours, not a measured one."""


def refuse_holes(loaded: Any, path: Path) -> None:
    """Compare the largest id of transformers' tokenizer with the number of tokens."""
    ids = loaded.get_vocab().values()
    largest = max(ids, default=0)
    if largest > len(ids) + HOLES:
        raise ModelError(
            f"the vocabulary has {len(ids)} tokens and an id of {largest}",
            where=path,
            hint="the file is damaged, or not to be trusted; download it again from where you trust it",
        )


def refuse_growth(loaded: Any, path: Path) -> None:
    """Multiply how much each rule can lengthen a text, in normalizer and decoder; count its copies."""
    backend = getattr(loaded, "backend_tokenizer", None)
    for part, times_of, most, does in (
        ("normalizer", _growth, MOST, "could make a text {:.3g} times as long"),
        ("decoder", _growth, MOST, "could make a text {:.3g} times as long"),
        ("post_processor", _copies, 1, "gives each text {} times"),
    ):
        rules = getattr(backend, part, None)
        if rules is not None and (times := times_of(json.loads(rules.__getstate__()))) > most:
            raise ModelError(
                f"the {part} of this tokenizer {does.format(times)}",
                where=path,
                hint="do not trust this model; no real tokenizer does that",
            )


def _copies(rule: Any) -> int:
    """Count how often the ids of a single text are in what comes out, special tokens aside."""
    if not isinstance(rule, dict):
        return 1
    times = 1
    for inner in rule.get("processors") or []:
        times *= _copies(inner)
    return times * max(1, sum("Sequence" in piece for piece in rule.get("single") or []))


def _growth(rule: Any) -> float:
    """Return how many times as long a long text can become."""
    if not isinstance(rule, dict):
        return 1.0
    times = 1.0
    for inner in (*(rule.get("normalizers") or []), *(rule.get("decoders") or [])):
        times *= _growth(inner)
    if rule.get("type") == "Prepend":
        times *= 1.0 + len(str(rule.get("prepend", "")))  # of the shortest text
    if rule.get("type") == "Replace":
        pattern = rule.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        made = len(str(rule.get("content", "")))
        # A regular expression may match a single character, or nothing before each one.
        times *= max(1.0, made / len(literal)) if literal else 1.0 + made
    return times


_SUFFICIENT = ("tokenizer.json", "vocab.json", "tokenizer.model", RANKS_FILE)


TemplateThinking = Literal["never", "switch", "always"]
"""``switch``: the template reads ``enable_thinking``; ``always``: it opens ``<think>`` in every prompt."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model folder, or of one ``*.tiktoken`` or ``tokenizer.json`` file."""
    if not path.exists():
        raise ModelError("no such tokenizer", where=path, hint="name a model folder, or a tokenizer file")
    if path.is_file():
        refuse_large(path)
    refuse_foreign_links(path)
    if path.suffix == ".tiktoken":
        return QwenTokenizer.from_file(path)
    if path.is_dir() and (path / RANKS_FILE).is_file():
        return load_qwen_tokenizer(path)
    if path.is_dir() and not has_tokenizer(path):
        raise ModelError(
            "the folder holds no tokenizer",
            where=path,
            hint=f"one of {', '.join(_SUFFICIENT)} has to be there",
        )
    return HfTokenizer(path, read_json(path / "generation_config.json") if path.is_dir() else {})


def load_qwen_tokenizer(folder: Path) -> QwenTokenizer:
    """Load the tokenizer of a folder that holds ``qwen.tiktoken``, with its chat format and window.

    A config.json with a vocabulary too small for the released ranks file allows a smaller one.
    """
    generation = read_json(folder / "generation_config.json")
    vocab_size = read_json(folder / "config.json").get("vocab_size")
    small = isinstance(vocab_size, int) and vocab_size < RANK_COUNT + len(SPECIAL_TOKENS)
    ranks = read_ranks(folder / RANKS_FILE, None if small else RANK_COUNT)
    im_end = len(ranks) + 2  # among the end ids of a chat model after conversion
    chats = generation.get("chat_format") == "chatml" or im_end in eos_ids_of(generation, None)
    window = generation.get("max_window_size", DEFAULT_MAX_WINDOW if chats else None)
    if window is not None and (type(window) is not int or window < 1):
        raise CorruptFileError(
            f"max_window_size is {window!r}, not a number of tokens", where=folder / "generation_config.json"
        )
    return QwenTokenizer(ranks, chat_format="chatml" if chats else "raw", max_window=window)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds files that a tokenizer can be loaded from."""
    return any((folder / name).is_file() for name in _SUFFICIENT)


def eos_ids_of(generation: dict[str, Any], own: int | None) -> tuple[int, ...]:
    """Return the generation config's end ids (one or a list), then the tokenizer's own, each once."""
    named = generation.get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys(token for token in [*listed, own] if type(token) is int and token >= 0))


class HfTokenizer:
    """transformers' tokenizer, with the methods of `QwenTokenizer`.

    Attributes:
        vocab_size: number of ids that decode: 0 … vocab_size-1 (a model may have more, padded rows).
        eos_ids: ids that end a generation: the generation config's, and the tokenizer's own.
        bos_id: the id that begins a text, if the model has one; `encode` never adds it.
        pad_id: the id to fill batches with, if there is one.
    """

    _template_args: Mapping[str, bool] = MappingProxyType({})

    def __init__(self, path: Path, generation: dict[str, Any]) -> None:
        """Load from a folder or a tokenizer.json; ModelError when transformers cannot."""
        self._path = path
        self._hf = _load(path)
        self.vocab_size: int = len(self._hf)
        self.bos_id: int | None = self._hf.bos_token_id
        self.pad_id: int | None = self._hf.pad_token_id
        self.eos_ids = eos_ids_of(generation, self._hf.eos_token_id)

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits over the tokenizer's whole definition and its chat template."""
        backend = getattr(self._hf, "backend_tokenizer", None)
        definition = backend.to_str() if backend is not None else repr(sorted(self._hf.get_vocab().items()))
        args = [json.dumps(dict(self._template_args), sort_keys=True)] if self._template_args else []
        digest = hashlib.sha256()
        for part in (definition, str(self._hf.chat_template), *args):
            text = part.encode("utf-8", errors="surrogatepass")  # JSON may hold half a surrogate pair
            digest.update(len(part).to_bytes(8, "little") + text)
        return digest.hexdigest()[:16]

    @cached_property
    def thinking(self) -> TemplateThinking:
        """Return whether prompts of the chat template let the model think, by the template's own text."""
        try:
            template = str(self._hf.get_chat_template())
        except ValueError:  # none, or several and none is the default
            return "never"
        if "enable_thinking" in template:
            return "switch"
        if "<think>" not in template:
            return "never"
        try:
            prompt = self.decode(self.chat([{"role": "user", "content": "?"}]))
        except UsageError:
            return "never"
        return "always" if prompt.rstrip().endswith("<think>") else "never"

    def with_thinking(self, enabled: bool) -> HfTokenizer:
        """Return a tokenizer whose chat template gets ``enable_thinking``; only for ``switch``."""
        if self.thinking != "switch":
            raise UsageError(
                "this model's chat template does not read enable_thinking",
                where=self._path,
                hint="leave out --thinking",
            )
        made = copy.copy(self)
        made.__dict__.pop("fingerprint", None)
        made._template_args = MappingProxyType({"enable_thinking": enabled})
        return made

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Return surface forms of tokens marked special; other added tokens are parsed in every text."""
        return tuple(token.content for token in self._hf.added_tokens_decoder.values() if token.special)

    @property
    def template(self) -> str | None:
        """Return the source of the default chat template; None: there is none."""
        try:
            return str(self._hf.get_chat_template()) if self._hf.chat_template else None
        except ValueError:
            return None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return ids, without BOS or EOS.

        With ``special=False``, tokens marked special stay plain text; added tokens that are not so marked
        (such as Qwen3's ``<think>``) are always parsed, as everywhere in transformers.
        """
        return self._call(without_surrogates(text), special)  # type: ignore[no-any-return]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, in parallel."""
        return self._call([without_surrogates(text) for text in texts], False)  # type: ignore[no-any-return]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, special tokens spelled out. ModelError names an unknown id."""
        if self._byte_level:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        require_ids(ids, self.vocab_size, self._path)
        return str(self._hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes. ModelError names an unknown id; UnsupportedError if not byte-level."""
        if not self._byte_level:
            raise UnsupportedError(
                "this tokenizer is not byte-level: ids have no exact bytes", where=self._path
            )
        require_ids(ids, self.vocab_size, self._path)
        table = self._bytes_of_id
        return b"".join(table[token_id] for token_id in ids)

    def stream(self) -> TextStream:
        """Return a decoder for one answer as it grows."""
        return StreamDecoder(self.decode_bytes) if self._byte_level else PieceStream(self._hf)

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Any] = (),
    ) -> list[int]:
        """Encode the prompt that the folder's chat template renders."""
        if not self._hf.chat_template:
            raise UsageError(
                "this model has no chat template", where=self._path, hint="use its -Chat or -Instruct sibling"
            )
        try:
            template = self._hf.get_chat_template()
            named = {"tools": list(tools)} if tools else {}
            variables = {**self._hf.special_tokens_map, **named, **self._template_args}
            text = PROCESS.render(template, messages, add_generation_prompt, variables)
        except (UsageError, ValueError) as error:  # ValueError: several templates, and none is the default
            what = error.what if isinstance(error, UsageError) else str(error)
            raise UsageError(what, where=self._path) from error
        return self.encode(text, special=True)

    def _call(self, text: str | list[str], special: bool) -> Any:
        if isinstance(text, list) and not text:
            return []
        try:
            return self._hf(
                text, add_special_tokens=False, split_special_tokens=not special, verbose=False
            ).input_ids
        except BaseException as error:  # a regular expression that takes too long makes the library panic
            if not _is_failure(error):
                raise
            raise ModelError(
                f"the tokenizer fails on a text: {' '.join(str(error).split())[:500]}",
                where=self._path,
                hint="its files are damaged, or not to be trusted: download them again",
            ) from error

    @cached_property
    def _byte_level(self) -> bool:
        backend = getattr(self._hf, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        return isinstance(decoder, decoders.ByteLevel) or (
            isinstance(decoder, decoders.Sequence) and b'"ByteLevel"' in decoder.__getstate__()
        )

    @cached_property
    def _bytes_of_id(self) -> list[bytes]:
        table = byte_of_char()
        added = {token_id: token.content for token_id, token in self._hf.added_tokens_decoder.items()}
        result = []
        for token_id, token in enumerate(self._hf.convert_ids_to_tokens(range(self.vocab_size))):
            spelled = token or ""  # a gap in the vocabulary
            plain = token_id in added or not all(char in table for char in spelled)
            result.append(spelled.encode("utf-8") if plain else bytes(table[char] for char in spelled))
        return result


class PieceStream:
    """Text of one answer as it grows, where pieces depend on their neighbours (SentencePiece)."""

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this id; empty inside a character."""
        self._ids.append(token_id)
        return self._more(whole_characters=True)

    def finish(self) -> str:
        """Return what was held back because a character was never completed."""
        return self._more(whole_characters=False)

    def _more(self, *, whole_characters: bool) -> str:
        text = str(self._hf.decode(self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if whole_characters and text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[self._shown :], len(text)
        return piece


Tokenizer = QwenTokenizer | HfTokenizer
TextStream = StreamDecoder | PieceStream


def _is_failure(error: BaseException) -> bool:
    """Return whether a tokenizer's library has failed, in Rust perhaps, and was not interrupted."""
    failed = isinstance(error, Exception) and not isinstance(error, MemoryError)
    return failed or type(error).__name__ == "PanicException"


def _load(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if path.is_file():
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            _refuse_foreign_names(path / "tokenizer_config.json")
            check_labels(read_json(path / "config.json"), path / "config.json")
            loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # the readers raise bare Exception, and those in Rust panic
        if isinstance(error, ModelError) or not _is_failure(error):
            raise
        if (stop := stopping.behind(error)) is not None:
            raise stop from error
        said = " ".join(str(error).split())[:500]
        if (of_config := _complaint_of_config(path)) is not None:  # which the loader reads first
            raise ModelError(
                f"transformers cannot read config.json: {of_config}",
                where=path / "config.json",
                hint="copy the model's config.json again, or correct the keys that it names",
            ) from error
        raise ModelError(
            f"transformers cannot load the tokenizer: {said}",
            where=path,
            hint="no remote code is ever run; the folder needs a whole tokenizer.json",
        ) from error
    refuse_holes(loaded, path)
    refuse_growth(loaded, path)
    return loaded


def _complaint_of_config(path: Path) -> str | None:
    """Return what transformers says of config.json alone; None: it reads it, or there is no such file."""
    from transformers import AutoConfig

    if not (path / "config.json").is_file():
        return None
    try:
        AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config class raises
        said = " ".join(str(error).split())[:500]
        return None if "trust_remote_code" in said else said or type(error).__name__
    return None


def _refuse_foreign_names(path: Path) -> None:
    """Refuse paths in fast_tokenizer_files: transformers opens those files wherever they lie."""
    names = read_json(path).get("fast_tokenizer_files") or []
    if not isinstance(names, list) or any(Path(str(name)).name != name for name in names):
        raise ModelError(
            "fast_tokenizer_files names something else than files of this folder",
            where=path,
            hint="do not trust this model; an honest list holds plain file names",
        )
