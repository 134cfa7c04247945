"""Running means of products of activations, as code for CPUs with AVX-512.

Products of two bfloat16 or float32 numbers are added in float32, the lower triangle alone where X is Y. torch
would have to convert bfloat16 to float32 first (its own bfloat16 product would round every batch's sum to
bfloat16), and to multiply in panels to leave a triangle out.

A word of an operand is one float32 of a token or, for the instruction that adds two products to each of 16
sums, the bfloat16 of two tokens (``native.numbers``). Words are put into panels of 16 columns once; a tile of
the result then reads one panel of X word by word and some of Y register by register, and keeps its sums in
registers for RUN words.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor
from torch.nn import functional

from qwenq.native.bfloat16 import WORDS
from qwenq.native.code import (
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
from qwenq.native.floats import FLOATS, float_bits, multiply_add, told_float
from qwenq.native.numbers import NUMBERS, Numbers, add_to_tile, tile_of_sums

ROWS = 8
"""Of a tile."""

REGISTERS = 3
"""Of 16 columns, of a tile: ROWS · REGISTERS sums and what they are made of fill the registers of the CPU."""

RUN = 128
"""Words whose products a tile adds up in registers: their panels stay in the cache."""

BLOCK = 6
"""Panels of X whose tiles one thread takes, one after the other, beside the same panels of Y."""

_PACK = ("x", "packed", "words", "columns", "panels")
_ADD = ("left", "right", "mean", "words", "left_panels", "right_panels", "lower", "keep", "weight")


class NativeProducts:
    """See ``products.Products``.

    Args:
        rows, columns: widths of X and Y.
        dtype: theirs, one of ``numbers.NUMBERS``.
        symmetric: X is Y; the lower triangle is enough.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, *, symmetric: bool = False) -> None:
        self._shape, self._dtype, self._symmetric = (rows, columns), dtype, symmetric
        self._per_word = NUMBERS[dtype].per_word
        right = _panels(columns, REGISTERS)
        self._panels = (right if symmetric else _panels(rows, 1)), right
        self._mean = torch.zeros(self._panels[0] * LANES, right * LANES)
        self._packed = [torch.empty(0, dtype=torch.int32)] * 2
        self._tokens = 0

    def add(self, X: Tensor, Y: Tensor) -> None:
        """See ``products.Products``.

        Raises:
            ValueError: not of that dtype in this machine's memory, or of other widths, or not of as many
                tokens.
        """
        tokens = self._tokens_of(X, Y)
        total = self._tokens + tokens
        right = self._pack(1, Y)
        left = right if self._symmetric else self._pack(0, X)
        _code("add", self._dtype)(
            left.data_ptr(), right.data_ptr(), self._mean.data_ptr(),
            self._words(tokens), *self._panels, int(self._symmetric),
            float_bits(self._tokens / total), float_bits(2.0 / total), torch.get_num_threads(),
        )  # fmt: skip
        self._tokens = total

    def _words(self, tokens: int) -> int:
        return -(-tokens // self._per_word)

    def _tokens_of(self, X: Tensor, Y: Tensor) -> int:
        """Compiled code reads memory as it is told to: what it is told has to be true."""
        for x, width in zip((X, Y), self._shape, strict=True):
            if x.dtype != self._dtype or x.device.type != "cpu" or x.shape[-1] != width:
                wanted = str(self._dtype).removeprefix("torch.")
                raise ValueError(
                    f"{x.dtype} {list(x.shape)} on {x.device}, not {wanted} [..., {width}] on a CPU"
                )
        tokens = [x.numel() // width for x, width in zip((X, Y), self._shape, strict=True)]
        if tokens[0] != tokens[1]:
            raise ValueError(f"{tokens[0]} and {tokens[1]} tokens")
        return tokens[0]

    def mean(self) -> Tensor:
        """See ``products.Products``."""
        rows, columns = self._shape
        return self._mean[:rows, :columns]

    def _pack(self, side: int, X: Tensor) -> Tensor:
        """[..., columns] as int32 [panels, words, 16], by runs of RUN words; valid until the next batch."""
        columns = self._shape[side]
        x = X.reshape(-1, columns)  # [tokens, columns]
        words, panels = self._words(len(x)), self._panels[side]
        missing = words * self._per_word - len(x)
        if missing or columns % LANES:
            x = functional.pad(x, (0, -columns % LANES, 0, missing))
        if self._packed[side].numel() < words * panels * LANES:
            self._packed[side] = torch.empty(words * panels * LANES, dtype=torch.int32)
        x, packed = x.contiguous(), self._packed[side]
        sizes = words, x.shape[1], panels
        _code("pack", self._dtype)(x.data_ptr(), packed.data_ptr(), *sizes, torch.get_num_threads())
        return packed


def _panels(columns: int, together: int) -> int:
    """Panels for so many columns, a multiple of those that are read together."""
    return -(-columns // (LANES * together)) * together


@cache
def _code(name: str, dtype: torch.dtype) -> Any:
    """``pack`` or ``add``, compiled; its arguments are 64-bit integers, then the number of threads."""
    module, told = ir.Module(), _PACK if name == "pack" else _ADD
    code = Code(module, "thread", POINTER)
    (job,) = code.function.args
    kinds = {"x", "packed", "left", "right", "mean"}
    values = [code.read(job, i, POINTER if key in kinds else LONG, LONG) for i, key in enumerate(told)]
    (_build_pack if name == "pack" else _build_add)(code, NUMBERS[dtype], *values)
    code.ret_void()
    on_all_threads(module, name, "thread", len(told))
    return compiled(module, name, len(told) + 1)


def _run(code: Code, first: ir.Value, words: ir.Value) -> ir.Value:
    """Length of the run of words that begins there."""
    left = code.sub(words, first)
    return code.select(code.icmp_signed("<", left, LONG(RUN)), left, LONG(RUN))


def _build_pack(
    code: Code,
    numbers: Numbers,
    x: ir.Value,
    packed: ir.Value,
    words: ir.Value,
    columns: ir.Value,
    panels: ir.Value,
) -> None:
    """This thread's share of the words, in all panels; those behind the last column are zero."""
    with code.each(*code.share(words)) as word:
        first = code.times(code.sdiv(word, LONG(RUN)), RUN)
        run, within = _run(code, first, words), code.sub(word, first)
        start = code.plus(code.times(first, panels), within)
        row = code.times(word, numbers.per_word, columns)
        with code.each(0, code.sdiv(columns, LONG(LANES))) as panel:
            at = code.plus(row, code.times(panel, LANES))
            tokens = [code.plus(at, code.times(columns, token)) for token in range(numbers.per_word)]
            to = code.plus(start, code.times(panel, run))
            code.write(numbers.beside(code, x, tokens), packed, to, WORDS)
        with code.each(code.sdiv(columns, LONG(LANES)), panels) as panel:
            code.write(same(WORD, 0), packed, code.plus(start, code.times(panel, run)), WORDS)


def _build_add(
    code: Code,
    numbers: Numbers,
    left: ir.Value,
    right: ir.Value,
    mean: ir.Value,
    words: ir.Value,
    left_panels: ir.Value,
    right_panels: ir.Value,
    lower: ir.Value,
    keep: ir.Value,
    weight: ir.Value,
) -> None:
    """This thread's tiles, run after run; a tile is the same thread's in all of them."""
    me, threads = code.thread(), code.threads()
    keep, weight = (told_float(code, value) for value in (keep, weight))
    everything = code.icmp_signed("==", lower, LONG(0))
    with code.each(0, words, RUN) as first:
        run = _run(code, first, words)
        kept = code.select(code.icmp_signed("==", first, LONG(0)), keep, FLOAT(1.0))
        factors = code.spread(kept), code.spread(weight)
        lefts, rights = (
            code.behind(base, code.times(first, panels), WORDS)
            for base, panels in ((left, left_panels), (right, right_panels))
        )
        with code.each(0, right_panels, REGISTERS) as column, code.each(0, left_panels, BLOCK) as block:
            diagonal = code.plus(code.sdiv(column, LONG(REGISTERS)), code.sdiv(block, LONG(BLOCK)))
            mine = code.icmp_signed("==", code.srem(diagonal, threads), me)
            last = code.plus(block, BLOCK)
            end = code.select(code.icmp_signed("<", last, left_panels), last, left_panels)
            wanted = code.or_(everything, code.icmp_signed(">", end, column))
            with code.if_then(code.and_(mine, wanted)), code.each(block, end) as panel:
                for start in range(0, LANES, ROWS):
                    x = code.behind(lefts, code.plus(code.times(panel, run, LANES), start), WORD)
                    y = code.behind(rights, code.times(column, run), WORDS)
                    row = code.plus(code.times(panel, LANES), start)
                    at = code.plus(code.times(row, right_panels), column)  # in units of 16 numbers
                    sums = _build_sums(code, numbers, x, y, run)
                    _build_update(code, code.behind(mean, at, FLOATS), right_panels, sums, factors)


def _build_sums(
    code: Code, numbers: Numbers, x: ir.Value, y: ir.Value, run: ir.Value
) -> list[list[ir.Value]]:
    """A run's products for a tile: a variable for each of its rows and registers."""
    sums = tile_of_sums(code, ROWS, REGISTERS)
    with code.each(0, run) as word:
        held = [
            code.read(y, code.plus(code.times(run, register), word), WORDS, WORDS)
            for register in range(REGISTERS)
        ]
        rows = range(ROWS)
        words = (code.read(x, code.plus(code.times(word, LANES), row), WORD, WORD) for row in rows)
        add_to_tile(code, numbers, sums, words, held)
    return sums


def _build_update(
    code: Code,
    tile: ir.Value,
    stride: ir.Value,
    sums: list[list[ir.Value]],
    factors: tuple[ir.Value, ir.Value],
) -> None:
    """``keep · mean + weight · sum`` for a tile whose rows lie ``stride`` times 16 numbers apart."""
    keep, weight = factors
    for row, of_row in enumerate(sums):
        for register, place in enumerate(of_row):
            at = code.plus(code.times(stride, row), register)
            kept = code.fmul(code.read(tile, at, FLOATS, FLOATS), keep)
            code.write(multiply_add(code, code.load(place, typ=FLOATS), weight, kept), tile, at, FLOATS)
