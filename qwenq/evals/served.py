"""A model that somebody else serves, through the same tasks, records and rows as one that is loaded here."""

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
    """An answer, with what a record says beside it.

    Attributes:
        index: which of the items that were asked together.
        answer: what came back.
        prompt_tokens: tokens of the prompt; 0: nobody said.
        implementation: exactly what ran, as far as that is known.
    """

    index: int
    answer: Answer
    prompt_tokens: int
    implementation: str


@dataclass(frozen=True)
class Served:
    """An endpoint in the place of a ``Contender``.

    Nobody here has seen its weights: its fingerprint is that of the address and the name, its precision is
    ``served``. Its family is its name less ``-GPTQ-Int4`` and the like, so that `qwenq compare` pairs a model
    with its base that is served elsewhere.

    Attributes:
        endpoint: where it is.
        quantised: nobody knows; it is compared with nothing.
        protocol: chats, unless the user says otherwise.
        how: nor is it known how it is run.
    """

    endpoint: Endpoint
    quantised: ClassVar[bool] = False
    protocol: ClassVar[ProtocolName] = "card"
    how: ClassVar[How] = How("served", "unknown", "served", "unknown", "unknown")

    @property
    def model(self) -> Model:
        """What rows say of it."""
        named = f"{self.endpoint.url} {self.endpoint.model}"
        digest = hashlib.sha256(named.encode()).hexdigest()[:16]
        name = self.endpoint.model.rsplit("/", 1)[-1]
        return Model(name, f"endpoint:{digest}", "served", family_name(name))

    @property
    def thinking(self) -> bool:
        """Whether it was asked to think; where nothing was asked, its server decides."""
        return self.endpoint.thinking is True

    def generation(self, thinking: bool) -> str:
        """How it writes, as far as a server heeds what it is asked."""
        if thinking:
            return f"sampled by the server's own settings, seed {SEED} where it takes it"
        return "greedy, repetition penalty 1 where the server takes it"

    @property
    def key(self) -> dict[str, Any]:
        """What of it decides an answer, as far as that is known."""
        key = {"endpoint": self.endpoint.url, "model": self.endpoint.model, PENALTY: 1}
        asked = self.endpoint.thinking
        return key if asked is None else {**key, "enable_thinking": asked}

    def unload(self) -> None:
        """Nothing is held here."""

    def respond(self, items: Sequence[Item], requests: Sequence[Request]) -> Iterator[Response]:
        """Answers as they come.

        Raises:
            UsageError: a request to score continuations, which no server does; nothing has been asked then.
            QwenqError: the server refused, or did not answer.
        """
        writes = [request for request in requests if isinstance(request, Write)]
        if len(writes) < len(requests):
            unfit = next(
                item for item, one in zip(items, requests, strict=True) if not isinstance(one, Write)
            )
            raise UsageError(
                "this protocol scores given continuations, and a server only writes",
                where=unfit.id,
                hint="use --protocol card, or a task that writes: gsm8k, humaneval",
            )
        what = f"{self.endpoint.model} served at {self.endpoint.url}"
        for index, reply in self.endpoint.ask_all(writes):
            yield Response(index, reply.written, reply.prompt_tokens, what)


Contestant = Contender | Served
"""Whoever is asked."""
