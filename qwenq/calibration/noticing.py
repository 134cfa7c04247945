"""Report what tokens do not show: keys that a chat template does not read, special tokens in plain text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from qwenq.calibration.documents import Document
from qwenq.models.tokenizer import Tokenizer

_PLAIN = {"role", "content"}


def notices_of(documents: Sequence[Document], tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return a sentence for each thing that the tokens do not hold, or hold in another form than the text."""
    return tuple(
        notice for notice in (_unread(documents, tokenizer), _specials(documents, tokenizer)) if notice
    )


def _unread(documents: Iterable[Document], tokenizer: Tokenizer) -> str | None:
    """Return which keys the chat template has no name for: it cannot render what it does not ask for."""
    template = tokenizer.template
    if template is None:
        return None
    counts: Counter[str] = Counter()
    for document in documents:
        if isinstance(document.content, list):
            keys = [key for message in document.content for key, value in message.items() if _texts(value)]
            counts.update(key for key in keys if key not in _PLAIN)
            counts.update(["tools"] if document.tools else [])
    names = [key for key in counts if not re.search(rf"\b{re.escape(key)}\b", template)]
    if not names:
        return None
    listed = ", ".join(f"{key} ({counts[key]:,} times)" for key in sorted(names))
    return f"the model's chat template does not read {listed}: left out of the calibration tokens"


def _texts(value: object) -> bool:
    """Return whether a value can hold text; numbers and flags beside a message never do."""
    return isinstance(value, str | list | dict)


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
