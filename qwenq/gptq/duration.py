"""Estimate how long quantising takes: its operations are counted, and a matrix product is timed here.

What a layer does beside products is counted as so many operations of float32 a row and column²; both numbers
are from reports/benchmarks/quantize_profile.md. The same numbers give the times of other shapes, and of a CPU
without bfloat16, to a few tenths.
"""

from __future__ import annotations

import time

import torch

from qwenq.gptq.settings import Settings
from qwenq.models.block_shapes import ROW_PARALLEL, Block
from qwenq.models.shapes import ModelShape

OF_PEAK = 0.7  # share of a large product's rate that forward passes and Hessians reach
SOLVER, DESCENT = 15.0, 10.0
"""Operations of float32, in time, that factor, rounding and statistics take, and coordinate descent."""
_SIDE, _SECONDS = 1024, 0.1


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product, timed for a tenth of a second."""
    a, b = (torch.ones(_SIDE, _SIDE, dtype=dtype, device=device) for _ in range(2))
    a @ b  # the first one sets up what computes it
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < _SECONDS:
        a @ b
        count += 1
    return 2 * _SIDE**3 * count / seconds


def operations(block: Block, tokens: int, settings: Settings) -> tuple[float, float]:
    """Return the operations of a block in the dtype of its forward pass, and those in float32.

    Its linears count, which take almost all of the time. With asymmetric calibration the original block runs
    as well.
    """
    groups: dict[tuple[str, bool], tuple[int, int, int, int]] = {}
    for linear in block.linears:
        key = linear.name.rpartition(".")[0], linear.leaf in ROW_PARALLEL
        rows = groups.get(key, (0, 0, 0, 0))[0] + linear.rows
        groups[key] = rows, linear.columns, linear.copies, linear.active
    streams = 2 if settings.asymmetric_calibration else 1
    products = 2.0 * streams * tokens * block.active_parameters
    solving = SOLVER + (DESCENT if settings.coordinate_descent else 0.0)
    solver = 0.0
    for rows, columns, copies, active in groups.values():
        products += tokens * active * columns**2  # half of the Hessian
        if settings.asymmetric_calibration:
            products += 2.0 * tokens * active * min(columns**2, 2 * rows * columns)
        solver += solving * copies * rows * columns**2
    return products, solver


def seconds_of_layers(
    shape: ModelShape, tokens: int, settings: Settings, rates: tuple[float, float], done: int = 0
) -> float:
    """Return the seconds that the layers take which an earlier run has not done.

    ``rates`` are those of a product in the dtype of the forward pass, and in float32.
    """
    fast, plain = rates
    seconds = 0.0
    for block in shape.blocks:
        products, solver = operations(block, tokens, settings)
        left = sum(layer >= done for layer in block.layers)
        seconds += left * (products / (OF_PEAK * fast) + solver / plain)
    return seconds
