"""Ask an OpenAI-compatible server for answers, several at a time, with retries."""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qwenq.errors import QwenqError, UsageError
from qwenq.evals.task import (
    CLOSE,
    OPEN,
    Answer,
    Choose,
    Chosen,
    Item,
    ProtocolName,
    Request,
    Write,
    Written,
)
from qwenq.events import Listener, Notice, silent
from qwenq.http import (
    RefusedError,
    Server,
    ServerState,
    checked_address,
    checked_key,
    concerns_logprobs,
    served_model,
)
from qwenq.models.identity import served_identity
from qwenq.results import Model
from qwenq.stopping import asked

# Chats go to ``/chat/completions``, plain text to ``/completions`` (vLLM, SGLang and llama.cpp serve both).
# Only a whole reply counts, once; `qwenq.http` retries what fails for now.


CONCURRENCY = 8  # requests under way at a time, by default
STOPS = 4  # strings that OpenAI's interface takes; all are looked for again here
SEED = 0  # of answers that a server samples
PENALTY = "repetition_penalty"
"""No part of OpenAI's interface, but vLLM and SGLang take it; by default they use the model's
generation_config.json, which has 1.1 in Qwen's chat models."""


@dataclass(frozen=True)
class Reply:
    """A whole answer with the facts that are recorded."""

    answer: Answer  # a text, cut before what stops it, or the log probabilities of continuations
    prompt_tokens: int  # of the prompt, as they were counted; 0: unknown, as the text's tokens may be
    how: str = ""  # the code that ran, or the way in which a server scored letters


@dataclass(frozen=True)
class RemoteModel:
    """A model that a server runs; weights and settings are unknown, so it is compared with no base here."""

    server: Server
    name: str  # there
    concurrency: int = CONCURRENCY  # requests under way at a time
    # sent as ``enable_thinking`` for the chat template; None: left to the server
    thinking: bool | None = None
    quantised: ClassVar[bool] = False
    base: ClassVar[str | None] = None
    protocol: ClassVar[ProtocolName] = "card"
    settings: ClassVar[dict[str, str]] = {
        "dtype": "unknown",
        "device": "served",
        "engine": "served",
        "attention": "unknown",
        "kernel": "unknown",
    }

    @property
    def url(self) -> str:
        """Return the server's address, up to and with ``/v1``."""
        return self.server.url

    @property
    def model(self) -> Model:
        """Return its identity in rows of results."""
        return served_identity(self.url, self.name)

    def generation(self, thinking: bool) -> str:
        """Return a phrase on how answers are generated, as far as the server follows the request."""
        if thinking:
            return f"sampled by the server's own settings, seed {SEED} where it takes it"
        return "greedy, repetition penalty 1 where the server takes it"

    @property
    def key(self) -> dict[str, Any]:
        """Return everything of it that an answer depends on, as far as it is known."""
        key = {"endpoint": self.url, "model": self.name, PENALTY: 1}
        return key if self.thinking is None else {**key, "enable_thinking": self.thinking}

    def unload(self) -> None:
        """Free nothing: no weights are loaded here."""

    def respond(
        self, items: Sequence[Item], requests: Sequence[Request], batch: int | None, thinking: bool
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Yield answers as they arrive, each with its place among the items.

        The server has its own batches, and was asked to think or not when it was opened.

        Raises:
            UsageError: a request to score continuations of a chat, before any request is sent; or the server
                gives no log probabilities.
            QwenqError: the server refused, or did not answer.
        """
        del batch, thinking
        for item, request in zip(items, requests, strict=True):
            if isinstance(request, Choose) and not isinstance(request.prompt, str):
                raise UsageError(
                    "this protocol scores continuations of a chat, which no server does",
                    where=item.id,
                    hint="use another protocol, or a task with generated answers: gsm8k, humaneval",
                )
        what = f"{self.name} served at {self.url}"
        for index, reply in self.ask_all(requests):
            yield [(index, replace(reply, how=f"{what}, {reply.how}" if reply.how else what))]

    def ask(self, request: Request) -> Reply:
        """Return one answer: a text decoded greedily, or scores of letters."""
        if isinstance(request, Choose):
            return score_letters(self, request)
        body: dict[str, Any] = {
            "model": self.name,
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "stream": False,
        }
        if request.until:
            body["stop"] = list(request.until[:STOPS])
        if isinstance(request.prompt, str):
            found = self.without_penalty("/completions", {**body, "prompt": request.prompt})
            return self._read(found, request)
        turns = [dict(message) for message in request.prompt]
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        if self.thinking:  # greedy thoughts repeat themselves: Qwen advises against them
            del body["temperature"]
            body["seed"] = SEED
        found = self.without_penalty("/chat/completions", {**body, "messages": turns})
        return self._read(found, request)

    def without_penalty(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply without repetition penalty; a server that refuses the option applies none."""
        if PENALTY in self.server.state.unknown:
            return self.server.ask(path, body)
        try:
            return self.server.ask(path, {**body, PENALTY: 1.0})
        except RefusedError as refused:
            if not refused.concerns(PENALTY):
                raise
            found = self.server.ask(path, body)
            self.server.state.lacks(PENALTY, self.url)
            return found

    def ask_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield every answer as it arrives, as (index, reply), ``concurrency`` at a time.

        After SIGTERM (see ``stopping.finishing``), or an error, no further requests are sent.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(requests)):
            waiting.put(index)
        ended: queue.SimpleQueue[tuple[int, Reply | BaseException] | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set() and not asked():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    break
                try:
                    ended.put((index, self.ask(requests[index])))
                except BaseException as error:  # raised in the thread that consumes the answers
                    ended.put((index, error))
            ended.put(None)

        working = min(self.concurrency, len(requests))
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()  # a silent server must not hold up the exit
        try:
            while working:
                reply = ended.get()
                if reply is None:
                    working -= 1
                    continue
                index, found = reply
                if isinstance(found, QwenqError) and asked():
                    continue  # it is asked again by the next run
                if isinstance(found, BaseException):
                    raise found
                yield index, found
        finally:
            stop.set()

    def _read(self, found: dict[str, Any], request: Write) -> Reply:
        try:
            choice = found["choices"][0]
            message = choice.get("message")
            text = choice["text"] if message is None else message["content"]
            if self.thinking and message is not None:
                text = _with_thoughts(message)
            usage = found.get("usage") or {}
            if not isinstance(text, str | None):
                raise TypeError("its text is no text")
            counts = [int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens")]
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise QwenqError(
                f"a reply without an answer: {json.dumps(found)[:200]}",
                where=self.url,
                hint="is this an OpenAI-compatible server?",
            ) from error
        text = text or ""  # nothing was said: null
        places = [place for end in request.until if end and (place := text.find(end)) >= 0]
        stopped = bool(places) or choice.get("finish_reason") != "length"  # for an end there are many words
        return Reply(Written(text[: min(places)] if places else text, counts[0], stopped), counts[1])


def _with_thoughts(message: dict[str, Any]) -> Any:
    """Return the text as the model wrote it; some servers separate thoughts and answer."""
    content = message["content"]
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(thoughts, str) or not isinstance(content, str | None):
        return content
    return f"{OPEN}{thoughts}{CLOSE}\n{content}" if content else f"{OPEN}{thoughts}"


def open_served(
    url: str,
    name: str | None,
    key: str | None,
    thinking: str = "off",
    concurrency: int | None = None,
    listener: Listener = silent,
) -> RemoteModel:
    """Return the model at ``http://HOST/v1``, after one request for those that are served there.

    Without a name it is the only one. A request that has failed and is retried is a notice. With ``thinking``
    auto the server decides.
    """
    server = Server(checked_address(url), checked_key(key), state=ServerState(listener))
    name = served_model(server, name)
    if thinking == "auto":
        listener(Notice("the server decides whether this model thinks; --thinking on or off asks for one"))
    wanted = None if thinking == "auto" else thinking == "on"
    return RemoteModel(server, name, concurrency or CONCURRENCY, wanted)


# Score the continuations of a prompt by a server's log probabilities: letters of questions with options.
#
# ``/completions`` gives them in two ways:
#
# - **top**: ``logprobs`` lists the likeliest next tokens. One request scores all letters of a question, if
#   each is a token of the list. vLLM lists 20 by default; llama.cpp lists as many as are asked for, so a
#   longer list is asked for where a letter is missing.
# - **echo**: ``echo`` with ``logprobs`` returns the log probability of each token of the text (in vLLM: its
#   ``prompt_logprobs``). It takes a request for each continuation, and scores any number of tokens.
#
# Both are the log softmax over the vocabulary that ``evals.answering`` computes, so the scores are those of
# our engine up to the server's dtype. Nothing is guessed: a letter that neither way scores is an error.


TOPS = (20, 2000)
"""Tokens to list: what vLLM allows by default, then enough for letters that are unlikely."""
TOP, ECHO = "letters by the likeliest tokens", "letters by echoed log probabilities"


class _Absent(Exception):  # noqa: N818  no error yet
    """A way is not open: why."""


def score_letters(served: RemoteModel, request: Choose) -> Reply:
    """Return the log probability of each continuation of a plain prompt."""
    prompt = request.prompt
    if not isinstance(prompt, str):
        raise TypeError("a chat has no continuations")
    reasons: list[str] = []
    letters = all(len(choice.strip()) == 1 for choice in request.choices)
    for top in TOPS if letters else ():
        try:
            return _from_top(served, prompt, request.choices, top)
        except _Absent as absent:
            reasons.append(str(absent))
    try:
        return _from_echo(served, prompt, request.choices)
    except _Absent as absent:
        reasons.append(str(absent))
    raise UsageError(
        f"this server does not score {', '.join(map(repr, request.choices))}: {'; '.join(reasons)}",
        where=served.url,
        hint="a protocol of letters needs logprobs of /completions, as vLLM and llama.cpp's server give them "
        "(llama-cpp-python with --logits_all true); else use --protocol card, which reads generated answers",
    )


def _from_top(served: RemoteModel, prompt: str, choices: Sequence[str], top: int) -> Reply:
    """Return the log probabilities of continuations that are among the likeliest tokens."""
    reply, choice = _complete(served, prompt, {"logprobs": top}, f"logprobs={top}")
    listed = _likeliest(choice.get("logprobs"))
    if not listed:
        raise _Absent("its replies hold no logprobs")
    missing = [letter for letter in choices if letter not in listed]
    if missing:
        raise _Absent(f"{missing[0]!r} is not among the {len(listed)} likeliest tokens that it lists")
    return Reply(Chosen(tuple(listed[letter] for letter in choices), ()), _prompt_tokens(reply), TOP)


def _from_echo(served: RemoteModel, prompt: str, choices: Sequence[str]) -> Reply:
    """Return the log probabilities of continuations from those of all tokens of a text."""
    found: list[float] = []
    before: list[str] | None = None
    count = 0
    for continuation in choices:
        more = {"echo": True, "logprobs": 1}
        reply, choice = _complete(served, prompt + continuation, more, "echo with logprobs")
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
    return Reply(Chosen(tuple(found), ()), count, ECHO)


def _complete(
    served: RemoteModel, prompt: str, more: Mapping[str, Any], option: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the reply to a request for one token, and its only choice; a refused option is sent once."""
    if option in served.server.state.unknown:
        raise _Absent(f"it refuses {option}")
    body = {"model": served.name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": False}
    try:
        reply = served.without_penalty("/completions", {**body, **more})
    except RefusedError as error:
        if not concerns_logprobs(error.what):
            raise
        served.server.state.unknown |= {option}
        raise _Absent(f"it refuses {option}") from error
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise QwenqError(
            "a reply without an answer", where=served.url, hint="is this an OpenAI-compatible server?"
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
