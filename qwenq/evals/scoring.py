"""Score continuations by their log-probabilities: letters of multiple-choice questions.

Shared prefixes are encoded once, the rest in batches by length. One forward pass per prompt serves all
continuations, as the same logits give the first token of each. Longer continuations run on a copy of their
prompt's cache row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwenq.errors import ModelError
from qwenq.evals.batching import (
    Budget,
    ChoiceTokens,
    PrefixGroup,
    group_by_prefix,
    is_out_of_memory,
    longest_first,
)
from qwenq.evals.task import Chosen
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import Engine
from qwenq.stopping import stop_here


@torch.inference_mode()
def score_choices(
    engine: Engine, requests: Sequence[ChoiceTokens], budget: Budget
) -> Iterator[list[tuple[int, Chosen]]]:
    """Yield (index, answer) for each request, a batch at a time, in any order."""
    for group in shared_groups(engine, [request.prompt for request in requests]):
        yield from _score_group(engine, requests, group, budget)


def shared_groups(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[PrefixGroup]:
    """Return groups of prompts whose shared prefix can be encoded once.

    Qwen v1 changes the rotary base with a prompt's length: only prompts of one base share a prefix, and only
    where the prefix alone has the same base.
    """
    by_alpha: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_alpha[engine.prompt_alpha(len(prompt))].append(index)
    groups = []
    for alpha, members in by_alpha.items():
        for found in group_by_prefix([prompts[index] for index in members]):
            own = tuple(members[place] for place in found.members)
            usable = engine.prompt_alpha(found.length) == alpha
            groups.append(PrefixGroup(found.length if usable else 0, own))
    return groups


def encode_prefix(engine: Engine, prefix: Sequence[int]) -> KVCache | None:
    """Return a cache of one row that holds a shared prefix; None for an empty one."""
    if not prefix:
        return None
    cache = engine.new_cache(1, len(prefix))
    engine.prefill([prefix], cache)
    return cache


def begin_rows(engine: Engine, prefix: KVCache | None, rows: int, capacity: int) -> KVCache:
    """Return a cache of ``rows`` rows that begin with the prefix."""
    return engine.new_cache(rows, capacity) if prefix is None else prefix.fork(rows, capacity)


def require_finite(values: Tensor, names: Sequence[str]) -> None:
    """Refuse logits [rows, …] with NaN or infinity in them, and name the first of these items."""
    sound = torch.isfinite(values).reshape(len(names), -1).all(dim=1)
    if bool(sound.all()):
        return
    raise ModelError(
        "the model's logits are not finite, so there is no answer",
        where=f"item {names[sound.tolist().index(False)]}",
        hint="float16 overflows in some models: use --dtype bfloat16 or float32; "
        "`qwenq check` shows whether the weights are sound",
    )


def _score_group(
    engine: Engine, requests: Sequence[ChoiceTokens], group: PrefixGroup, budget: Budget
) -> Iterator[list[tuple[int, Chosen]]]:
    shared = group.length
    prefix = encode_prefix(engine, requests[group.members[0]].prompt[:shared])
    tails = {index: requests[index].prompt[shared:] for index in group.members}
    order = [group.members[place] for place in longest_first([len(tails[i]) for i in group.members])]
    work: KVCache | None = None
    done = 0
    while done < len(order):
        stop_here()  # every answer that was yielded is recorded
        longest = len(tails[order[done]])
        rows = min(_rows(budget, longest, shared + longest, work), len(order) - done)
        batch = order[done : done + rows]
        try:
            if work is not None and work.batch == rows and not work.states:
                work.rewind(shared)  # what later batches add is shorter: it fits
            else:
                work = None  # before its successor is made
                work = begin_rows(engine, prefix, rows, shared + longest)
            logits = engine.prefill([tails[index] for index in batch], work)
            found = _choose(engine, [requests[index] for index in batch], logits, work)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            work = None
            budget.halve(rows, error)
            continue
        yield list(zip(batch, found, strict=True))
        done += rows


def _rows(budget: Budget, longest: int, capacity: int, work: KVCache | None) -> int:
    """Return the rows that fit; as many as before if that is at least half, to reuse the cache."""
    fit = budget.rows_that_fit(longest, capacity)
    return work.batch if work is not None and work.batch <= fit < 2 * work.batch else fit


def _choose(engine: Engine, requests: Sequence[ChoiceTokens], logits: Tensor, cache: KVCache) -> list[Chosen]:
    """Return answers from the float32 logits [rows, vocabulary] of prompts in ``cache``."""
    require_finite(logits, [request.name for request in requests])
    first = torch.tensor(
        _padded([[choice[0] for choice in r.choices] for r in requests]), device=engine.device
    )
    logs = logits.log_softmax(-1).gather(1, first).tolist()  # [rows, choices]
    # The scripts of Qwen's base models: softmax in the model's own dtype, where near values become equal.
    shares = logits.to(engine.dtype).softmax(-1).gather(1, first)
    rest = _rest(engine, requests, cache)
    found = []
    for row, request in enumerate(requests):
        count = len(request.choices)
        logprobs = [logs[row][c] + rest.get((row, c), 0.0) for c in range(count)]
        factors = torch.tensor([rest.get((row, c), 0.0) for c in range(count)]).exp()
        share = shares[row, :count] * factors.to(shares)
        found.append(Chosen(tuple(logprobs), tuple(share.softmax(-1).float().tolist())))
    return found


def _rest(engine: Engine, requests: Sequence[ChoiceTokens], cache: KVCache) -> dict[tuple[int, int], float]:
    """Return the log-probability of second and later tokens by (row, choice), where there are any."""
    wanted = [
        (row, place)
        for row, request in enumerate(requests)
        for place, choice in enumerate(request.choices)
        if len(choice) > 1
    ]
    found = {}
    for start in range(0, len(wanted), max(1, len(requests))):  # no more rows at once than there were prompts
        part = wanted[start : start + max(1, len(requests))]
        texts = [requests[row].choices[place] for row, place in part]
        rows = [row for row, _ in part]
        capacity = max(cache.lengths[row] for row in rows) + max(map(len, texts)) - 1
        scored = engine.logits([text[:-1] for text in texts], cache.take(rows, capacity))
        for where, text, logits in zip(part, texts, scored, strict=True):
            require_finite(logits.unsqueeze(0), [requests[where[0]].name])
            following = torch.tensor(text[1:], device=engine.device).unsqueeze(1)
            found[where] = float(logits.log_softmax(-1).gather(1, following).sum())
    return found


def _padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pad rows to one length; the padding is never read."""
    longest = max(map(len, rows))
    return [[*row, *[0] * (longest - len(row))] for row in rows]
