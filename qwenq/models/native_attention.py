"""Causal attention over several queries of a sequence, as code for CPUs with AVX-512; bfloat16 or float32.

    out = softmax(scale · Q Kᵀ, causal) V

torch's fused attention takes up to a third of a block's forward pass. Here eight queries are taken at a time:
their scores against all keys up to the last of them in float32; the powers of each row, rounded to the dtype
of the values as FlashAttention rounds them (arXiv 2205.14135), and their sum in float32; the mean of the
values. Eight rows of scores stay in the cache, so nothing has to be rescaled on the way.

Keys are packed first, 16 side by side, and values by words (``native.numbers``): that is how the CPU's
instructions read them.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from qwenq.native.bfloat16 import WORDS
from qwenq.native.code import (
    BYTE,
    FLOAT,
    LANES,
    LONG,
    POINTER,
    WORD,
    Code,
    compiled,
    on_all_threads,
    same,
)
from qwenq.native.floats import (
    FLOATS,
    exponential,
    float_bits,
    floats,
    lanes_before,
    larger,
    put_floats,
    told_float,
)
from qwenq.native.numbers import NUMBERS, Numbers, add_to_tile, tile_of_sums

QUERIES = 8
"""Rows of a tile."""

REGISTERS = 3
"""Of 16 keys or values, of a tile: its sums and what they are made of fill the CPU's registers."""

_NEVER = -3e38  # the score of a key that a query must not see
_POINTERS = ("q", "k", "v", "starts", "out", "keys", "values", "scratch")
_NUMBERS = (
    "batch", "heads", "kv_heads", "tokens", "slots", "panels",
    "q_batch", "q_head", "q_token", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token",
    "scale",
)  # fmt: skip


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
    """Each query's mean of the values up to its own; [batch, tokens, heads, d] of their dtype.

    Args:
        q: [batch, heads, tokens, d] bfloat16 or float32, d a multiple of 16.
        k, v: [batch, kv_heads, slots, d]; kv_heads divides heads.
        scale: of the scores.
        starts: int64 [batch], the slot of each row's first query; query t sees slots 0 … start + t, of those
            that there are. None: a query for every slot.

    Raises:
        ValueError: tensors of other dtypes, devices or shapes, or starts that no slot has. The code reads
            memory by these numbers.
    """
    _check(q, k, v)
    (batch, heads, tokens, d), (kv_heads, slots), threads = q.shape, k.shape[1:3], torch.get_num_threads()
    starts = _checked_starts(starts, batch, tokens, slots)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    panels = -(-slots // (LANES * REGISTERS)) * REGISTERS
    numbers, out = NUMBERS[q.dtype], torch.empty(batch, tokens, heads, d, dtype=q.dtype)
    words = batch * kv_heads * panels * d * LANES // numbers.per_word
    keys, values = (torch.empty(words, dtype=torch.int32) for _ in range(2))
    scratch = torch.empty(threads * _scratch_bytes(panels, numbers), dtype=torch.uint8)
    strides = (stride for x in (q, k, v) for stride in x.stride()[:3])
    addresses = (x.data_ptr() for x in (q, k, v, starts, out, keys, values, scratch))
    sizes = batch, heads, kv_heads, tokens, slots, panels
    _code(d, q.dtype)(*addresses, *sizes, *strides, float_bits(scale), threads)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in NUMBERS or x.dtype != q.dtype or x.device.type != "cpu" or x.ndim != 4:
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}, "
                "not bfloat16 or float32, as q is, [batch, heads, tokens, d] on the CPU"
            )
    (batch, heads, _, d), (kv_heads, slots) = q.shape, k.shape[1:3]
    if not d or d % LANES:
        raise ValueError(f"heads are {d} wide, which is no multiple of {LANES}")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} of keys and values evenly")
    if not k.shape == v.shape == (batch, kv_heads, slots, d):
        shapes = (list(x.shape) for x in (q, k, v))
        raise ValueError("q is {}, so k {} and v {} do not fit".format(*shapes))


def _checked_starts(starts: Tensor | None, batch: int, tokens: int, slots: int) -> Tensor:
    if starts is None:
        if tokens != slots:
            raise ValueError(
                f"{tokens} queries and {slots} keys do not fit: where the queries stand is not told"
            )
        return torch.zeros(batch, dtype=torch.int64)
    if starts.dtype != torch.int64 or starts.device.type != "cpu" or starts.shape != (batch,):
        raise ValueError(
            f"starts are {starts.dtype} {list(starts.shape)} on {starts.device}, not int64 [{batch}]"
        )
    if batch and not 0 <= int(starts.min()) <= int(starts.max()) < slots:
        raise ValueError(f"queries start at {starts.tolist()}; there are {slots} slots")
    return starts.contiguous()


def _scratch_bytes(panels: int, numbers: Numbers) -> int:
    """A thread's: scores in float32, powers, the inverse of a row's sum; whole cache lines."""
    return QUERIES * panels * LANES * (4 + numbers.size) + 64


@cache
def _code(d: int, dtype: torch.dtype) -> Any:
    """The function for one size of head and a dtype, compiled; its arguments are 64-bit integers."""
    module, told = ir.Module(), _POINTERS + _NUMBERS
    code = Code(module, "thread", POINTER)
    _Attention(code, d, NUMBERS[dtype]).build()
    on_all_threads(module, "attention", "thread", len(told))
    return compiled(module, "attention", len(told) + 1)


class _Attention:
    """Builds the loops; what is told lies in ``job`` by name."""

    def __init__(self, code: Code, d: int, numbers: Numbers) -> None:
        self.code, self.d, self.numbers = code, d, numbers
        (told,) = code.function.args
        kinds = [(name, POINTER) for name in _POINTERS] + [(name, LONG) for name in _NUMBERS]
        self.job = {name: code.read(told, i, kind, LONG) for i, (name, kind) in enumerate(kinds)}
        self.scale = code.spread(told_float(code, self.job["scale"]))
        self.width = code.times(self.job["panels"], LANES)  # numbers of a row of scores
        rows = code.times(self.width, QUERIES)
        size = code.plus(code.times(rows, 4 + numbers.size), 64)  # _scratch_bytes
        self.scores = code.behind(self.job["scratch"], code.times(code.thread(), size), BYTE)
        self.powers = code.behind(self.scores, rows, FLOAT)
        self.inverses = code.behind(self.powers, rows, numbers.unit)

    def build(self) -> None:
        """Pack, wait for the others, attend."""
        code, job = self.code, self.job
        with code.each(*code.share(code.times(job["batch"], job["kv_heads"], job["panels"]))) as task:
            self._pack(task)
        code.wait()
        blocks = code.sdiv(code.plus(job["tokens"], QUERIES - 1), LONG(QUERIES))
        with code.each(*code.share(code.times(job["batch"], job["heads"], blocks))) as task:
            head = code.sdiv(task, blocks)
            batch, head_in_batch = code.sdiv(head, job["heads"]), code.srem(head, job["heads"])
            self._attend(batch, head_in_batch, code.times(code.srem(task, blocks), QUERIES))
        code.ret_void()

    def _least(self, first: ir.Value, second: ir.Value) -> ir.Value:
        return self.code.select(self.code.icmp_signed("<", first, second), first, second)

    def _row(self, name: str, batch: ir.Value, head: ir.Value, token: ir.Value) -> ir.Value:
        """Address of a token's row; behind the last token, the last one's."""
        code, job = self.code, self.job
        last = code.sub(job["tokens" if name == "q" else "slots"], LONG(1))
        token = self._least(token, last)
        places = (
            code.times(index, job[f"{name}_{part}"])
            for index, part in ((batch, "batch"), (head, "head"), (token, "token"))
        )
        return code.behind(job[name], code.plus(*places), self.numbers.unit)

    def _pack(self, task: ir.Value) -> None:
        """16 keys as [words of d, 16 keys], the same tokens' values as [words of tokens, d]."""
        code, d, per_word = self.code, self.d, self.numbers.per_word
        group = code.sdiv(task, self.job["panels"])
        batch, head = code.sdiv(group, self.job["kv_heads"]), code.srem(group, self.job["kv_heads"])
        first = code.times(code.srem(task, self.job["panels"]), LANES)
        place = code.times(task, d * LANES // per_word)
        rows = [self._row("k", batch, head, code.plus(first, lane)) for lane in range(LANES)]
        with code.each(0, d // per_word) as word:
            words: ir.Value = ir.Constant(WORDS, ir.Undefined)
            for lane, row in enumerate(rows):
                words = code.insert_element(words, code.read(row, word, WORD, WORD), WORD(lane))
            code.write(words, self.job["keys"], code.plus(place, code.times(word, LANES)), WORD)
        for word in range(LANES // per_word):
            rows = [
                self._row("v", batch, head, code.plus(first, word * per_word + i)) for i in range(per_word)
            ]
            starts = [code.ptrtoint(row, LONG) for row in rows]
            apart = [code.sdiv(code.sub(start, starts[0]), LONG(self.numbers.size)) for start in starts]
            with code.each(0, d, LANES) as column:
                words = self.numbers.beside(code, rows[0], [code.plus(offset, column) for offset in apart])
                code.write(words, self.job["values"], code.plus(place, word * d, column), WORD)

    def _attend(self, batch: ir.Value, head: ir.Value, first: ir.Value) -> None:
        """Eight queries of a head."""
        code, job = self.code, self.job
        sharing = code.sdiv(job["heads"], job["kv_heads"])
        group = code.plus(code.times(batch, job["kv_heads"]), code.sdiv(head, sharing))
        packed = code.times(group, job["panels"], self.d * LANES // self.numbers.per_word)
        keys, values = (code.behind(job[name], packed, WORD) for name in ("keys", "values"))
        rows = [self._row("q", batch, head, code.plus(first, row)) for row in range(QUERIES)]
        slot = code.plus(code.read(job["starts"], batch, LONG, LONG), first)  # of the first of them
        end = self._least(code.plus(slot, QUERIES), self.width)  # of the keys that any of them sees
        with code.each(0, end, REGISTERS * LANES) as start:
            panels = code.behind(keys, code.times(start, self.d // self.numbers.per_word), WORD)
            self._score(rows, panels, start)
        with code.each(0, QUERIES) as row:
            self._soften(row, self._least(code.plus(slot, row, 1), job["slots"]), end)
        token = code.plus(code.times(batch, job["tokens"]), first)
        place = code.plus(code.times(token, job["heads"]), head)
        out = code.behind(job["out"], code.times(place, self.d), self.numbers.unit)
        count = self.d // LANES
        parts = -(-count // REGISTERS)  # as even as can be: a tile of one register waits for its sums
        for part in range(parts):
            registers = list(range(part * count // parts, (part + 1) * count // parts))
            self._mix(registers, values, first, end, out)

    def _score(self, rows: list[ir.Value], keys: ir.Value, start: ir.Value) -> None:
        """Products of all rows with the keys of some panels."""
        code, count = self.code, self.d // self.numbers.per_word  # of words
        sums = tile_of_sums(code, QUERIES, REGISTERS)
        with code.each(0, count) as word:
            at = code.times(word, LANES)
            held = [code.read(keys, code.plus(at, i * count * LANES), WORDS, WORD) for i in range(REGISTERS)]
            words = [code.read(row, word, WORD, WORD) for row in rows]
            add_to_tile(code, self.numbers, sums, words, held)
        for row, of_row in enumerate(sums):
            for register, place in enumerate(of_row):
                at = code.plus(code.times(self.width, row), start, register * LANES)
                put_floats(code, code.load(place, typ=FLOATS), self.scores, at)

    def _soften(self, row: ir.Value, count: ir.Value, end: ir.Value) -> None:
        """Powers of a row's first ``count`` scores less the largest, zeros to ``end``; their inverse sum."""
        code = self.code
        start = code.times(row, self.width)
        largest = code.local(same(FLOAT, _NEVER))
        with code.each(0, count, LANES) as at:
            seen = lanes_before(
                code, code.sub(count, at), floats(code, self.scores, code.plus(start, at)), _NEVER
            )
            code.update(largest, FLOATS, partial(larger, code), seen)
        top = code.run("llvm.vector.reduce.fmaximum.v16f32", FLOAT, code.load(largest, typ=FLOATS))
        top = code.spread(top)
        total = code.local(same(FLOAT, 0.0))
        with code.each(0, end, LANES) as at:
            less = code.fsub(floats(code, self.scores, code.plus(start, at)), top)
            power = exponential(code, code.fmul(less, self.scale))
            power = lanes_before(code, code.sub(count, at), power, 0.0)
            code.update(total, FLOATS, code.fadd, power)
            self.numbers.put_normal(code, power, self.powers, code.plus(start, at))
        inverse = code.fdiv(FLOAT(1.0), code.total(code.load(total, typ=FLOATS)))
        code.write(inverse, self.inverses, row, FLOAT)

    def _mix(
        self, registers: list[int], values: ir.Value, first: ir.Value, end: ir.Value, out: ir.Value
    ) -> None:
        """Means of some columns of the values."""
        code, d, numbers = self.code, self.d, self.numbers
        sums = tile_of_sums(code, QUERIES, len(registers))
        words = code.sdiv(code.plus(end, numbers.per_word - 1), LONG(numbers.per_word))
        with code.each(0, words) as word:
            at, token = code.times(word, d), code.times(word, numbers.per_word)
            held = [code.read(values, code.plus(at, i * LANES), WORDS, WORD) for i in registers]
            starts = [code.plus(code.times(self.width, row), token) for row in range(QUERIES)]
            powers = [code.read(self.powers, start, WORD, numbers.unit) for start in starts]
            add_to_tile(code, numbers, sums, powers, held)
        for row, of_row in enumerate(sums):
            there = code.icmp_signed("<", code.plus(first, row), self.job["tokens"])
            with code.if_then(there):
                inverse = code.spread(code.read(self.inverses, row, FLOAT, FLOAT))
                for register, place in zip(registers, of_row, strict=True):
                    to = code.plus(code.times(self.job["heads"], row, d), register * LANES)
                    numbers.put(code, code.fmul(code.load(place, typ=FLOATS), inverse), out, to)
