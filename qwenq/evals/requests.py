"""Turn requests into tokens.

A continuation is encoded alone and appended to the prompt's ids, as in Qwen's scripts: ``" A"`` is one token
of a space and an A, whatever it might have merged with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import Choose, Item, Message, Prompt, Request, Write
from qwenq.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChoiceTokens:
    """`Choose` as token ids; ``name``: the item, for messages."""

    name: str
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def needed(self) -> int:
        """Return the positions of its longest sequence; the last token of each is never an input."""
        return len(self.prompt) + max(len(choice) for choice in self.choices) - 1


@dataclass(frozen=True)
class WriteTokens:
    """`Write` as token ids; ``name``: the item, for messages."""

    name: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    until: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Return the positions of prompt and answer."""
        return len(self.prompt) + self.max_new_tokens


RequestTokens = ChoiceTokens | WriteTokens


def encode_requests(
    tokenizer: Tokenizer, items: Sequence[Item], requests: Sequence[Request]
) -> list[RequestTokens]:
    """Return the token ids of each request.

    Raises:
        DataError: a prompt or a continuation without any token.
        UsageError: a chat for a model without a chat template.
    """
    prompts = _encode_prompts(tokenizer, [request.prompt for request in requests])
    found: list[RequestTokens] = []
    for item, request, prompt in zip(items, requests, prompts, strict=True):
        if not prompt:
            raise DataError("an empty prompt cannot be continued", where=item.id)
        if isinstance(request, Write):
            found.append(WriteTokens(item.id, tuple(prompt), request.max_new_tokens, request.until))
            continue
        choices = tuple(tuple(tokenizer.encode(choice)) for choice in request.choices)
        if not choices or not all(choices):
            raise DataError("a continuation without any token cannot be scored", where=item.id)
        found.append(ChoiceTokens(item.id, tuple(prompt), choices))
    return found


def require_context(requests: Sequence[RequestTokens], context: int | None) -> None:
    """Refuse prompts beyond the model's context: nothing is truncated, as that would be another question.

    Raises:
        DataError: a prompt is too long.
    """
    too_long = [request for request in requests if context is not None and request.needed > context]
    if not too_long:
        return
    longest = max(too_long, key=lambda request: request.needed)
    answer = f" and up to {longest.max_new_tokens} new ones" if isinstance(longest, WriteTokens) else ""
    raise DataError(
        f"{len(too_long)} of {len(requests)} prompts are too long for this model, which takes {context} "
        f"tokens; the longest has {len(longest.prompt):,}{answer}",
        where=longest.name,
        hint="show fewer examples with --shots, allow fewer new tokens with --max-new-tokens, name the "
        "subjects that fit with --subjects, or leave the task out of --tasks",
    )


def limited(request: Request, max_new_tokens: int | None) -> Request:
    """Return the request with this limit of new tokens; None keeps the protocol's."""
    if max_new_tokens is None or isinstance(request, Choose):
        return request
    return replace(request, max_new_tokens=max_new_tokens)


def request_hash(item: Item, request: Request) -> str:
    """Return 16 hex digits over request and item, right answer included."""
    asked: dict[str, object] = {"prompt": _plain(request.prompt)}
    if isinstance(request, Choose):
        asked["choices"] = request.choices
    else:
        asked |= {"max_new_tokens": request.max_new_tokens, "until": request.until}
    text = json.dumps([asked, dict(item.data)], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def questions_hash(asked: Mapping[str, str]) -> str:
    """Return 16 hex digits over all items' ids and request hashes."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as readable text: a chat's messages under their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def _plain(prompt: Prompt) -> object:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Encode texts together, which some tokenizers do in parallel, and chats one by one."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokenizer.encode_many(texts))
    return [next(encoded) if isinstance(prompt, str) else _chat(tokenizer, prompt) for prompt in prompts]


def _chat(tokenizer: Tokenizer, turns: Sequence[Message]) -> list[int]:
    try:
        return tokenizer.chat(list(turns))
    except UsageError as error:
        hint = error.hint or "a chat begins with a system message here; --protocol base asks in plain text"
        raise UsageError(error.what, where=error.where, hint=hint) from error
