"""Making H safe to factorise: dead columns, and the least damping that Cholesky accepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenq.errors import QuantisationError
from qwenq.gptq.solver import inverse_factor

BISECTIONS = (
    6  # after the first success: the damping found is within 10^(1/2^6) = 4 % of the least that works
)
LARGEST_DAMP = 1e4  # beyond this H is noise: rounding to nearest would be as good


@dataclass(frozen=True)
class Damped:
    """A Hessian that factorises.

    Attributes:
        H: [in, in], damped, natural order.
        U: [in, in], ``inverse_factor`` of H in ``order``.
        order: [in] int64, the order in which columns are rounded.
        damp: the share of the mean diagonal that was added.
        dead: number of columns whose input was always zero.
    """

    H: Tensor
    U: Tensor
    order: Tensor
    damp: float
    dead: int


def damped(H: Tensor, damp: float, order: Tensor) -> Damped:
    """Add ``damp`` · mean(diag H) to the diagonal; more, found by bisection, when that is not enough.

    A dead column costs nothing whatever its weight is; its diagonal is set to the mean, which makes GPTQ
    round it to nearest and leave the others alone.

    Args:
        H: [in, in] float32; changed in place.
        damp: GPTQ's ``damp_percent`` as a share.
        order: [in] int64, a permutation of the columns.

    Raises:
        QuantisationError: H holds NaN or Inf, as the activations did, or no damping makes it positive
            definite.
    """
    diagonal = H.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise QuantisationError(
            "its input holds NaN or Inf, or values too large to square",
            hint="activations overflowed: use --dtype float32; if they still do, the weights are damaged",
        )
    dead = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    diagonal[dead] = mean
    used = 0.0

    def attempt(share: float) -> Tensor | None:
        nonlocal used
        diagonal.add_((share - used) * mean)
        used = share
        return inverse_factor(H, order)[0]

    U = attempt(damp)
    if U is None:
        low, high = damp, damp * 10
        while (U := attempt(high)) is None:
            low, high = high, high * 10
            if high > LARGEST_DAMP:
                raise QuantisationError(
                    "the Hessian is not positive definite whatever the damping",
                    hint="use more, and more varied, calibration text",
                )
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5
            if (found := attempt(middle)) is None:
                low = middle
            else:
                high, U = middle, found
        if used != high:
            diagonal.add_((high - used) * mean)
            used = high
    return Damped(H, U, order, used, int(dead.sum()))
