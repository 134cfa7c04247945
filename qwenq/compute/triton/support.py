"""Multiply matrices in kernels alike by Triton's compiler and its interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from qwenq.compute.gpu import interpreting

LOG2E = 1.4426950408889634
INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return ``tl.dot`` with a float32 result.

    The interpreter keeps bfloat16 as 16-bit integers and would multiply those; products of two bfloat16 are
    exact in float32, so widening first is what tensor cores do.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)
