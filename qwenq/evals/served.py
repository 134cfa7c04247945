"""Evaluate a model that a server runs, with the same tasks, records and rows as a local one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qwenq.errors import UsageError
from qwenq.evals.contender import Contender, How
from qwenq.evals.endpoint import PENALTY, SEED, Endpoint
from qwenq.evals.task import Answer, Item, ProtocolName, Request, Write
from qwenq.models.identity import family_name
from qwenq.results import Model


@dataclass(frozen=True)
class Response:
    """An answer with the facts that are recorded.

    Attributes:
        index: of the item among those asked together.
        answer: a text or scores.
        prompt_tokens: tokens of the prompt; 0: unknown.
        implementation: the code that ran, as far as it is known.
    """

    index: int
    answer: Answer
    prompt_tokens: int
    implementation: str


@dataclass(frozen=True)
class Served:
    """A model behind an endpoint.

    Its weights are unknown: its fingerprint is that of address and name, its precision ``served``. Its family
    is its name less ``-GPTQ-Int4`` and the like, so that `qwenq compare` pairs it with its served base.

    Attributes:
        endpoint: its server.
        quantised: unknown, so it is not compared with a base here.
        protocol: the default.
        how: unknown settings.
    """

    endpoint: Endpoint
    quantised: ClassVar[bool] = False
    protocol: ClassVar[ProtocolName] = "card"
    how: ClassVar[How] = How("served", "unknown", "served", "unknown", "unknown")

    @property
    def model(self) -> Model:
        """Return its identity in rows of results."""
        named = f"{self.endpoint.url} {self.endpoint.model}"
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        name = self.endpoint.model.rsplit("/", 1)[-1]
        return Model(name, f"endpoint:{digest}", "served", family_name(name))

    @property
    def thinking(self) -> bool:
        """Return whether it is asked to think; without a request its server decides."""
        return self.endpoint.thinking is True

    def generation(self, thinking: bool) -> str:
        """Return a phrase on how answers are generated, as far as the server follows the request."""
        if thinking:
            return f"sampled by the server's own settings, seed {SEED} where it takes it"
        return "greedy, repetition penalty 1 where the server takes it"

    @property
    def key(self) -> dict[str, Any]:
        """Return everything of it that an answer depends on, as far as it is known."""
        key = {"endpoint": self.endpoint.url, "model": self.endpoint.model, PENALTY: 1}
        asked = self.endpoint.thinking
        return key if asked is None else {**key, "enable_thinking": asked}

    def unload(self) -> None:
        """Free nothing: no weights are loaded here."""

    def respond(self, items: Sequence[Item], requests: Sequence[Request]) -> Iterator[Response]:
        """Yield answers as they arrive.

        Raises:
            UsageError: a request to score continuations; no request has been sent then.
            QwenqError: the server refused, or did not answer.
        """
        writes = [request for request in requests if isinstance(request, Write)]
        if len(writes) < len(requests):
            unfit = next(
                item for item, one in zip(items, requests, strict=True) if not isinstance(one, Write)
            )
            raise UsageError(
                "this protocol scores continuations, and a server only generates text",
                where=unfit.id,
                hint="use --protocol card, or a task with generated answers: gsm8k, humaneval",
            )
        what = f"{self.endpoint.model} served at {self.endpoint.url}"
        for index, reply in self.endpoint.ask_all(writes):
            yield Response(index, reply.written, reply.prompt_tokens, what)


Contestant = Contender | Served
"""A model that is evaluated, here or on a server."""
