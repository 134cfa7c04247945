"""Turn documents into full sequences: shuffle, render, tokenise, join, cut. There is no padding."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from qwenq.calibration.documents import Document
from qwenq.errors import CalibrationError, UsageError
from qwenq.events import Update
from qwenq.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sizes:
    """Sizes of a calibration set."""

    samples: int
    held_out: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Return the tokens in all sequences together."""
        return (self.samples + self.held_out) * self.seq_len


@dataclass(frozen=True)
class Packed:
    """Sequences cut from documents."""

    tokens: torch.Tensor  # int64 [samples, seq_len]
    held_out: torch.Tensor  # int64 [held_out, seq_len]
    # whether the held-out sequences come from other documents
    held_out_from: Literal["other documents", "the same documents", "none"]
    documents: int  # how many documents were tokenised for them


def ids_of(document: Document, tokenizer: Tokenizer, *, special: bool = True) -> list[int]:
    """Return the ids of a text, or of a conversation through the model's chat template.

    Special tokens spelt out in a text are read as tokens where ``special``: it may be a conversation that was
    rendered already. A tool's answer is refused where the template knows no tools: it would be rendered as a
    turn of an unknown role.
    """
    if isinstance(document.content, str):
        return tokenizer.encode(document.content, special=special)
    _require_tool_role(document, tokenizer.template)
    try:
        return tokenizer.chat(document.content, add_generation_prompt=False, tools=document.tools)
    except UsageError as error:
        raise CalibrationError(error.what, where=document.where, hint=error.hint) from error


def _require_tool_role(document: Document, template: str | None) -> None:
    answers = any(isinstance(message, dict) and message["role"] == "tool" for message in document.content)
    if answers and template is not None and "tool" not in template:
        raise CalibrationError(
            "a message has the role tool, which the model's chat template does not know",
            where=document.where,
            hint="leave such conversations out, or calibrate on others",
        )


def read_pool(documents: Iterator[Document], characters: int) -> tuple[list[Document], bool]:
    """Return the first documents of a source, until they hold ``characters`` characters; whether it ended."""
    pool: list[Document] = []
    for document in documents:
        pool.append(document)
        characters -= document.characters
        if characters <= 0:
            return pool, next(documents, None) is None
    return pool, True


def shuffled(documents: list[Document], seed: int) -> list[Document]:
    """Return documents in an order that depends on seed and number alone, the same on every platform."""

    def draw(place: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=16).digest()

    return [documents[place] for place in sorted(range(len(documents)), key=draw)]


def pack(
    documents: Iterable[list[int]],
    wanted: Sizes,
    separator: list[int],
    *,
    where: str,
    progress: Update | None = None,
) -> Packed:
    """Join tokenised documents, ``separator`` after each, and cut full sequences.

    The held-out sequences are cut first; the document that their last token falls into is used no further,
    so that the calibration sequences come from other documents. Where the text is too short for that, both
    are cut from one stream: see ``held_out_from``. What is left over is dropped.
    """
    stream = iter(documents)
    parts: list[list[int]] = []
    used = done = 0
    for rows in (wanted.held_out, wanted.samples):
        taken, count = list[int](), rows * wanted.seq_len
        while len(taken) < count and (document := next(stream, None)) is not None:
            taken += [*document, *separator]
            used += 1
            if progress:
                progress(done + min(len(taken), count), wanted.tokens)
        parts.append(taken)
        done += min(len(taken), count)
    checked, main = parts
    origin: Literal["other documents", "the same documents", "none"] = "other documents"
    if len(main) < wanted.samples * wanted.seq_len:
        joined = checked + main
        _require(len(joined), wanted, where)
        cut = wanted.held_out * wanted.seq_len
        checked, main, origin = joined[:cut], joined[cut:], "the same documents"
    return Packed(
        tokens=_cut(main, wanted.samples, wanted.seq_len),
        held_out=_cut(checked, wanted.held_out, wanted.seq_len),
        held_out_from=origin if wanted.held_out else "none",
        documents=used,
    )


def _cut(tokens: list[int], rows: int, seq_len: int) -> torch.Tensor:
    flat = torch.tensor(tokens[: rows * seq_len], dtype=torch.int64)
    return flat.view(rows, seq_len)  # [rows, seq_len]


def _require(have: int, wanted: Sizes, where: str) -> None:
    if have >= wanted.tokens:
        return
    fit = have // wanted.seq_len - wanted.held_out
    ways = [f"lower --samples to {fit}"] if fit > 0 else ["ask for fewer sequences, those held out included"]
    ways += ["lower --seq-len", "give more text"]
    raise CalibrationError(
        f"too little text: {have:,} tokens, but {wanted.tokens:,} are needed for "
        f"{wanted.samples} + {wanted.held_out} sequences of {wanted.seq_len}",
        where=where,
        hint=", ".join(ways[:-1]) + f", or {ways[-1]}",
    )


def check_vocabulary(tokens: torch.Tensor, vocab_size: int, where: str) -> None:
    """Refuse ids that the model's embedding has no row for."""
    if tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low >= 0 and high < vocab_size:
        return
    raise CalibrationError(
        f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size} ids",
        where=where,
        hint="tokenizer and model do not belong together: use the tokenizer of this very model",
    )


def notices_of(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return a sentence for each thing that the tokens do not hold, or hold in another form than the text."""
    return tuple(filter(None, (_unread(documents, tokenizer), _specials(documents, tokenizer))))


def _unread(documents: Iterable[Document], tokenizer: Tokenizer) -> str | None:
    """Return which keys the chat template has no name for: it cannot render what it does not ask for."""
    template = tokenizer.template
    if template is None:
        return None
    counts: Counter[str] = Counter()
    for document in documents:
        if isinstance(document.content, list):
            for message in document.content:  # numbers and flags beside a message never hold text
                texts = {key for key, value in message.items() if isinstance(value, str | list | dict)}
                counts.update(texts - {"role", "content"})
            counts.update(["tools"] if document.tools else [])
    names = [key for key in counts if not re.search(rf"\b{re.escape(key)}\b", template)]
    if not names:
        return None
    listed = ", ".join(f"{key} ({counts[key]:,} times)" for key in sorted(names))
    return f"the model's chat template does not read {listed}: left out of the calibration tokens"


def _specials(documents: Iterable[Document], tokenizer: Tokenizer) -> str | None:
    names = tokenizer.special_tokens
    if not names:
        return None
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    found: Counter[str] = Counter()
    for document in documents:
        if isinstance(document.content, str):
            found.update(pattern.findall(document.content))
    if not found:
        return None
    most = found.most_common(1)[0][0]
    return f"plain texts hold {found.total():,} special tokens, such as {most}: they are read as tokens"
