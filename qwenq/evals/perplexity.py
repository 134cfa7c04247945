"""Measure perplexity by context length, with Qwen v1's dynamic NTK and logn on and off.

The same tokens are scored at every length: the text is cut into windows of the longest, and those into
shorter ones. A window goes through the model alone and in one pass, so that its length decides the NTK
factor, as in a prompt; all its tokens but the first are scored, from float32 logits. Qwen's cards have such
a table (arXiv texts, 1,024 to 32,768 tokens); neither their texts nor their script are published, so only
its shape can be compared. Their window attention is not in the released checkpoints' code, and not here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenq.environment import MACHINE
from qwenq.errors import OutOfMemoryError, QwenqError, UsageError
from qwenq.evals.check import SLAB_ELEMENTS, SLAB_TOKENS
from qwenq.evals.model import LocalModel
from qwenq.events import Update
from qwenq.models.qwen_v1 import long_context_of
from qwenq.results import Row, Value
from qwenq.runtime.decoder import Decoder
from qwenq.runtime.engine import Engine, FastEngine
from qwenq.runtime.memory import explained
from qwenq.statistics import mean_of_sequences

METRIC = "perplexity.context"
TOKENS_PER_PASS = 4096
"""Short windows go through the model together, up to so many tokens; a longer one goes alone."""

LARGEST = 40.0
"""Nats; a larger mean is not a measurement, as no vocabulary is that large."""


@dataclass(frozen=True)
class Switches:
    """Qwen v1's two methods beyond its trained length, on or off."""

    ntk: bool
    logn: bool


@dataclass(frozen=True)
class ScoredText:
    """A text that is scored."""

    name: str  # a label; not a path
    tokens: Tensor  # int64 [windows, longest]

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits over the tokens."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]


def combinations(
    config: Mapping[str, Any], ntk: bool | None, logn: bool | None, name: str = "this model"
) -> list[Switches | None]:
    """Return the combinations of switches to measure; [None] for a model without switches.

    Of a switch that is None, both off and on are measured, the plain model first.
    """
    if long_context_of(config) is None:
        if ntk is not None or logn is not None:
            raise UsageError(
                f"{name} has no such switch: only Qwen v1 has dynamic NTK and logn",
                where="--ntk" if ntk is not None else "--logn",
                hint="leave the option out, or measure this model in a separate command",
            )
        return [None]
    choices = [(False, True) if wanted is None else (wanted,) for wanted in (ntk, logn)]
    return [Switches(first, second) for first in choices[0] for second in choices[1]]


def require_lengths(lengths: Sequence[int], text: ScoredText) -> None:
    """Refuse lengths that cannot be cut from the text so that all score the same tokens."""
    longest = text.tokens.shape[1]
    for length in lengths:
        if length < 2 or longest % length:
            raise UsageError(
                f"a window of {length} tokens",
                where="--lengths",
                hint=f"each has to be at least 2 and divide the longest, {longest}: all score one text",
            )


def perplexities(
    eval_model: LocalModel,
    text: ScoredText,
    lengths: Sequence[int],
    switches: Sequence[Switches | None],
    *,
    command: str = "",
    progress: Update | None = None,
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """Yield a row for each combination of switches and length, as they are measured.

    Up to the trained length the switches have no effect: those windows are scored once. A length that this
    machine cannot run becomes a row with the reason. A row of ``known`` with the same facts is reused.
    """
    engine = eval_model.engine
    shared: dict[int, NDArray[np.float64] | QwenqError] = {}
    context = engine.decoder.spec.long_context if isinstance(engine, FastEngine) else None
    total, done = text.tokens.numel() * len(lengths) * len(switches), 0
    for switch in switches:
        decoder = _decoder(engine, switch)
        for length in lengths:
            facts = _facts(eval_model, engine, text, length, switch)
            row = next((one for one in known if one.value is not None and _measured(one, facts)), None)
            if row is None:
                alike = context is None or length <= context.seq_length
                if not alike or length not in shared:
                    shared[length] = _measure(decoder, text.tokens.view(-1, length))
                details: dict[str, Any] = {"command": command} if command else {}
                if context is not None and switch is not None:
                    released = context.dynamic_ntk, context.logn
                    details["as_released"] = (switch.ntk, switch.logn) == released
                row = _row(facts, shared[length], details)
            done += text.tokens.numel()
            if progress is not None:
                progress(done, total)
            yield row


@torch.inference_mode()
def window_nats(decoder: Decoder | Engine, windows: Tensor) -> NDArray[np.float64]:
    """Return −log of the probability of each token of [windows, length] but the first: float64."""
    count, length = windows.shape
    rows = max(1, TOKENS_PER_PASS // length)
    if isinstance(decoder, Engine):
        vocabulary, logits_of = decoder.vocab_size, decoder.head
    else:
        vocabulary, logits_of = decoder.spec.shape.vocab, decoder.logits
    slab = max(1, min(SLAB_TOKENS, SLAB_ELEMENTS // vocabulary))
    found = []
    for ids in torch.split(windows.to(decoder.device), rows):
        cache = decoder.new_cache(len(ids), length)
        hidden = decoder.forward(ids, [length] * len(ids), cache)[:, :-1].flatten(0, 1)  # [tokens, hidden]
        targets = ids[:, 1:].flatten()  # [tokens]
        del cache
        parts = zip(torch.split(hidden, slab), torch.split(targets, slab), strict=True)
        nats = [-logits_of(h).log_softmax(-1).gather(1, t[:, None])[:, 0] for h, t in parts]
        found.append(torch.cat(nats).double().cpu())
    joined: NDArray[np.float64] = torch.cat(found).view(count, length - 1).numpy()  # [windows, length − 1]
    return joined


def _decoder(engine: Engine, switch: Switches | None) -> Decoder | Engine:
    """Return what runs the windows, Qwen v1's switches set."""
    if not isinstance(engine, FastEngine):
        if switch is not None:
            raise UsageError(
                "Qwen v1 is measured by length in the fast engine: transformers has no dynamic NTK and logn",
                where="--engine",
                hint="use --engine fast",
            )
        return engine
    if switch is None:
        return engine.decoder
    return engine.decoder.switched(dynamic_ntk=switch.ntk, logn=switch.logn)


def _measure(decoder: Decoder | Engine, windows: Tensor) -> NDArray[np.float64] | QwenqError:
    """Return the nats, or the error that makes this length impossible here."""
    what = f"a window of {windows.shape[1]} tokens"
    try:
        with explained(decoder.device, what, "leave this length out, or use another --dtype or --attention"):
            return window_nats(decoder, windows)
    except (OutOfMemoryError, UsageError) as error:
        return error


def _facts(
    eval_model: LocalModel, engine: Engine, text: ScoredText, length: int, switch: Switches | None
) -> dict[str, Any]:
    """Return every field of a row that its value depends on; the point is equal for models measured alike."""
    context = engine.decoder.spec.long_context if isinstance(engine, FastEngine) else None
    point: dict[str, Value] = {
        "seq_len": length,
        "text": text.name,
        "text_fingerprint": text.fingerprint,
        "dtype": eval_model.settings["dtype"],
    }
    if switch is not None:
        point |= {name: "on" if on else "off" for name, on in asdict(switch).items()}
    return {
        "metric": METRIC,
        "model": eval_model.model,
        "point": point,
        "unit": "ratio",
        "implementation": engine.implementation,
        "settings": {
            **{name: eval_model.settings[name] for name in ("device", "attention", "kernel")},
            "interval": "Student's t over windows",
            "trained_length": context.seq_length if context is not None else engine.context,
        },
    }


def _measured(row: Row, facts: Mapping[str, Any]) -> bool:
    """Return whether a row has these facts, on any machine."""
    plain = replace(row, settings={key: value for key, value in row.settings.items() if key != MACHINE})
    return all(getattr(plain, name) == value for name, value in facts.items())


def _row(
    facts: Mapping[str, Any], found: NDArray[np.float64] | QwenqError, details: Mapping[str, Any]
) -> Row:
    """Return the row of a perplexity with its interval, or of a failure."""
    if isinstance(found, QwenqError):
        values: dict[str, Any] = {"value": None, "status": "unavailable", "reason": found.what}
    elif not (mean := mean_of_sequences(found)).value < LARGEST:  # NaN, too
        values = {"value": None, "status": "failed", "reason": "the logits are not finite"}
    else:
        low, high = (None if x is None else math.exp(min(x, LARGEST)) for x in (mean.low, mean.high))
        values = {"value": math.exp(mean.value), "low": low, "high": high, "n": found.size}
    return Row(**facts, details=dict(details), date=date.today().isoformat(), **values)
