"""Score the continuations of a prompt by a server's log probabilities: letters of questions with options.

``/completions`` gives them in two ways:

- **top**: ``logprobs`` lists the likeliest next tokens. One request scores all letters of a question, if each
  is a token of the list. vLLM lists 20 by default; llama.cpp lists as many as are asked for, so a longer list
  is asked for where a letter is missing.
- **echo**: ``echo`` with ``logprobs`` returns the log probability of each token of the text (in vLLM: its
  ``prompt_logprobs``). It takes a request for each continuation, and scores any number of tokens.

Both are the log softmax over the vocabulary that ``evals.scoring`` computes, so the scores are those of our
engine up to the server's dtype. Nothing is guessed: a letter that neither way scores is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenq.errors import QwenqError, UsageError
from qwenq.evals.endpoint import Endpoint, RefusedError, concerns_logprobs
from qwenq.evals.task import Choose, Chosen

TOPS = (20, 2000)
"""Tokens to list: what vLLM allows by default, then enough for letters that are unlikely."""
TOP, ECHO = "letters by the likeliest tokens", "letters by echoed log probabilities"


@dataclass(frozen=True)
class Scored:
    """Answer to a request to choose.

    Attributes:
        chosen: log probabilities of the continuations.
        prompt_tokens: of the prompt, as the server counted them; 0 if it did not.
        how: the way in which they were found.
    """

    chosen: Chosen
    prompt_tokens: int
    how: str


class _Absent(Exception):  # noqa: N818  no error yet
    """A way is not open: why."""


def score_letters(endpoint: Endpoint, request: Choose) -> Scored:
    """Return the log probability of each continuation of a plain prompt.

    Raises:
        UsageError: the server gives no log probabilities, or not those of all continuations.
        QwenqError: it refused the request, or every attempt failed.
    """
    prompt = request.prompt
    if not isinstance(prompt, str):
        raise TypeError("a chat has no continuations")
    reasons: list[str] = []
    letters = all(len(choice.strip()) == 1 for choice in request.choices)
    for top in TOPS if letters else ():
        try:
            return _from_top(endpoint, prompt, request.choices, top)
        except _Absent as absent:
            reasons.append(str(absent))
    try:
        return _from_echo(endpoint, prompt, request.choices)
    except _Absent as absent:
        reasons.append(str(absent))
    raise UsageError(
        f"this server does not score {', '.join(map(repr, request.choices))}: {'; '.join(reasons)}",
        where=endpoint.url,
        hint="a protocol of letters needs logprobs of /completions, as vLLM and llama.cpp's server give them "
        "(llama-cpp-python with --logits_all true); else use --protocol card, which reads generated answers",
    )


def _from_top(endpoint: Endpoint, prompt: str, choices: Sequence[str], top: int) -> Scored:
    """Return the log probabilities of continuations that are among the likeliest tokens."""
    reply, choice = _complete(endpoint, prompt, {"logprobs": top}, f"logprobs={top}")
    listed = _likeliest(choice.get("logprobs"))
    if not listed:
        raise _Absent("its replies hold no logprobs")
    missing = [letter for letter in choices if letter not in listed]
    if missing:
        raise _Absent(f"{missing[0]!r} is not among the {len(listed)} likeliest tokens that it lists")
    return Scored(Chosen(tuple(listed[letter] for letter in choices), ()), _prompt_tokens(reply), TOP)


def _from_echo(endpoint: Endpoint, prompt: str, choices: Sequence[str]) -> Scored:
    """Return the log probabilities of continuations from those of all tokens of a text."""
    found: list[float] = []
    before: list[str] | None = None
    count = 0
    for continuation in choices:
        more = {"echo": True, "logprobs": 1}
        reply, choice = _complete(endpoint, prompt + continuation, more, "echo with logprobs")
        tokens, scores = _echoed(choice.get("logprobs"))
        begins, ends = _span(tokens, continuation)
        if before is not None and tokens[:begins] != before:
            raise _Absent("its tokens of the prompt change with what follows it")
        before = tokens[:begins]
        values = scores[begins:ends]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise _Absent("it echoes tokens without their log probabilities")
        found.append(float(sum(value for value in values if value is not None)))
        count = max(0, _prompt_tokens(reply) - (ends - begins))
    return Scored(Chosen(tuple(found), ()), count, ECHO)


def _complete(
    endpoint: Endpoint, prompt: str, more: Mapping[str, Any], option: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the reply to a request for one token, and its only choice; a refused option is sent once."""
    if option in endpoint.trouble.unknown:
        raise _Absent(f"it refuses {option}")
    body = {"model": endpoint.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": False}
    try:
        reply = endpoint.without_penalty("/completions", {**body, **more})
    except RefusedError as error:
        if not concerns_logprobs(error.what):
            raise
        endpoint.trouble.unknown |= {option}
        raise _Absent(f"it refuses {option}") from error
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise QwenqError(
            "a reply without an answer", where=endpoint.url, hint="is this an OpenAI-compatible server?"
        )
    return reply, choices[0]


def _likeliest(logprobs: object) -> dict[str, float]:
    """Return log probability by text of the first new token's rivals, in OpenAI's older or newer form."""
    if not isinstance(logprobs, dict):
        return {}
    content, tops = logprobs.get("content"), logprobs.get("top_logprobs")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        listed = content[0].get("top_logprobs")
        rivals = listed if isinstance(listed, list) else []
        pairs = [(one.get("token"), one.get("logprob")) for one in rivals if isinstance(one, dict)]
    elif isinstance(tops, list) and tops and isinstance(tops[0], dict):
        pairs = list(tops[0].items())
    else:
        return {}
    found: dict[str, float] = {}
    for text, value in pairs:
        if isinstance(text, str) and isinstance(value, int | float) and math.isfinite(value):
            found[text] = max(float(value), found.get(text, -math.inf))
    return found


def _echoed(logprobs: object) -> tuple[list[str], list[float | None]]:
    """Return the texts of all tokens and their log probabilities; the first has none."""
    if not isinstance(logprobs, dict):
        raise _Absent("its replies to echo hold no logprobs")
    tokens, scores = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(scores, list) or len(tokens) != len(scores):
        raise _Absent("its replies to echo hold no log probability for each token")
    return [str(token) for token in tokens], scores


def _span(tokens: Sequence[str], continuation: str) -> tuple[int, int]:
    """Return where the continuation's tokens begin and end: last, or before the generated token."""
    for end in (len(tokens) - 1, len(tokens)):
        text, begin = "", end
        while begin > 0 and len(text) < len(continuation):
            begin -= 1
            text = tokens[begin] + text
        if text == continuation and begin > 0:
            return begin, end
    raise _Absent(f"no token of its echo begins where {continuation!r} does")


def _prompt_tokens(reply: Mapping[str, Any]) -> int:
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else 0
