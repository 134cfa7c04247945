"""Products of bfloat16 matrices by whichever unit of the CPU is faster: bfloat16's, or float32's.

Either multiplies the same numbers exactly, adds in float32 and rounds the sum to bfloat16 once; what differs
is the order of the additions. On Intel's CPUs without AMX, and where bfloat16 is emulated, float32 is faster
even with the conversions, once there are enough rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qwenq.models.precision import product_dtype


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Bfloat16 [rows, in] and [in, out] on the CPU → [rows, out]."""
    if float32_is_faster():
        return (x.float() @ weight.float()).to(x.dtype)
    return x @ weight


@cache
def float32_is_faster() -> bool:
    """Whether this CPU multiplies large matrices faster in float32."""
    return product_dtype("cpu") is torch.float32
