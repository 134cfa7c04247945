"""What lies between a block's products: norms, rotary positions, the gated activation.

torch takes several passes over memory for each, compiled code for CPUs with AVX-512 takes one.
Activations are bfloat16 or float32, sums and powers float32; what transformers' blocks round to bfloat16 on
the way is rounded here, too, so that the results are theirs but for the last bit of a sum or power.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

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
    vector,
)
from qwenq.native.floats import FLOATS, exponential, float_bits, multiply_add, told_float
from qwenq.native.numbers import NUMBERS, Numbers

_LOWEST = -88.0  # of what ``exponential`` tells apart: below, SiLU is zero
_PAIRS = (
    LANES // 2
)  # of a head's numbers, half its width apart, in a register: the first ones, then the second
_FIRST = ir.Constant(vector(ir.IntType(1)), [lane < _PAIRS for lane in range(LANES)])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight · x / √(mean x² + eps)``, normalised in float32, rounded, then weighed; a new tensor.

    Args:
        x: […, d] bfloat16 or float32, d a multiple of 16.
        weight: [d] of that dtype.
        eps: added to the mean.

    Raises:
        ValueError: tensors of other dtypes, devices or shapes. The code reads memory by these numbers.
    """
    _check_width(x=x, weight=weight)
    d = x.shape[-1]
    if weight.shape != (d,):
        raise ValueError(f"a weight {list(weight.shape)} does not fit x {list(x.shape)}")
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    addresses = (tensor.data_ptr() for tensor in (x, weight, out))
    _norm_code(x.dtype)(*addresses, x.numel() // d, d, float_bits(eps), torch.get_num_threads())
    return out


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` in the place of ``gate``, which is returned.

    Args:
        gate: […, d] bfloat16 or float32, contiguous, d a multiple of 16.
        up: of the same shape and dtype.

    Raises:
        ValueError: tensors of other dtypes, devices, shapes or strides.
    """
    _check_width(gate=gate, up=up)
    if gate.shape != up.shape or not gate.is_contiguous():
        raise ValueError(
            f"gate {list(gate.shape)} with strides {gate.stride()} is not contiguous or not of the shape "
            f"of up, {list(up.shape)}"
        )
    d = gate.shape[-1]
    _run_swiglu(gate, up.contiguous(), gate, d, d)
    return gate


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` of what one product gave side by side; a new tensor.

    Args:
        gate_up: […, 2 · d] bfloat16 or float32, contiguous, d a multiple of 16.

    Returns:
        […, d].

    Raises:
        ValueError: tensors of other dtypes, devices, shapes or strides.
    """
    d = gate_up.shape[-1] // 2
    gate, up = gate_up.split([d, gate_up.shape[-1] - d], dim=-1)
    _check_width(gate=gate, up=up)
    if gate.shape != up.shape or not gate_up.is_contiguous():
        raise ValueError(f"gate and up {list(gate_up.shape)} with strides {gate_up.stride()}")
    out = torch.empty(gate.shape, dtype=gate_up.dtype)
    _run_swiglu(gate, up, out, d, 2 * d)
    return out


def _run_swiglu(gate: Tensor, up: Tensor, out: Tensor, d: int, stride: int) -> None:
    """``stride``: from a row of both to their next; those of ``out`` follow each other."""
    addresses = (tensor.data_ptr() for tensor in (gate, up, out))
    _swiglu_code(out.dtype)(*addresses, out.numel() // d, d, stride, torch.get_num_threads())


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn queries and keys by their positions, in place: ``x · cos + (-x₂, x₁) · sin``, halves of each head.

    Args:
        q: [batch, tokens, heads, d] bfloat16 or float32, d a multiple of 16; any strides but of heads and d,
            which lie beside each other.
        k: [batch, tokens, kv_heads, d], likewise.
        cos, sin: [batch or 1, tokens, d] of that dtype.

    Raises:
        ValueError: tensors of other dtypes, devices, shapes or strides.
    """
    _check_rotary(q, k, cos, sin)
    cos, sin = (x.expand(len(q), -1, -1) for x in (cos, sin))
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    batch, tokens, _, d = q.shape
    strides = (stride for x in (q, k, cos, sin) for stride in x.stride()[:2])
    addresses = (x.data_ptr() for x in (q, k, cos, sin))
    _rotary_code(d, q.dtype)(
        *addresses, batch, tokens, q.shape[2], k.shape[2], *strides, torch.get_num_threads()
    )


def _check_memory(**tensors: Tensor) -> None:
    wanted = next(iter(tensors.values())).dtype
    for name, x in tensors.items():
        if x.dtype not in NUMBERS or x.dtype != wanted or x.device.type != "cpu":
            kinds = "bfloat16 or float32" if x.dtype == wanted else str(wanted).removeprefix("torch.")
            raise ValueError(f"{name} is {x.dtype} on {x.device}, not {kinds} on the CPU")


def _check_width(**tensors: Tensor) -> None:
    _check_memory(**tensors)
    for name, x in tensors.items():
        if not x.ndim or not x.shape[-1] or x.shape[-1] % LANES:
            raise ValueError(f"{name} {list(x.shape)} has rows whose width is no multiple of {LANES}")


def _check_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    _check_memory(q=q, k=k, cos=cos, sin=sin)
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or x.shape[-1] == 0 or x.shape[-1] % LANES:
            raise ValueError(
                f"{name} is {list(x.shape)}, not [batch, tokens, heads, d] with d a multiple of {LANES}"
            )
        # Sizes of one have no stride that matters, but torch keeps one.
        if x.stride(3) != 1 or (x.shape[2] > 1 and x.stride(2) != x.shape[3]):
            raise ValueError(f"heads of {name} do not lie beside each other: strides {x.stride()}")
        for axis in range(2):
            if x.shape[axis] > 1 and x.stride(axis) < x.shape[2] * x.shape[3]:
                raise ValueError(f"tokens of {name} share memory: strides {x.stride()}")
    batch, tokens, _, d = q.shape
    fitting = ((batch, tokens, d), (1, tokens, d))
    if k.shape[:2] != q.shape[:2] or k.shape[3] != d or cos.shape not in fitting or sin.shape not in fitting:
        shapes = (list(x.shape) for x in (q, k, cos, sin))
        raise ValueError("q is {}, so k {}, cos {} and sin {} do not fit".format(*shapes))


def _start(pointers: int, numbers: int) -> tuple[Code, list[ir.Value]]:
    """What a thread runs, and what it is told: so many addresses, then so many integers."""
    code = Code(ir.Module(), "thread", POINTER)
    (told,) = code.function.args
    kinds = [POINTER] * pointers + [LONG] * numbers
    return code, [code.read(told, i, kind, LONG) for i, kind in enumerate(kinds)]


def _finish(code: Code, told: list[ir.Value]) -> Any:
    """The function, compiled; its arguments are what is told and the number of threads, 64-bit integers."""
    code.ret_void()
    on_all_threads(code.module, "block_part", "thread", len(told))
    return compiled(code.module, "block_part", len(told) + 1)


@cache
def _norm_code(dtype: torch.dtype) -> Any:
    numbers = NUMBERS[dtype]
    code, told = _start(3, 3)
    x, weight, out, rows, d, eps = told
    with code.each(*code.share(rows)) as row:
        start = code.times(row, d)
        squares = code.local(same(FLOAT, 0.0))
        with code.each(0, d, LANES) as column:
            number = numbers.read(code, x, code.plus(start, column))
            code.store(multiply_add(code, number, number, code.load(squares, typ=FLOATS)), squares)
        mean = code.fdiv(code.total(code.load(squares, typ=FLOATS)), code.sitofp(d, FLOAT))
        root = code.run("llvm.sqrt.f32", FLOAT, code.fadd(mean, told_float(code, eps)))
        scale = code.spread(code.fdiv(FLOAT(1.0), root))
        with code.each(0, d, LANES) as column:
            at = code.plus(start, column)
            normed = numbers.rounded(code, code.fmul(numbers.read(code, x, at), scale))
            numbers.put(code, code.fmul(normed, numbers.read(code, weight, column)), out, at)
    return _finish(code, told)


@cache
def _swiglu_code(dtype: torch.dtype) -> Any:
    numbers = NUMBERS[dtype]
    code, told = _start(3, 3)
    gate, up, out, rows, d, stride = told
    with code.each(*code.share(rows)) as row, code.each(0, d, LANES) as column:
        at = code.plus(code.times(row, stride), column)
        x = numbers.read(code, gate, at)
        below = code.fadd(same(FLOAT, 1.0), exponential(code, code.fneg(x)))
        # The power of what is lower still is infinite; -inf / inf is no number, as torch has it.
        low = code.fcmp_ordered("<", x, same(FLOAT, _LOWEST))
        silu = code.fdiv(x, code.select(low, same(FLOAT, float("inf")), below))
        to = code.plus(code.times(row, d), column)
        gated = code.fmul(numbers.rounded(code, silu), numbers.read(code, up, at))
        numbers.put(code, gated, out, to)
    return _finish(code, told)


@cache
def _rotary_code(d: int, dtype: torch.dtype) -> Any:
    """The function for one size of head."""
    numbers = NUMBERS[dtype]
    code, told = _start(4, 12)
    q, k, cos, sin, batch, tokens, q_heads, k_heads, *strides = told
    with code.each(*code.share(code.times(batch, tokens))) as task:
        index, token = code.sdiv(task, tokens), code.srem(task, tokens)
        q_row, k_row, cos_row, sin_row = (
            code.behind(
                base,
                code.plus(code.times(index, strides[2 * i]), code.times(token, strides[2 * i + 1])),
                numbers.unit,
            )
            for i, base in enumerate((q, k, cos, sin))
        )
        for column in range(0, d // 2, _PAIRS):
            angles = [_read_pairs(code, numbers, table, d, column) for table in (cos_row, sin_row)]
            for row, heads in ((q_row, q_heads), (k_row, k_heads)):
                with code.each(0, heads) as head:
                    of_head = code.behind(row, code.times(head, d), numbers.unit)
                    _turn(code, numbers, of_head, d, column, *angles)
    return _finish(code, told)


def _turn(
    code: Code, numbers: Numbers, head: ir.Value, d: int, column: int, cos: ir.Value, sin: ir.Value
) -> None:
    """Eight numbers of a head's first half and those that they are paired with."""
    own = _read_pairs(code, numbers, head, d, column)
    swapped = _lanes(code, own, [*range(_PAIRS, LANES), *range(_PAIRS)])
    other = code.select(_FIRST, code.fneg(swapped), swapped)
    parts = (numbers.rounded(code, code.fmul(x, angle)) for x, angle in ((own, cos), (other, sin)))
    turned = code.fadd(*parts)
    for half in range(2):
        eight = _lanes(code, turned, list(range(half * _PAIRS, (half + 1) * _PAIRS)))
        numbers.put(code, eight, head, column + half * (d // 2))


def _read_pairs(code: Code, numbers: Numbers, row: ir.Value, d: int, column: int) -> ir.Value:
    """Eight numbers of a row's first half and the eight at the same place of the second."""
    first, second = (numbers.read(code, row, column + start, _PAIRS) for start in (0, d // 2))
    return code.shuffle_vector(first, second, ir.Constant(vector(WORD), list(range(LANES))))


def _lanes(code: Code, value: ir.Value, which: list[int]) -> ir.Value:
    """Some lanes of a register, in this order."""
    return code.shuffle_vector(value, value, ir.Constant(vector(WORD, len(which)), which))
