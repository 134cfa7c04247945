"""Before attention in a decode step: queries and keys are rotated, keys and values go to the cache.

The cache is float32 and laid out for steps, see ``step_layout``.
"""

from __future__ import annotations

from llvmlite import ir

from qwenq.native.code import FLOAT, LANES, LONG, Code, same
from qwenq.native.floats import floats, multiply_add, put_floats
from qwenq.runtime.kernels.native_layout import Shape


def cache_start(
    code: Code, job: dict[str, ir.Value], shape: Shape, layer: ir.Value, row: ir.Value, kv_head: ir.Value
) -> ir.Value:
    """Numbers in the cache before the keys, or the values, of a head of a row."""
    heads = code.plus(code.times(row, shape.kv_heads), kv_head)
    return code.plus(code.times(layer, job["layer_stride"]), code.times(heads, job["slots"], shape.head_dim))


class Rotation:
    """Builds it into the code of one thread.

    Args:
        code: where.
        job: values of ``native_layout.JOB``.
        shape: sizes.
    """

    def __init__(self, code: Code, job: dict[str, ir.Value], shape: Shape) -> None:
        self.code, self.job, self.shape, self.d = code, job, shape, shape.head_dim
        self.rotated = shape.heads + shape.kv_heads
        self.all_heads = shape.heads + 2 * shape.kv_heads

    def rotate_and_store(self, layer: ir.Value, bias: ir.Value, norm: ir.Value) -> None:
        """Rotate this thread's share of queries and keys; keys and values go to the cache."""
        code, shape = self.code, self.shape
        with code.each(*code.share(code.times(self.job["rows"], self.all_heads))) as task:
            row, head = code.sdiv(task, LONG(self.all_heads)), code.srem(task, LONG(self.all_heads))
            held = self._head(task, head, bias)
            turns = code.icmp_signed("<", head, LONG(self.rotated))
            with code.if_else(turns) as (rotates, stays):
                with rotates:
                    turned = self._rotated(row, head, self._normed(held, head, norm))
                    with code.if_else(code.icmp_signed("<", head, LONG(shape.heads))) as (query, key):
                        with query:
                            self._put(turned, self.job["qkv"], code.times(task, self.d))
                        with key:
                            self._put_key(layer, row, code.sub(head, LONG(shape.heads)), turned)
                with stays:
                    kv_head = code.sub(head, LONG(self.rotated))
                    start = self._cache(layer, row, kv_head)
                    to = code.plus(start, code.times(self._position(row), self.d))
                    self._put(held, self.job["values"], to)

    def _head(self, task: ir.Value, head: ir.Value, bias: ir.Value) -> list[ir.Value]:
        """A head of q, k or v, in registers."""
        code, start = self.code, self.code.times(task, self.d)
        held = [floats(code, self.job["qkv"], code.plus(start, i)) for i in range(0, self.d, LANES)]
        if not self.shape.has_bias:
            return held
        first = code.times(head, self.d)
        return [
            code.fadd(part, floats(code, bias, code.plus(first, i * LANES))) for i, part in enumerate(held)
        ]

    def _normed(self, held: list[ir.Value], head: ir.Value, norm: ir.Value) -> list[ir.Value]:
        """Qwen3's RMSNorm of each head."""
        if not self.shape.has_qk_norm:
            return held
        code, squares = self.code, same(FLOAT, 0.0)
        for part in held:
            squares = multiply_add(code, part, part, squares)
        mean = code.fadd(code.fdiv(code.total(squares), FLOAT(float(self.d))), FLOAT(self.shape.eps))
        inverse = code.spread(code.fdiv(FLOAT(1.0), code.run("llvm.sqrt.f32", FLOAT, mean)))
        first = code.times(head, self.d)
        weights = [floats(code, norm, code.plus(first, i)) for i in range(0, self.d, LANES)]
        return [
            code.fmul(code.fmul(part, inverse), weight) for part, weight in zip(held, weights, strict=True)
        ]

    def _rotated(self, row: ir.Value, head: ir.Value, held: list[ir.Value]) -> list[ir.Value]:
        """x · cos + (halves of x exchanged) · sin, the sines signed."""
        code = self.code
        first = code.plus(code.times(row, self.job["rotation_stride"]), code.times(head, self.d))
        half = len(held) // 2
        swapped = held[half:] + held[:half]
        made = []
        for i, (part, other) in enumerate(zip(held, swapped, strict=True)):
            cos, sin = (floats(code, self.job[name], code.plus(first, i * LANES)) for name in ("cos", "sin"))
            made.append(multiply_add(code, part, cos, code.fmul(other, sin)))
        return made

    def _put(self, parts: list[ir.Value], base: ir.Value, offset: ir.Value) -> None:
        for i, part in enumerate(parts):
            put_floats(self.code, part, base, self.code.plus(offset, i * LANES))

    def _put_key(self, layer: ir.Value, row: ir.Value, kv_head: ir.Value, parts: list[ir.Value]) -> None:
        """Keys lie transposed: each number of one goes to another row of slots."""
        code = self.code
        start = self._cache(layer, row, kv_head)
        position = self._position(row)
        for i in range(self.d):
            number = code.extract_element(parts[i // LANES], LONG(i % LANES))
            to = code.plus(start, code.times(self.job["slots"], i), position)
            code.write(number, self.job["keys"], to, FLOAT)

    def _cache(self, layer: ir.Value, row: ir.Value, kv_head: ir.Value) -> ir.Value:
        return cache_start(self.code, self.job, self.shape, layer, row, kv_head)

    def _position(self, row: ir.Value) -> ir.Value:
        return self.code.read(self.job["positions"], row, LONG, LONG)
