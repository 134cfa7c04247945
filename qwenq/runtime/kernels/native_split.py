"""Attention of a decode step over a long cache, split: what a thread takes is a stretch of slots.

Flash-decoding (Dao et al., 2023): each stretch has a softmax of its own, and their results are joined by
their largest scores. Query heads that share keys and values pass over them together, so those are read once.
Stretches have a fixed length, whatever the number of threads: the result does not depend on it.
"""

from __future__ import annotations

from functools import partial

from llvmlite import ir

from qwenq.native.code import FLOAT, LANES, LONG, Code, same
from qwenq.native.floats import (
    FLOATS,
    exponential,
    floats,
    lanes_before,
    multiply_add,
    put_floats,
)
from qwenq.runtime.kernels.native_layout import STRETCH, Shape, part_floats
from qwenq.runtime.kernels.native_rotation import cache_start

_SUMS = 16  # registers for sums; the rest is for what is added to them
_NEVER = float("-inf")


class SplitAttention:
    """Builds both passes into the code of one thread.

    Args:
        code: where.
        job: values of ``native_layout.JOB``.
        shape: sizes.
    """

    def __init__(self, code: Code, job: dict[str, ir.Value], shape: Shape) -> None:
        self.code, self.job, self.shape, self.d = code, job, shape, shape.head_dim
        self.group = shape.heads // shape.kv_heads
        self.query_heads = shape.heads + 2 * shape.kv_heads  # of a row of qkv
        self.wide = max(1, min(4, _SUMS // self.group))  # registers of slots, side by side
        self.slice = max(1, min(self.d // LANES, _SUMS // self.group))  # registers of a head's values

    def parts(self, layer: ir.Value) -> None:
        """This thread's share of the stretches of all rows and key/value heads."""
        code, shape, splits = self.code, self.shape, self.job["splits"]
        scores = code.behind(self.job["scores"], code.times(code.thread(), self.group * STRETCH), FLOAT)
        with code.each(*code.share(code.times(self.job["rows"], shape.kv_heads, splits))) as task:
            split, pair = code.srem(task, splits), code.sdiv(task, splits)
            row, kv_head = code.sdiv(pair, LONG(shape.kv_heads)), code.srem(pair, LONG(shape.kv_heads))
            start = code.times(split, STRETCH)
            end = self._end(row, start)
            cache = cache_start(code, self.job, shape, layer, row, kv_head)
            first_head = code.times(kv_head, self.group)
            query = code.times(code.plus(code.times(row, self.query_heads), first_head), self.d)
            largest = self._all_scores(query, code.behind(self.job["keys"], cache, FLOAT), start, end, scores)
            head = code.plus(code.times(row, shape.heads), first_head)
            places = [
                code.times(code.plus(code.times(code.plus(head, i), splits), split), part_floats(self.d))
                for i in range(self.group)
            ]
            self._softmax(scores, code.sub(end, start), largest, places)
            self._mix(code.behind(self.job["values"], cache, FLOAT), scores, start, end, places)

    def join(self) -> None:
        """This thread's share of the heads of all rows, from their parts."""
        code, splits, parts = self.code, self.job["splits"], self.job["parts"]
        with code.each(*code.share(code.times(self.job["rows"], self.shape.heads))) as task:
            first = code.times(task, splits)
            top = code.local(FLOAT(_NEVER))
            with code.each(first, code.plus(first, splits)) as part:
                largest = code.read(
                    parts, code.plus(code.times(part, part_floats(self.d)), self.d), FLOAT, FLOAT
                )
                code.update(top, FLOAT, partial(code.run, "llvm.maximum.f32", FLOAT), largest)
            top = code.spread(code.load(top, typ=FLOAT))
            total = code.local(same(FLOAT, 0.0))
            sums = [code.local(same(FLOAT, 0.0)) for _ in range(self.d // LANES)]
            with code.each(first, code.plus(first, splits)) as part:
                at = code.times(part, part_floats(self.d))
                largest, powers = (
                    code.spread(code.read(parts, code.plus(at, self.d + i), FLOAT, FLOAT)) for i in range(2)
                )
                weight = exponential(code, code.fsub(largest, top))
                code.update(total, FLOATS, self._add_product, weight, powers)
                for register, place in enumerate(sums):
                    mixed = floats(code, parts, code.plus(at, register * LANES))
                    code.update(place, FLOATS, self._add_product, weight, mixed)
            for register, place in enumerate(sums):
                value = code.fdiv(code.load(place, typ=FLOATS), code.load(total, typ=FLOATS))
                to = code.plus(code.times(task, self.d), register * LANES)
                put_floats(code, value, self.job["mixed"], to)

    def _end(self, row: ir.Value, start: ir.Value) -> ir.Value:
        """Of a stretch that begins there: the row's own end, if that comes before."""
        code = self.code
        own = code.plus(code.read(self.job["positions"], row, LONG, LONG), 1)
        end = code.plus(start, STRETCH)
        return code.select(code.icmp_signed("<", own, end), own, end)

    def _all_scores(
        self, query: ir.Value, keys: ir.Value, start: ir.Value, end: ir.Value, scores: ir.Value
    ) -> list[ir.Value]:
        """Scores [group, STRETCH] of a stretch; returns the largest of each head, lane by lane."""
        code = self.code
        largest = [code.local(same(FLOAT, _NEVER)) for _ in range(self.group)]
        wide = self.wide * LANES
        whole = code.plus(start, code.times(code.sdiv(code.sub(end, start), LONG(wide)), wide))
        for first, last, registers in ((start, whole, self.wide), (whole, end, 1)):
            with code.each(first, last, registers * LANES) as slot:
                sums = self._scores(query, keys, slot, registers)
                for head, places in enumerate(sums):
                    for register, place in enumerate(places):
                        at = code.plus(slot, register * LANES)
                        score = lanes_before(code, code.sub(end, at), code.load(place, typ=FLOATS), _NEVER)
                        put_floats(code, score, scores, code.plus(code.sub(at, start), head * STRETCH))
                        take = partial(code.run, "llvm.maximum.v16f32", FLOATS)
                        code.update(largest[head], FLOATS, take, score)
        return largest

    def _scores(
        self, query: ir.Value, keys: ir.Value, slot: ir.Value, registers: int
    ) -> list[list[ir.Value]]:
        """Products of every head of the group with the keys of so many registers of slots."""
        code = self.code
        sums = [[code.local(same(FLOAT, 0.0)) for _ in range(registers)] for _ in range(self.group)]
        with code.each(0, self.d) as i:
            at = code.plus(code.times(i, self.job["slots"]), slot)
            held = [floats(code, keys, code.plus(at, register * LANES)) for register in range(registers)]
            for head, places in enumerate(sums):
                number = code.read(self.job["qkv"], code.plus(query, i, head * self.d), FLOAT, FLOAT)
                for key, place in zip(held, places, strict=True):
                    code.update(place, FLOATS, self._add_product, code.spread(number), key)
        return sums

    def _softmax(
        self, scores: ir.Value, count: ir.Value, largest: list[ir.Value], places: list[ir.Value]
    ) -> None:
        """Powers in place of the scores; their sums and the largest scores go to the parts."""
        code = self.code
        for head, (lanes, place) in enumerate(zip(largest, places, strict=True)):
            top = code.run("llvm.vector.reduce.fmaximum.v16f32", FLOAT, code.load(lanes, typ=FLOATS))
            sums = code.local(same(FLOAT, 0.0))
            with code.each(0, count, LANES) as slot:
                at = code.plus(slot, head * STRETCH)
                power = exponential(code, code.fsub(floats(code, scores, at), code.spread(top)))
                power = lanes_before(code, code.sub(count, slot), power, 0.0)
                put_floats(code, power, scores, at)
                code.update(sums, FLOATS, code.fadd, power)
            code.write(top, self.job["parts"], code.plus(place, self.d), FLOAT)
            total = code.total(code.load(sums, typ=FLOATS))
            code.write(total, self.job["parts"], code.plus(place, self.d + 1), FLOAT)

    def _mix(
        self, values: ir.Value, scores: ir.Value, start: ir.Value, end: ir.Value, places: list[ir.Value]
    ) -> None:
        """Values by their powers, a slice of all heads of the group at a time."""
        code = self.code
        for first in range(0, self.d // LANES, self.slice):
            registers = range(first, min(first + self.slice, self.d // LANES))
            sums = [[code.local(same(FLOAT, 0.0)) for _ in registers] for _ in places]
            with code.each(start, end) as slot:
                at = code.times(slot, self.d)
                held = [floats(code, values, code.plus(at, register * LANES)) for register in registers]
                for head, own in enumerate(sums):
                    power = code.plus(code.sub(slot, start), head * STRETCH)
                    weight = code.spread(code.read(scores, power, FLOAT, FLOAT))
                    for value, place in zip(held, own, strict=True):
                        code.update(place, FLOATS, self._add_product, weight, value)
            for part, own in zip(places, sums, strict=True):
                for register, place in zip(registers, own, strict=True):
                    to = code.plus(part, register * LANES)
                    put_floats(code, code.load(place, typ=FLOATS), self.job["parts"], to)

    def _add_product(self, total: ir.Value, first: ir.Value, second: ir.Value) -> ir.Value:
        return multiply_add(self.code, first, second, total)
