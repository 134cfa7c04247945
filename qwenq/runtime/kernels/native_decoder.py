"""A whole decode step as one piece of code: every block of a decoder, for one new token in each row.

All threads run through all blocks together and wait for each other between two parts of a block: no Python,
no dispatch, nothing between a product and the next but what has to be computed. Products are those of
``native_vnni``; all else is float32, the residual stream too. Sizes are constants in the code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from qwenq.native.bfloat16 import put_bfloat16
from qwenq.native.code import (
    FLOAT,
    LANES,
    LONG,
    NOTHING,
    POINTER,
    Code,
    compiled,
    on_all_threads,
    same,
)
from qwenq.native.floats import FLOATS, floats, put_floats, sigmoid
from qwenq.runtime.kernels.native_layout import BLOCK, JOB, LAYER, VECTORS, Shape
from qwenq.runtime.kernels.native_rotation import Rotation
from qwenq.runtime.kernels.native_split import SplitAttention
from qwenq.runtime.kernels.native_vnni import Activations, multiply, quantise


def step(shape: Shape) -> Any:
    """A function ``(job, threads)``, the address of JOB; changes ``x`` and the cache, makes ``y``."""
    module = ir.Module()
    multiply(module, "multiply", shape.bits, shape.rows, shape.scales, put_floats)
    multiply(module, "multiply_add", shape.bits, shape.rows, shape.scales, _add_floats)
    _Thread(Code(module, "thread", POINTER), shape).build()
    on_all_threads(module, "step", "thread", 1)
    return compiled(module, "step", 2)


class _Thread:
    """Builds what one thread does."""

    def __init__(self, code: Code, shape: Shape) -> None:
        self.code, self.shape = code, shape
        (arguments,) = code.function.args
        job = code.read(arguments, 0, POINTER, LONG)
        numbers = ("rotation_stride", "layer_stride", "splits", "slots", "rows", "chunks")
        self.job = {
            name: code.read(job, place, LONG if name in numbers else POINTER, LONG)
            for place, name in enumerate(JOB)
        }
        self.all_rows = code.times(self.job["chunks"], shape.rows)

    def build(self) -> None:
        """All blocks, then the final norm."""
        code, shape = self.code, self.shape
        rotation, attention = Rotation(code, self.job, shape), SplitAttention(code, self.job, shape)
        with code.each(0, shape.layers) as layer:
            block = code.behind(self.job["blocks"], code.times(layer, len(BLOCK)), LONG)
            self._quantise_normed(block, "qkv", "attention_norm")
            self._multiply(block, "qkv", "multiply", "qkv")
            bias, norm = (code.read(block, BLOCK.index(name), POINTER, LONG) for name in VECTORS[2:])
            rotation.rotate_and_store(layer, bias, norm)
            code.wait()
            attention.parts(layer)
            code.wait()
            attention.join()
            code.wait()
            self._quantise(block, "out", self._mixed)
            self._multiply(block, "out", "multiply_add", "x")
            self._quantise_normed(block, "gate_up", "mlp_norm")
            self._multiply(block, "gate_up", "multiply", "gate_up")
            self._quantise(block, "down", self._gated)
            self._multiply(block, "down", "multiply_add", "x")
        self._final_norm()
        code.ret_void()

    def _multiply(self, block: ir.Value, linear: str, function: str, to: str) -> None:
        code = self.code
        layer = code.behind(block, BLOCK.index(f"{linear}.{LAYER[0]}"), LONG)
        code.run(function, NOTHING, layer, self.job[to], self.job["workspace"], self.job["chunks"])
        code.wait()

    def _held(self, block: ir.Value, linear: str) -> Activations:
        code = self.code
        columns, group_size = (
            code.read(block, BLOCK.index(f"{linear}.{field}"), LONG, LONG)
            for field in ("columns", "group_size")
        )
        return Activations.at(code, self.job["workspace"], self.all_rows, columns, group_size)

    def _quantise(self, block: ir.Value, linear: str, read: Any) -> None:
        """``read(row, column)`` gives 16 numbers."""
        held = self._held(block, linear)
        with self.code.each(0, self.all_rows) as row:
            quantise(self.code, held, row, partial(read, row))
        self.code.wait()

    def _quantise_normed(self, block: ir.Value, linear: str, norm: str) -> None:
        """RMSNorm of the residual stream, in 16 bits."""
        code, held = self.code, self._held(block, linear)
        weight = code.read(block, BLOCK.index(norm), POINTER, LONG)
        with code.each(0, self.all_rows) as row:
            quantise(code, held, row, partial(self._normed, row, weight, self._inverse_rms(row)))
        code.wait()

    def _inverse_rms(self, row: ir.Value) -> ir.Value:
        """In all lanes; every thread computes it for itself."""
        code, hidden = self.code, self.shape.hidden
        squares = code.local(same(FLOAT, 0.0))
        with code.each(code.times(row, hidden), code.times(code.plus(row, 1), hidden), LANES) as at:
            x = floats(code, self.job["x"], at)
            code.update(squares, FLOATS, lambda old: code.run("llvm.fma.v16f32", FLOATS, x, x, old))
        total = code.total(code.load(squares, typ=FLOATS))
        mean = code.fadd(code.fdiv(total, FLOAT(float(hidden))), FLOAT(self.shape.eps))
        return code.spread(code.fdiv(FLOAT(1.0), code.run("llvm.sqrt.f32", FLOAT, mean)))

    def _normed(self, row: ir.Value, weight: ir.Value, inverse: ir.Value, column: ir.Value) -> ir.Value:
        code = self.code
        x = floats(code, self.job["x"], code.plus(code.times(row, self.shape.hidden), column))
        return code.fmul(code.fmul(x, inverse), floats(code, weight, column))

    def _mixed(self, row: ir.Value, column: ir.Value) -> ir.Value:
        width = self.shape.heads * self.shape.head_dim
        return floats(self.code, self.job["mixed"], self.code.plus(self.code.times(row, width), column))

    def _gated(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """SwiGLU: silu(gate) · up."""
        code, ffn = self.code, self.shape.ffn
        at = code.plus(code.times(row, 2 * ffn), column)
        gate, up = (
            floats(code, self.job["gate_up"], at),
            floats(code, self.job["gate_up"], code.plus(at, ffn)),
        )
        return code.fmul(code.fmul(gate, sigmoid(code, gate)), up)

    def _final_norm(self) -> None:
        code, hidden = self.code, self.shape.hidden
        with code.each(0, self.job["rows"]) as row:
            inverse = self._inverse_rms(row)
            with code.each(*code.share(hidden // LANES)) as register:
                column = code.times(register, LANES)
                normed = self._normed(row, self.job["norm"], inverse, column)
                put_bfloat16(code, normed, self.job["y"], code.plus(code.times(row, hidden), column))


def _add_floats(code: Code, value: ir.Value, base: ir.Value, offset: ir.Value) -> None:
    put_floats(code, code.fadd(value, floats(code, base, offset)), base, offset)
