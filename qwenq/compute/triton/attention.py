"""Compute attention over a cache: FlashAttention as first published, and split-KV decode steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenq.compute.gpu import bound, multiprocessors
from qwenq.compute.triton.support import LOG2E, product

# Run FlashAttention as first published: Dao et al., arXiv 2205.14135, Algorithm 1, the forward pass.
#
# Work is split over batch × heads only: one program computes a whole head, however long the sequence.
# Keys and values are the outer loop, queries the inner one, and the unfinished output and its softmax
# statistics go through device memory each time. This is what version 2 mended (arXiv 2307.08691, §3), and
# the reason to keep it is the column "FlashAttention v1" of the cards.
#
# Beyond the paper: a query sees the slots up to its own position, blocks that no query sees are skipped,
# and query heads may share keys.


@triton.jit
def _flash_v1(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, o: tl.tensor, row_sum: tl.tensor, row_max: tl.tensor,
    positions: tl.tensor,
    scale: tl.tensor, heads: tl.tensor, group: tl.tensor, tokens: tl.tensor, end: tl.tensor,
    column_blocks: tl.tensor, row_blocks: tl.tensor,
    q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor, k_batch: tl.tensor, k_head: tl.tensor,
    k_slot: tl.tensor, v_batch: tl.tensor, v_head: tl.tensor, v_slot: tl.tensor,
    position_batch: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
) -> None:  # fmt: skip
    """Compute one head of one row. Names as in the paper: B_r, B_c, l (row_sum), m (row_max)."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    q += batch.to(tl.int64) * q_batch + head * q_head
    k += batch.to(tl.int64) * k_batch + (head // group) * k_head
    v += batch.to(tl.int64) * v_batch + (head // group) * v_head
    o += tl.program_id(0).to(tl.int64) * tokens * D
    row_sum += tl.program_id(0).to(tl.int64) * tokens
    row_max += tl.program_id(0).to(tl.int64) * tokens
    features = tl.arange(0, BLOCK_D)
    inside = features < D
    for j in range(0, column_blocks):  # line 5
        slots = j * BC + tl.arange(0, BC)
        read = (slots < end)[:, None] & inside[None, :]
        key = tl.load(k + slots[:, None] * k_slot + features[None, :], read, 0.0)  # line 6
        value = tl.load(v + slots[:, None] * v_slot + features[None, :], read, 0.0)
        for i in range(0, row_blocks):  # line 7
            steps = i * BR + tl.arange(0, BR)
            real = steps < tokens
            # A query of the padding looks at slot 0, so that no row of scores is empty.
            position = tl.load(positions + batch * position_batch + steps, real, 0)
            if j * BC <= tl.max(position, axis=0):
                whole = real[:, None] & inside[None, :]
                query = tl.load(q + steps[:, None] * q_token + features[None, :], whole, 0.0)  # line 8
                place = o + steps[:, None] * D + features[None, :]
                scores = product(query, tl.trans(key)) * scale  # line 9, in units of log2
                seen = (slots[None, :] <= position[:, None]) & (slots < end)[None, :]
                scores = tl.where(seen, scores, float("-inf"))
                old_max = tl.load(row_max + steps, real, 0.0)
                old_sum = tl.load(row_sum + steps, real, 1.0)
                # Lines 10 and 11, with the exponentials taken against the new maximum at once: the block's
                # own would be -inf in a row that sees nothing of it.
                new_max = tl.maximum(old_max, tl.max(scores, axis=1))
                weights = tl.exp2(scores - new_max[:, None])
                kept = old_sum * tl.exp2(old_max - new_max)
                new_sum = kept + tl.sum(weights, axis=1)
                mixed = product(weights.to(value.dtype), value)
                before = tl.load(place, whole, 0.0) * kept[:, None]
                tl.store(place, (before + mixed) / new_sum[:, None], whole)  # line 12
                tl.store(row_sum + steps, new_sum, real)  # line 13
                tl.store(row_max + steps, new_max, real)
        tl.debug_barrier()  # what this block of keys wrote, the next one reads


def flash_v1(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Run FlashAttention (1) over the cache; return [batch, heads, tokens, d].

    Args:
        queries: [batch, heads, tokens, d], float16 or bfloat16.
        keys, values: [batch, key/value heads, end, d]; d has stride 1.
        positions: int64 [batch or 1, tokens]: query t sees the slots 0 … positions[t].
    """
    batch, heads, tokens, d = queries.shape
    shared, end = keys.shape[1:3]
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, values))
    block_d = max(16, triton.next_power_of_2(d))
    rows, columns = min(64, max(16, triton.next_power_of_2(tokens))), 64 if block_d <= 128 else 32
    mixed = queries.new_zeros((batch, heads, tokens, d), dtype=torch.float32)  # line 2
    row_sum = mixed.new_zeros((batch, heads, tokens))
    row_max = torch.full_like(row_sum, float("-inf"))
    with torch.cuda.device_of(queries):
        _flash_v1[(batch * heads,)](
            queries, keys, values, mixed, row_sum, row_max, positions, d**-0.5 * LOG2E,
            heads, heads // shared, tokens, end,
            bound(triton.cdiv(end, columns)), bound(triton.cdiv(tokens, rows)),
            *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
            positions.stride(0) if positions.shape[0] > 1 else 0,
            D=d, BLOCK_D=block_d, BR=rows, BC=columns, num_warps=4,
            # One stage: what a program writes to `mixed` it reads again; a load moved ahead would miss it.
            num_stages=1,
        )  # fmt: skip
    return mixed.to(queries.dtype)


# Attend from one new token to a long cache: programs take parts of the slots, a second pass joins them.
#
# A decode step has batch × key/value heads to do, far fewer than a GPU has multiprocessors. Flash-
# decoding (Dao, Haziza, Massa, Sizov, 2023) cuts the keys of each head into runs; each yields an output
# and the logarithm of its softmax's denominator, and those are joined exactly. Every order is fixed: the
# same input gives the same bits.
#
# Lengths are read from the device, so that a launch can be captured in a CUDA graph and replayed as rows
# grow.


_BLOCK = 64  # slots of one step of the loop


@triton.jit
def _attend_run(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, parts: tl.tensor, logs: tl.tensor, positions: tl.tensor,
    scale: tl.tensor, shared: tl.tensor, runs: tl.tensor, end: tl.tensor,
    q_batch: tl.tensor, q_head: tl.tensor, k_batch: tl.tensor, k_head: tl.tensor, k_slot: tl.tensor,
    v_batch: tl.tensor, v_head: tl.tensor, v_slot: tl.tensor,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Compute BLOCK · BLOCKS slots for the GROUP heads that share a key/value head."""
    run = tl.program_id(0)
    batch = tl.program_id(1) // shared
    head = tl.program_id(1) % shared
    length = tl.minimum(tl.load(positions + batch) + 1, end)
    if run * (BLOCK * BLOCKS) < length:
        rows = tl.arange(0, ROWS)
        features = tl.arange(0, BLOCK_D)
        inside = features < D
        whole = (rows < GROUP)[:, None] & inside[None, :]
        q += batch.to(tl.int64) * q_batch + (head * GROUP) * q_head
        k += batch.to(tl.int64) * k_batch + head * k_head
        v += batch.to(tl.int64) * v_batch + head * v_head
        query = tl.load(q + rows[:, None] * q_head + features[None, :], whole, 0.0)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            slots = (run * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
            seen = slots < length
            read = seen[:, None] & inside[None, :]
            key = tl.load(k + slots[:, None] * k_slot + features[None, :], read, 0.0)
            value = tl.load(v + slots[:, None] * v_slot + features[None, :], read, 0.0)
            scores = product(query, tl.trans(key)) * scale  # units of log2
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # The first block of a live run has a slot that is seen, so the maximum is finite from there on.
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weights, axis=1)
            mixed = mixed * shrink[:, None] + product(weights.to(value.dtype), value)
            highest = new_highest
        place = (tl.program_id(1).to(tl.int64) * GROUP + rows) * runs + run  # [batch, head, run]
        tl.store(parts + place[:, None] * D + features[None, :], mixed / total[:, None], whole)
        tl.store(logs + place, highest + tl.log2(total), rows < GROUP)


@triton.jit
def _join_runs(
    parts: tl.tensor, logs: tl.tensor, o: tl.tensor, positions: tl.tensor,
    heads: tl.tensor, runs: tl.tensor, end: tl.tensor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, RUNS: tl.constexpr, SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    """Join the runs of one head; what was not written is not read."""
    head = tl.program_id(0)
    length = tl.minimum(tl.load(positions + head // heads) + 1, end)
    number = tl.arange(0, RUNS)
    features = tl.arange(0, BLOCK_D)
    live = number * SLOTS < length
    place = head.to(tl.int64) * runs + number
    log = tl.load(logs + place, live, float("-inf"))
    share = tl.exp2(log - tl.max(log, axis=0))
    part = tl.load(
        parts + place[:, None] * D + features[None, :], live[:, None] & (features < D)[None, :], 0.0
    )
    mixed = tl.sum(part * share[:, None], axis=0) / tl.sum(share, axis=0)
    tl.store(o + head.to(tl.int64) * D + features, mixed.to(o.dtype.element_ty), features < D)


def split_decode(queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Compute attention of one query per head over the cache; return [batch, heads, 1, d].

    Args:
        queries: [batch, heads, 1, d], float16 or bfloat16.
        keys, values: [batch, key/value heads, end, d]; d has stride 1.
        positions: int64 [batch]: row r sees the slots 0 … positions[r], on the device.
    """
    batch, heads, _, d = queries.shape
    shared, end = keys.shape[1:3]
    group = heads // shared
    queries, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, values))
    slots = run_length(end, batch * shared, multiprocessors(queries.device))
    runs = triton.cdiv(end, slots)
    block_d = max(16, triton.next_power_of_2(d))
    parts = queries.new_empty((batch, heads, runs, d), dtype=torch.float32)
    logs = parts.new_empty((batch, heads, runs))
    mixed = queries.new_empty((batch, heads, 1, d))
    with torch.cuda.device_of(queries):
        _attend_run[(runs, batch * shared)](
            queries, keys, values, parts, logs, positions, d**-0.5 * LOG2E, shared, runs, end,
            *(*queries.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),  # the fewest that tensor cores take
            D=d, BLOCK_D=block_d, BLOCK=_BLOCK, BLOCKS=slots // _BLOCK,
            num_warps=4, STAGES=stages(block_d),
        )  # fmt: skip
        _join_runs[(batch * heads,)](
            parts, logs, mixed, positions, heads, runs, end,
            D=d, BLOCK_D=block_d, RUNS=triton.next_power_of_2(runs), SLOTS=slots, num_warps=4,
        )  # fmt: skip
    return mixed


def stages(block_d: int) -> int:
    """Return how many blocks of keys and values are loaded at once: what fits the 99 KB of sm_89."""
    return 2 if block_d <= 128 else 1


def run_length(end: int, groups: int, processors: int) -> int:
    """Return the slots of one run, 64 to 1024, such that there are about two programs a processor.

    A power of two, because a kernel is built for each.
    """
    wanted = end * groups / (2 * processors)
    return int(min(max(triton.next_power_of_2(int(wanted)), _BLOCK), 1024))
