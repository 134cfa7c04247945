"""Turn requests into tokens, find shared prefixes, and choose how many rows run at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qwenq.errors import DataError, QwenqError, UsageError
from qwenq.evals.task import Choose, Item, Prompt, Request, Write
from qwenq.models.tokenizer import Tokenizer
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import Engine, FastEngine
from qwenq.runtime.memory import free_bytes

# Turn requests into tokens.
#
# A continuation is encoded alone and appended to the prompt's ids, as in Qwen's scripts: ``" A"`` is one
# token of a space and an A, whatever it might have merged with.


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
    """Return the token ids of each request: of texts together, in parallel, and of chats one by one."""
    encoded = iter(tokenizer.encode_many([one.prompt for one in requests if isinstance(one.prompt, str)]))
    try:
        prompts = [
            next(encoded) if isinstance(one.prompt, str) else tokenizer.chat(list(one.prompt))
            for one in requests
        ]
    except UsageError as error:
        hint = error.hint or "a chat begins with a system message here; --protocol base asks in plain text"
        raise UsageError(error.what, where=error.where, hint=hint) from error
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
    """Refuse prompts beyond the model's context: nothing is truncated, as that would be another question."""
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


def request_hash(item: Item, request: Request) -> str:
    """Return 16 hex digits over request and item, right answer included."""
    prompt = request.prompt if isinstance(request.prompt, str) else [*map(dict, request.prompt)]
    asked: dict[str, object] = {"prompt": prompt}
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


# Group prompts by shared prefixes, each of which is encoded once.
#
# In sorted order every set of prompts with a common prefix is a run of neighbours, and the runs with a longer
# one lie within it. From the inside out, each run chooses between one group and those of the runs within by
# the tokens saved, less a fixed cost for every group, as groups are not batched with each other.


GROUP_COST = 96
"""Cost of a group in tokens, estimated: a forward pass for its prefix, and smaller batches."""
DEEPEST = 100
"""Runs within runs that are looked at; prompts that share still more stay together."""


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts with a common prefix."""

    # of the prefix in tokens; less than any of the prompts, as the last token of each has to be computed. 0:
    # they share nothing
    length: int
    members: tuple[int, ...]  # indexes of the prompts


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """Return groups in the order of their first members; every prompt, of one id or more, is in one."""
    if not prompts:
        return []
    rows = [np.asarray(prompt, dtype=">u4") for prompt in prompts]  # big endian: bytes sort as numbers do
    order = sorted(range(len(rows)), key=lambda index: rows[index].tobytes())
    shared = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    _, runs = _division(np.array(shared, dtype=np.int64), 0, len(rows) - 1)
    groups = [PrefixGroup(depth, tuple(sorted(order[place] for place in run))) for depth, run in runs]
    return sorted(groups, key=lambda group: group.members)


def _common(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """Return the length of the common prefix, one less than the shorter prompt at most."""
    limit = min(len(a), len(b)) - 1
    differs = np.flatnonzero(a[:limit] != b[:limit])
    return int(differs[0]) if len(differs) else limit


def _division(
    shared: NDArray[np.int64], left: int, right: int, within: int = 0
) -> tuple[int, list[tuple[int, list[int]]]]:
    """Return the best division of a run of sorted prompts: tokens saved, and groups as (length, places).

    ``shared`` are the lengths that neighbours have in common; ``within`` is the number of runs around it.
    """
    depth = int(shared[left:right].min()) if left < right else 0
    ends = [*(left + np.flatnonzero(shared[left:right] == depth)).tolist(), right]
    runs = [(a, b) for a, b in pairwise([left - 1, *ends]) if b - a > 1]  # from a + 1 to b
    inner = [(_division(shared, a + 1, b, within + 1), b - a) for a, b in runs if within < DEEPEST]
    apart = [found for found, size in inner if found[0] > size * depth]
    groups = [group for _, found in apart for group in found]
    taken = {place for _, places in groups for place in places}
    rest = [place for place in range(left, right + 1) if place not in taken]
    saved = sum(found[0] for found in apart)
    if rest:
        saved += (len(rest) - 1) * depth - GROUP_COST
        groups = [*groups, (depth, rest)]
    whole = sum(found[0] for found, _ in inner)
    if sum(size for _, size in inner) == right - left + 1 and whole > saved:
        return whole, [group for found, _ in inner for group in found[1]]
    return saved, groups


# Choose how many rows run at once: as many as fit into memory and still gain speed.
#
# The estimate is coarse, on the safe side, and corrected: a batch that does not fit is halved.


CPU_TOKENS, GPU_TOKENS = 512, 16384
"""New tokens in one forward pass from which on more gain nothing."""
CPU_ROWS, GPU_ROWS = 32, 256
"""Rows of a decode step from which on more gain little."""
_SHARE = 0.5  # of the free memory: other work needs some, too
_ACTIVATIONS = 128  # times one layer's keys and values of a token: what a block holds while it runs
_LOGITS = 4  # copies of a row of float32 logits: themselves, log softmax, published softmax, temporary
_PADDING = 31  # slots by which the layout of decode steps may be longer than the capacity of a cache


@dataclass
class Budget:
    """Limits of one forward pass."""

    memory: int  # bytes
    tokens: int  # new tokens, padding included
    rows: int  # sequences in a pass
    cached: int  # bytes of keys and values of one token in all layers
    computed: int  # bytes that a new token needs while it is computed
    logits: int  # bytes that the logits of one row need
    arranged: int = 0  # as ``cached``, in the layout of decode steps, which is filled from the other; 0: none
    states: int = 0  # bytes of the recurrent states of one row

    def rows_that_fit(self, longest: int, capacity: int) -> int:
        """Return how many rows of ``longest`` new tokens fit, in a cache of ``capacity``; at least one."""
        cache = capacity * self.cached
        if longest <= 1:  # a decode step: the cache is there twice while it is rearranged
            cache += (capacity + _PADDING) * self.arranged
        each = cache + longest * (self.computed + capacity * 4) + self.logits + self.states
        return max(1, min(self.rows, self.tokens // max(longest, 1), self.memory // each))

    def rows_to_decode(self, capacity: int) -> int:
        """Return how many rows fit that decode a token each; at least one."""
        cache = (capacity + _PADDING) * self.arranged if self.arranged else capacity * self.cached
        each = cache + self.computed + self.logits + self.states
        return max(1, min(self.rows, self.memory // each))

    def halve(self, rows: int, error: BaseException) -> None:
        """Halve the number of rows from now on; raise where a single row did not fit."""
        if rows <= 1:
            raise QwenqError(
                "not enough memory for a single prompt", hint="use a smaller model, dtype or prompt"
            ) from error
        self.rows = rows // 2


def budget_for(engine: Engine, batch: int | None = None, decode: bool = False) -> Budget:
    """Return the limits by the memory that is free now; without ``batch``, as many rows as gain speed.

    ``decode`` is for decode steps, of one token a row.
    """
    gpu = engine.device.type == "cuda"
    probe = engine.new_cache(1, 1)
    layer = probe.keys[0].nbytes + probe.values[0].nbytes
    arranged = 0
    if _has_step_layout(engine):
        step = probe.step()
        arranged = sum(slot.nbytes for slot in (*step.keys, *step.values))
    usual = (GPU_ROWS if gpu else CPU_ROWS) if decode else (GPU_TOKENS if gpu else CPU_TOKENS)
    return Budget(
        memory=int(free_bytes(engine.device) * _SHARE),
        # A number of rows that the user gave is limited by memory alone, not by their length.
        tokens=(GPU_TOKENS if gpu else CPU_TOKENS) if batch is None else 1 << 40,
        rows=usual if batch is None else batch,
        cached=layer * len(probe.keys),
        computed=layer * _ACTIVATIONS,
        logits=engine.vocab_size * 4 * _LOGITS,
        arranged=arranged,
        states=sum(tensor.nbytes for pair in probe.states for tensor in pair),
    )


def new_decode_cache(engine: Engine, rows: int, capacity: int) -> KVCache:
    """Return an empty cache in the layout of decode steps alone, for rows that are prefilled elsewhere."""
    if not _has_step_layout(engine):
        return engine.new_cache(rows, capacity)
    cache = engine.new_cache(rows, 1)
    cache.arrange_for_steps(capacity)
    return cache


def _has_step_layout(engine: Engine) -> bool:
    return isinstance(engine, FastEngine) and engine.decoder.has_step_layout


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Return indexes by falling length: memory runs out early or never, and rows of a batch are alike."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
