"""Open a model that is evaluated: a checkpoint that is loaded here, or one that a server runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from qwenq.errors import QwenqError, UsageError
from qwenq.evals.answering import generate_answers, score_choices
from qwenq.evals.batching import (
    ChoiceTokens,
    RequestTokens,
    WriteTokens,
    budget_for,
    encode_requests,
    require_context,
)
from qwenq.evals.endpoint import RemoteModel, Reply
from qwenq.evals.task import Answer, Item, ProtocolName, Request
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.gptq_config import is_quantised
from qwenq.models.identity import base_of, result_model
from qwenq.models.machine import resolve_device
from qwenq.models.opening import resolve_model
from qwenq.models.random_weights import refuse_random
from qwenq.models.tokenizer import Tokenizer, load_tokenizer
from qwenq.results import Model
from qwenq.runtime.engine import Engine, find_attention, find_dtype, load
from qwenq.runtime.sampling import GREEDY, Sampling, protocol_sampling

# Choose whether a model thinks before it answers.


MAX_NEW_TOKENS = 32_768
"""Tokens of thoughts and answer, the output length that Qwen3's model cards recommend for most queries."""


class Thinking(NamedTuple):
    """Whether a model thinks before it answers a chat, and its tokenizer with ``enable_thinking`` set.

    The notice is of a choice that the user did not make, else empty.
    """

    tokenizer: Tokenizer
    on: bool
    notice: str = ""


def choose_thinking(tokenizer: Tokenizer, wish: str) -> Thinking:
    """Choose whether a model thinks, by the user's ``--thinking`` and the abilities of its chat template.

    ``auto`` asks for answers without thoughts where the template has the switch.
    """
    kind = tokenizer.thinking
    if kind == "switch":
        notice = "this model can think before it answers; --thinking auto asks it not to (enable_thinking is "
        notice += "false in its chat template), as the card's tasks have a budget for answers only"
        return Thinking(tokenizer.with_thinking(wish == "on"), wish == "on", notice if wish == "auto" else "")
    if wish == "off" and kind == "always":
        raise UsageError(
            "this model's chat template opens <think> in every prompt: it cannot be asked not to think",
            where="--thinking",
            hint="use auto or on, with --max-new-tokens for the budget",
        )
    if wish == "on" and kind == "never":
        raise UsageError(
            "this model's chat template does not support thinking: it does not read enable_thinking",
            where="--thinking",
            hint="use auto or off",
        )
    notice = "this model's chat template opens <think> in every prompt: it thinks before each answer"
    return Thinking(tokenizer, kind == "always", notice if kind == "always" and wish == "auto" else "")


# Open a checkpoint that is evaluated; its weights are loaded on first use.


_SAME_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class LoadOptions:
    """Settings for loading a model, as on the command line."""

    device: str = "auto"
    dtype: str = "auto"
    engine: str = "fast"
    attention: str = "auto"
    kernel: str = "auto"
    thinking: str = "auto"


@dataclass
class LocalModel:
    """A checkpoint that is evaluated on this machine."""

    checkpoint: Checkpoint  # where its weights are
    model: Model  # its identity in rows of results
    tokenizer: Tokenizer
    how: LoadOptions  # settings that it runs with; device, dtype and attention are resolved, not ``auto``
    notices: list[str] = field(default_factory=list)  # lines for the user
    # fingerprint of the model that it was quantised from, where known, see ``assign_bases``
    base: str | None = None
    thinking: bool | None = None  # whether it thinks before it answers a chat; None: it never does
    thinking_notice: str = ""  # on a choice that the user did not make, for chats

    @property
    def quantised(self) -> bool:
        """Return whether its weights were quantised, here or by another tool."""
        return is_quantised(self.checkpoint.config) or self.checkpoint.foreign is not None

    @cached_property
    def protocol(self) -> ProtocolName:
        """Return the default protocol: ``card`` for a chat model, else ``base``.

        It is computed on first use: the process that renders chats takes seconds to start.
        """
        return "card" if is_chat_model(self.tokenizer) else "base"

    @property
    def sampling(self) -> tuple[Sampling, str]:
        """Return how tokens are drawn while it thinks, by its generation_config.json, and a phrase for it."""
        return protocol_sampling(self.checkpoint)

    def generation(self, thinking: bool) -> str:
        """Return a phrase on how answers are generated."""
        return self.sampling[1] if thinking else "greedy, repetition penalty 1"

    @property
    def settings(self) -> dict[str, str]:
        """Return what it runs with, by name."""
        return {
            name: getattr(self.how, name) for name in ("dtype", "device", "engine", "attention", "kernel")
        }

    @cached_property
    def engine(self) -> Engine:
        """Load the model on first use; raises as `runtime.engine.load`."""
        return load(self.checkpoint, **self.settings, real_vocab=self.tokenizer.vocab_size)

    def unload(self) -> None:
        """Free the memory."""
        if self.__dict__.pop("engine", None) is not None and self.how.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @property
    def key(self) -> dict[str, Any]:
        """Return everything of it that an answer depends on: weights, tokenizer, settings."""
        return {
            "model": self.model.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "stop_ids": list(self.tokenizer.eos_ids),
            **self.settings,
            "device": self.how.device.split(":", 1)[0],
        }

    def respond(
        self, items: Sequence[Item], requests: Sequence[Request], batch: int | None, thinking: bool
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Return an iterator of answers, in batches and with their places; the model is loaded before it.

        Letters come first, a batch at a time, then texts, one by one; ``batch`` rows at once, else what fits.
        """
        encoded = encode_requests(self.tokenizer, items, requests)
        require_context(encoded, self.engine.context)  # before the first is asked
        return self._answers(encoded, batch, self.sampling[0] if thinking else GREEDY)

    def _answers(
        self, encoded: Sequence[RequestTokens], batch: int | None, sampling: Sampling
    ) -> Iterator[list[tuple[int, Reply]]]:
        engine = self.engine
        letters = {i: one for i, one in enumerate(encoded) if isinstance(one, ChoiceTokens)}
        texts = {i: one for i, one in enumerate(encoded) if isinstance(one, WriteTokens)}

        def reply(index: int, answer: Answer) -> tuple[int, Reply]:
            return index, Reply(answer, len(encoded[index].prompt), engine.implementation)

        if letters:
            places = list(letters)
            for found in score_choices(engine, list(letters.values()), budget_for(engine, batch)):
                yield [reply(places[place], chosen) for place, chosen in found]
        if texts:
            places = list(texts)
            budgets = budget_for(engine, batch, decode=True), budget_for(engine, batch)
            for place, written in generate_answers(
                engine, self.tokenizer, list(texts.values()), self.tokenizer.eos_ids, *budgets, sampling
            ):
                yield [reply(places[place], written)]


def open_eval_model(given: str | None, how: LoadOptions) -> LocalModel:
    """Open a model to evaluate: a folder, a hub id, or None for the bundled model."""
    place = resolve_device(how.device)
    number = find_dtype(how.dtype, place, how.engine)
    resolved = resolve_model(given)
    checkpoint = open_checkpoint(resolved.folder)
    refuse_random(checkpoint.config, "accuracy")
    thinking = choose_thinking(load_tokenizer(resolved.folder), how.thinking)
    return LocalModel(
        checkpoint,
        result_model(checkpoint, number, given),
        thinking.tokenizer,
        replace(
            how,
            device=str(place),
            dtype=str(number).removeprefix("torch."),
            attention=find_attention(how.attention, how.engine, place),
        ),
        [*resolved.notices, *checkpoint.notices],
        base_of(checkpoint.folder).get("fingerprint"),
        None if thinking.tokenizer.thinking == "never" else thinking.on,
        thinking.notice,
    )


def is_chat_model(tokenizer: Tokenizer) -> bool:
    """Return whether the model is a chat model: its chat template ends a turn with an end id.

    Base models of Qwen2.5 have the template as well, but generation does not end at ``<|im_end|>``.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        ids = tokenizer.chat(turns, add_generation_prompt=False)
    except QwenqError:
        return False
    return any(token in tokenizer.eos_ids for token in ids[-3:])


def assign_bases(eval_models: Sequence[LocalModel], recorded: Sequence[Model] = ()) -> list[str]:
    """Set base and family of each quantised model; return notices for the user.

    The base is the model whose fingerprint the manifest names, and no other. Without one it is the model of
    the same family name, else the only unquantised one, if it has the same shape, with a notice.

    Args:
        eval_models: the models of this run.
        recorded: unquantised models that the run folder has rows of; they need not be named again.
    """
    notes = []
    bases = [eval_model for eval_model in eval_models if not eval_model.quantised]
    quantised = [eval_model for eval_model in eval_models if eval_model.quantised]
    for eval_model in sorted(quantised, key=lambda one: one.checkpoint.foreign is None):  # sources first
        notes += _base_of_source(eval_model, quantised)
        base, note = _base_among(eval_model, bases, recorded)
        notes += [note] if note else []
        if base is not None:
            eval_model.base = base.fingerprint
            eval_model.model = replace(eval_model.model, family=base.family)
    return notes


def _base_among(
    eval_model: LocalModel, bases: Sequence[LocalModel], recorded: Sequence[Model]
) -> tuple[Model | None, str]:
    """Return the base, if it is among the models, and a notice."""
    name, family = eval_model.model.name, eval_model.model.family
    given = [base.model for base in bases]
    called = [model for model in (*given, *recorded) if model.family == family]
    absent = f"no base of {name} is among the models: it is not compared" if bases else ""
    if eval_model.base is not None:
        same = [model for model in (*given, *recorded) if model.fingerprint == eval_model.base]
        changed = f"{name} was made from other weights than {family} has: the base has changed since, "
        return (same[0], "") if same else (None, f"{changed}and it is not compared" if called else absent)
    called = [model for model in given if model.family == family] or called
    if len({model.fingerprint for model in called}) > 1:
        return None, f"several models are called {family}, and nothing says which {name} was made from"
    if called:
        return called[0], ""
    configs = [one.checkpoint.config for one in (*bases, eval_model)]
    if len(bases) == 1 and all(configs[0].get(name) == configs[1].get(name) for name in _SAME_SHAPE):
        return given[0], f"nothing says what {name} was made from: it is compared with {given[0].name}"
    return None, absent


def _base_of_source(eval_model: LocalModel, quantised: Sequence[LocalModel]) -> list[str]:
    """Take the base of the model that this one was made from, where that is itself quantised (FP8)."""
    sources = (other for other in quantised if other is not eval_model)
    source = next((other for other in sources if other.model.fingerprint == eval_model.base), None)
    if source is None:
        return []
    eval_model.base, eval_model.model = source.base, replace(eval_model.model, family=source.model.family)
    compared = "name the base of both" if source.base is None else "both are compared with its base"
    return [
        f"{eval_model.model.name} was made from {source.model.name}, which is quantised itself: {compared}"
    ]


def bases_first(eval_models: Sequence[EvalModel]) -> list[EvalModel]:
    """Return unquantised models first, else in the order given."""
    return sorted(eval_models, key=lambda eval_model: eval_model.quantised)


EvalModel = LocalModel | RemoteModel
"""A model that is evaluated, here or on a server."""
