"""A model that is evaluated: opened, named, and loaded only once something has to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from qwenq.errors import QwenqError, UsageError
from qwenq.evals.task import ProtocolName
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.gptq_config import is_quantised
from qwenq.models.identity import base_of, result_model
from qwenq.models.precision import resolve_device
from qwenq.models.random_weights import refuse_random
from qwenq.models.resolve import resolve_model
from qwenq.models.tokenizer import Tokenizer, load_tokenizer
from qwenq.results import Model
from qwenq.runtime.engine import Engine, find_dtype, load


class _Comparable(Protocol):
    @property
    def quantised(self) -> bool: ...


T = TypeVar("T", bound=_Comparable)
_SAME_SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class How:
    """How models are run: names as on the command line."""

    device: str = "auto"
    dtype: str = "auto"
    engine: str = "fast"
    attention: str = "sdpa"
    kernel: str = "auto"


@dataclass
class Contender:
    """One model.

    Attributes:
        checkpoint: where its weights are.
        model: what rows of results say of it.
        tokenizer: its own.
        how: how it is run; ``device`` and ``dtype`` are the real ones, not ``auto``.
        notices: what the user has to be told of it.
    """

    checkpoint: Checkpoint
    model: Model
    tokenizer: Tokenizer
    how: How
    notices: list[str] = field(default_factory=list)

    @property
    def quantised(self) -> bool:
        """Whether it holds packed integers."""
        return is_quantised(self.checkpoint.config)

    @cached_property
    def protocol(self) -> ProtocolName:
        """What it is asked by default: ``card`` for a chat model, else ``base``.

        Found out when it is needed: chats are rendered in a process that takes seconds to start.
        """
        return "card" if answers_chats(self.tokenizer) else "base"

    @cached_property
    def engine(self) -> Engine:
        """Loaded on first use.

        Raises:
            QwenqError: as `runtime.engine.load`.
        """
        return load(
            self.checkpoint,
            device=self.how.device,
            dtype=self.how.dtype,
            engine=self.how.engine,
            attention=self.how.attention,
            kernel=self.how.kernel,
            real_vocab=self.tokenizer.vocab_size,
        )

    def unload(self) -> None:
        """Give the memory back."""
        if self.__dict__.pop("engine", None) is not None and self.how.device.startswith("cuda"):
            torch.cuda.empty_cache()

    @property
    def key(self) -> dict[str, Any]:
        """What of it decides an answer: weights, tokenizer, how it is run."""
        return {
            "model": self.model.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "stop_ids": list(self.tokenizer.eos_ids),
            "dtype": self.how.dtype,
            "device": self.how.device.split(":", 1)[0],
            "engine": self.how.engine,
            "attention": self.how.attention,
            "kernel": self.how.kernel,
        }


def open_contender(given: str | None, how: How) -> Contender:
    """Open a model to evaluate.

    Args:
        given: a folder, a hub id, or None for the bundled model.
        how: as the user said.

    Raises:
        UsageError: no such model, device or dtype; random weights.
        QwenqError: the model or its tokenizer cannot be read.
    """
    place = resolve_device(how.device)
    number = find_dtype(how.dtype, place)
    resolved = resolve_model(given)
    checkpoint = open_checkpoint(resolved.folder)
    refuse_random(checkpoint.config, "accuracy")
    tokenizer = load_tokenizer(resolved.folder)
    return Contender(
        checkpoint,
        result_model(checkpoint, number, given),
        tokenizer,
        replace(how, device=str(place), dtype=str(number).removeprefix("torch.")),
        [*resolved.notices, *checkpoint.notices],
    )


def answers_chats(tokenizer: Tokenizer) -> bool:
    """Whether the model was taught to answer: it has a chat template whose turns end with an end id.

    Base models of Qwen2.5 have the template as well, but generation does not end at ``<|im_end|>``.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    try:
        ids = tokenizer.chat(turns, add_generation_prompt=False)
    except (UsageError, QwenqError):
        return False
    return any(token in tokenizer.eos_ids for token in ids[-3:])


def settle_families(contenders: Sequence[Contender]) -> list[str]:
    """Bases before what was made from them, and each quantised model in the family of its base.

    The base is the model with the fingerprint that the manifest names, else the one with the family's name,
    else the only unquantised one, if it has the same shape: that is said.

    Returns:
        What the user has to be told.
    """
    notes = []
    bases = [contender for contender in contenders if not contender.quantised]
    for contender in contenders:
        if not contender.quantised or not bases:
            continue
        named = base_of(contender.checkpoint.folder).get("fingerprint")
        same = [base for base in bases if base.model.fingerprint == named]
        alike = [base for base in bases if _same_shape(base, contender)]
        if not same and contender.model.family not in {base.model.family for base in bases}:
            if len(bases) == 1 and alike:
                same = bases
                notes.append(
                    f"nothing says what {contender.model.name} was made from: "
                    f"it is compared with {bases[0].model.name}"
                )
            else:
                notes.append(f"no base of {contender.model.name} is among the models: it is not compared")
        if same:
            contender.model = replace(contender.model, family=same[0].model.family)
    return notes


def by_need(contenders: Sequence[T]) -> list[T]:
    """Unquantised models first, else in the order given."""
    return sorted(contenders, key=lambda contender: contender.quantised)


def _same_shape(one: Contender, other: Contender) -> bool:
    first, second = one.checkpoint.config, other.checkpoint.config
    return all(first.get(name) == second.get(name) for name in _SAME_SHAPE)
