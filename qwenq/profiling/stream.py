"""Stream one completion from an OpenAI-compatible server; time and count its tokens."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from qwenq.errors import QwenqError
from qwenq.http import ATTEMPTS, BUSY, LONGEST_PAUSE, Again, RefusedError, Server, backoff_seconds

OPTIONS: dict[str, Any] = {"stream_options": {"include_usage": True}, "ignore_eos": True}
"""Options that a server may refuse: then they are left out, with a notice. ``ignore_eos`` is vLLM's and
SGLang's; a server that does not know it may also pass over it."""
LONGEST_LINE = 1 << 20  # bytes of an event
LONGEST_REQUEST = 600.0  # seconds of an answer that trickles
_FIT = 3  # requests that look for a prompt of the length that was asked for
_WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not",
    "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you",
    "were", "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will",
    "no", "more", "if", "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can",
    "only", "other", "time", "new", "some",
)  # fmt: skip
"""Words that are one token, with the space before them, in the usual vocabularies."""

Counted = Literal["usage", "chunks", "contradicted"]


@dataclass(frozen=True)
class Answer:
    """A streamed answer."""

    first: float  # seconds from sending the request to the first text, connecting included
    gaps: tuple[float, ...]  # seconds between a chunk with text and the next
    tokens: int  # of the answer
    # the source of ``tokens``: the server's ``usage``; chunks, where it sends none; or chunks, where its
    # usage contradicts them or the request
    counted: Counted
    prompt_tokens: int | None  # by usage; None without
    refused: int = 0  # attempts that the server was too busy for


class StoppedError(Exception):
    """The request was given up because the measurement ends."""


def words(count: int, seed: str) -> str:
    """Return a prompt of common words in random order: no two prompts share a prefix that a server caches."""
    return " ".join(random.Random(seed).choices(_WORDS, k=count))  # noqa: S311


def fit_words(server: Server, model: str, tokens: int, seed: str) -> tuple[int, int | None]:
    """Return how many words make a prompt of so many tokens, and the tokens that the server counts in them.

    The count is None where the server reports no usage, or one that no vocabulary can have; then it is a word
    for a token.
    """
    count, counted = tokens, None
    for attempt in range(_FIT):
        body = {"model": model, "prompt": words(count, f"{seed}/{attempt}"), "max_tokens": 1}
        reply = server.ask("/completions", {**body, "temperature": 0, "stream": False})
        counted = _prompt_tokens(reply.get("usage"))
        if counted is None or not count / 4 <= counted <= 4 * count + 64:
            return tokens, None
        if counted == tokens:
            break
        if attempt < _FIT - 1:
            count = max(1, count + tokens - counted)
    return count, counted


def complete(server: Server, model: str, prompt: str, tokens: int, stop: threading.Event) -> Answer:
    """Return one answer of so many tokens; a server that is busy is asked again with backoff.

    A pause is a minute at most, whatever the server asks for: the measurement has to end.

    Raises:
        Again: it failed: no connection, an answer that stalls or breaks off, or a server that stays busy.
        QwenqError: the server refuses the request, or does not stream.
        StoppedError: ``stop`` was set.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    attempt = 1
    while True:
        asked = body | {key: value for key, value in OPTIONS.items() if key not in server.state.unknown}
        try:
            found = _answer(_events(server, asked, tokens, stop), tokens)
            server.state.passed()
            return replace(found, refused=attempt - 1)
        except RefusedError as refused:
            option = next((name for name in OPTIONS if name in asked and refused.concerns(name)), None)
            if option is None:
                raise
            server.state.lacks(option, server.url)
        except Again as again:
            if again.status not in BUSY or attempt == ATTEMPTS:
                raise
            attempt += 1
            seconds = min(backoff_seconds(attempt, server.pause, again.pause), LONGEST_PAUSE)
            server.state.failed(attempt - 1, f"{server.url}: {again}", seconds)
            if stop.wait(seconds):
                raise StoppedError from again


def _events(
    server: Server, body: dict[str, Any], tokens: int, stop: threading.Event
) -> list[tuple[float, bytes]]:
    """Return the data of each event with the seconds at which it came.

    Nothing is parsed before the end: that would delay the events of other requests.
    """
    began, found = time.perf_counter(), list[tuple[float, bytes]]()
    most = 4 * tokens + 64
    with server.opened("/completions", body) as response:
        if response.headers.get_content_type() != "text/event-stream":
            raise QwenqError(
                f"the server does not stream: it sends {response.headers.get_content_type()}",
                where=f"{server.url}/completions",
                hint="latency by token needs a server that knows the option stream",
            )
        while line := response.readline(LONGEST_LINE + 1):
            at = time.perf_counter() - began
            if stop.is_set():
                raise StoppedError
            if len(line) > LONGEST_LINE or len(found) > most:
                raise Again(f"it sends more than the {tokens} tokens that were asked for")
            if at > LONGEST_REQUEST:
                raise Again(f"an answer takes more than {LONGEST_REQUEST:.0f} s")
            if line.startswith(b"data:"):
                found.append((at, line[5:].strip()))
                if found[-1][1] == b"[DONE]":
                    break
    return found


def _answer(events: Sequence[tuple[float, bytes]], tokens: int) -> Answer:
    times: list[float] = []
    usage: Any = None
    ended = False
    for at, data in events:
        if data == b"[DONE]":
            ended = True
            continue
        chunk = _chunk(data)
        usage = chunk.get("usage") or usage
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict):
                times += [at] if choice.get("text") else []
                ended = ended or bool(choice.get("finish_reason"))
    if not ended:
        raise Again(f"the stream breaks off after {len(times)} chunks")
    if not times:
        raise Again("an answer without text")
    count, counted = _tokens(usage, len(times), tokens)
    gaps = tuple(after - before for before, after in pairwise(times))
    return Answer(times[0], gaps, count, counted, _prompt_tokens(usage))


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Again("a chunk is not JSON") from error
    if not isinstance(found, dict):
        raise Again("a chunk is not a JSON object")
    if failure := found.get("error"):
        said = failure.get("message") if isinstance(failure, dict) else failure
        raise Again(f"an error within the stream: {str(said)[:200]}")
    return found


def _tokens(usage: Any, chunks: int, asked: int) -> tuple[int, Counted]:
    """Return the tokens of an answer; a chunk with text holds at least one."""
    told = usage.get("completion_tokens") if isinstance(usage, dict) else None
    if told is None:
        return chunks, "chunks"
    plausible = isinstance(told, int) and not isinstance(told, bool) and chunks <= told <= asked
    return (told, "usage") if plausible else (chunks, "contradicted")


def _prompt_tokens(usage: Any) -> int | None:
    told = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return told if isinstance(told, int) and not isinstance(told, bool) and 0 < told < 2**31 else None
