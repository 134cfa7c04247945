"""Answer requests with an engine: score continuations of prompts, or generate texts."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwenq.errors import ModelError
from qwenq.evals.batching import (
    Budget,
    ChoiceTokens,
    PrefixGroup,
    WriteTokens,
    group_by_prefix,
    longest_first,
    new_decode_cache,
)
from qwenq.evals.task import Chosen, Written
from qwenq.models.tokenizer import TextStream, Tokenizer
from qwenq.runtime.cache import KVCache
from qwenq.runtime.engine import Engine
from qwenq.runtime.memory import explained
from qwenq.runtime.sampling import GREEDY, Sampler, Sampling
from qwenq.stopping import asked, stop_here

BATCH = "a batch of prompts", "use a smaller model, dtype or prompt"
"""What memory may not suffice for, and what to do then."""

# Score continuations by their log-probabilities: letters of multiple-choice questions.
#
# Shared prefixes are encoded once, the rest in batches by length. One forward pass per prompt serves all
# continuations, as the same logits give the first token of each. Longer continuations run on a copy of their
# prompt's cache row.


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
    return engine.new_cache(rows, capacity) if prefix is None else prefix.take([0] * rows, capacity)


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
        rows = budget.rows_that_fit(longest, shared + longest)
        if work is not None and work.batch <= rows < 2 * work.batch:
            rows = work.batch  # as many as before, to use its cache again
        rows = min(rows, len(order) - done)
        batch = order[done : done + rows]
        try:
            with explained(engine.device, *BATCH):
                if work is not None and work.batch == rows and not work.states:
                    work.rewind(shared)  # what later batches add is shorter: it fits
                else:
                    work = None  # before its successor is made
                    work = begin_rows(engine, prefix, rows, shared + longest)
                logits = engine.prefill([tails[index] for index in batch], work)
                found = _choose(engine, [requests[index] for index in batch], logits, work)
        except MemoryError as error:
            work = None
            budget.halve(rows, error)
            continue
        yield list(zip(batch, found, strict=True))
        done += rows


def _choose(engine: Engine, requests: Sequence[ChoiceTokens], logits: Tensor, cache: KVCache) -> list[Chosen]:
    """Return answers from the float32 logits [rows, vocabulary] of prompts in ``cache``."""
    require_finite(logits, [request.name for request in requests])
    letters = [torch.tensor([choice[0] for choice in request.choices]) for request in requests]
    first = pad_sequence(letters, batch_first=True).to(engine.device)  # the padding is never read
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


# Generate answers to many prompts in one batch whose finished rows are replaced at once.


_COMPACT = {"cpu": 1.0, "cuda": 0.75}
"""Share of busy rows up to which idle ones are dropped. On a CPU each row costs its part of every step; on a
GPU almost nothing, but a graph for another number of rows has to be captured."""


class AnswerText:
    """The growing text of an answer, and whether a stop string has ended it.

    Only the newest text is searched for stop strings, with as much before it as one of them may overlap.
    """

    def __init__(self, stream: TextStream, until: Sequence[str]) -> None:
        self._stream, self._until = stream, [text for text in until if text]
        self._reach = max(map(len, self._until), default=1) - 1
        self._pieces: list[str] = []
        self._tail = ""  # the end of the text, too short to hold any stop string
        self._cut: str | None = None

    def push(self, token: int) -> bool:
        """Append one token; return whether a stop string has appeared."""
        return self._take(self._stream.push(token))

    def finish(self) -> str:
        """Return the text before the first stop string."""
        if self._cut is None:
            self._take(self._stream.finish())
        return "".join(self._pieces) if self._cut is None else self._cut

    def _take(self, piece: str) -> bool:
        if piece:
            searched = self._tail + piece
            self._pieces.append(piece)
            places = [place for text in self._until if (place := searched.find(text)) >= 0]
            if places:
                text = "".join(self._pieces)
                self._cut = text[: len(text) - len(searched) + min(places)]
            self._tail = searched[-self._reach :] if self._reach else ""
        return self._cut is not None


@dataclass
class _Row:
    """A prompt that is being answered."""

    index: int
    room: int
    text: AnswerText
    sampler: Sampler | None = None
    tokens: int = 0
    stopped: bool = False

    def push(self, token: int, stops: Collection[int]) -> bool:
        """Append the next token; return whether the answer is complete."""
        if token in stops:
            self.stopped = True
            return True
        self.tokens += 1
        self.stopped = self.text.push(token)
        return self.stopped or self.tokens >= self.room

    def written(self) -> Written:
        return Written(self.text.finish(), self.tokens, self.stopped)


@dataclass
class _Batch:
    """Rows that are decoded together; ``None``: an idle row."""

    cache: KVCache
    rows: list[_Row | None]
    newest: list[int] = field(default_factory=list)  # the last token of each row, not yet in the cache

    @property
    def busy(self) -> list[int]:
        return [place for place, row in enumerate(self.rows) if row is not None]

    @property
    def idle(self) -> list[int]:
        return [place for place, row in enumerate(self.rows) if row is None]

    def drop_idle(self) -> None:
        """Drop idle rows once there are enough of them."""
        busy, idle = self.busy, self.idle
        if idle and len(busy) <= _COMPACT[self.cache.keys[0].device.type] * len(self.rows):
            order = self.cache.keep(busy)
            self.rows = [self.rows[place] for place in order]
            self.newest = [self.newest[place] for place in order]
        else:
            self.cache.clear(idle)  # or their positions would grow out of the cache


@dataclass
class _Generator:
    """The generation of one task's answers by one model; arguments as of ``generate_answers``."""

    engine: Engine
    tokenizer: Tokenizer
    requests: Sequence[WriteTokens]
    stop_ids: Collection[int]
    budget: Budget
    prompts: Budget
    sampling: Sampling

    def __post_init__(self) -> None:
        groups = shared_groups(self.engine, [request.prompt for request in self.requests])
        self._group_of = {index: number for number, group in enumerate(groups) for index in group.members}
        self._lengths = [group.length for group in groups]
        self._left = [len(group.members) for group in groups]
        self._prefixes: dict[int, KVCache | None] = {}
        self._queue = deque(longest_first([request.needed for request in self.requests]))

    def run(self) -> Iterator[tuple[int, Written]]:
        """Yield answers as they are finished."""
        while self._queue:
            stop_here()
            capacity = self.requests[self._queue[0]].needed
            rows = min(self.budget.rows_to_decode(capacity), len(self._queue))
            batch: _Batch | None = None
            try:
                with explained(self.engine.device, *BATCH):
                    batch = _Batch(new_decode_cache(self.engine, rows, capacity), [None] * rows, [0] * rows)
                    yield from self._run_batch(batch)
            except MemoryError as error:
                self._begin_again(batch)
                self.budget.halve(rows, error)
                self.prompts.rows = min(self.prompts.rows, self.budget.rows)

    def _begin_again(self, batch: _Batch | None) -> None:
        """Put unfinished requests back into the queue, in their order."""
        unfinished = [row.index for row in batch.rows if row is not None] if batch is not None else []
        waiting = [*unfinished, *self._queue]
        order = longest_first([self.requests[index].needed for index in waiting])
        self._queue = deque(waiting[place] for place in order)
        self._prefixes.clear()

    def _run_batch(self, batch: _Batch) -> Iterator[tuple[int, Written]]:
        while True:
            yield from self._fill(batch)
            if not batch.busy:
                return
            batch.drop_idle()
            newest = torch.tensor(batch.newest, device=self.engine.device)
            logits = self.engine.decode(newest, batch.cache)
            yield from self._take(batch, batch.busy, logits[batch.busy] if batch.idle else logits)

    def _fill(self, batch: _Batch) -> Iterator[tuple[int, Written]]:
        """Prefill prompts into idle rows; an answer of one token is complete at once."""
        while self._queue and batch.idle and not asked():  # then those under way are still finished
            group = self._group_of[self._queue[0]]
            shared = self._lengths[group]
            longest = len(self.requests[self._queue[0]].prompt) - shared
            most = min(self.prompts.rows_that_fit(longest, shared + longest), len(batch.idle))
            chosen = self._next_of(group, most, longest)
            places = batch.idle[: len(chosen)]
            for place, index in zip(places, chosen, strict=True):
                request = self.requests[index]
                text = AnswerText(self.tokenizer.stream(), request.until)
                batch.rows[place] = _Row(index, request.max_new_tokens, text, self._sampler(request.name))
            tails = [self.requests[index].prompt[shared:] for index in chosen]
            if group not in self._prefixes:
                prefix = self.requests[chosen[0]].prompt[:shared]
                self._prefixes[group] = encode_prefix(self.engine, prefix)
            capacity = shared + max(map(len, tails))
            fresh = begin_rows(self.engine, self._prefixes[group], len(chosen), capacity)
            logits = self.engine.prefill(tails, fresh)
            batch.cache.put(places, fresh)
            self._left[group] -= len(chosen)
            if self._left[group] <= 0:
                self._prefixes.pop(group, None)
            yield from self._take(batch, places, logits)

    def _next_of(self, group: int, most: int, longest: int) -> list[int]:
        """Take the next prompts of one group from the queue, each of at most ``longest`` fresh tokens."""
        shared = self._lengths[group]
        chosen: list[int] = []
        while self._queue and len(chosen) < most:
            index = self._queue[0]
            if self._group_of[index] != group or len(self.requests[index].prompt) - shared > longest:
                break
            chosen.append(self._queue.popleft())
        return chosen

    def _sampler(self, name: str) -> Sampler | None:
        """Return the sampler of one answer, seeded by its item so that batching does not matter."""
        if self.sampling.greedy:
            return None
        own = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4])
        sampling = replace(self.sampling, seed=self.sampling.seed + own)
        return Sampler(sampling, 1, self.engine.real_vocab)

    def _take(self, batch: _Batch, places: Sequence[int], logits: Tensor) -> Iterator[tuple[int, Written]]:
        """Choose the next token of these rows from float32 logits [places, vocabulary]."""
        best, tokens = logits[:, : self.engine.real_vocab].max(dim=-1)
        rows = [batch.rows[place] for place in places]
        require_finite(best, [self.requests[row.index].name for row in rows if row is not None])
        for line, (place, row, likeliest) in enumerate(zip(places, rows, tokens.tolist(), strict=True)):
            sampler = None if row is None else row.sampler
            token = likeliest if sampler is None else int(sampler(logits[line : line + 1]))
            batch.newest[place] = token
            if row is not None and row.push(token, self.stop_ids):
                batch.rows[place] = None
                yield row.index, row.written()


@torch.inference_mode()
def generate_answers(
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[WriteTokens],
    stop_ids: Collection[int],
    budget: Budget,
    prompts: Budget,
    sampling: Sampling = GREEDY,
) -> Iterator[tuple[int, Written]]:
    """Yield (index, answer) for each request, in the order of finishing.

    Args:
        stop_ids: each ends an answer and is not part of it.
        budget: for decode steps.
        prompts: for the passes over prompts.
        sampling: how tokens are chosen; each item draws by its name and the seed.
    """
    yield from _Generator(engine, tokenizer, requests, stop_ids, budget, prompts, sampling).run()
