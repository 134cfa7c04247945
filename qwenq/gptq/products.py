"""Running means of products of activations, 2/n · Σ Xᵀ Y in float32: what Hessian and drift are made of.

For a process that works alone: the last bits depend on the order of the batches, so several processes cannot
share this work and find the same integers. They, and a process that torchrun started alone, take ``exact``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qwenq.gptq import columns
from qwenq.native import support

PANEL = (
    192  # columns a product covers: wide enough for GEMM's speed, narrow enough to skip the upper triangle
)


class Products(Protocol):
    """A mean over the batches so far."""

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Another batch: [..., rows] and [..., columns], as many tokens in both."""
        ...

    def mean(self) -> Tensor:
        """2/n · Σ Xᵀ Y, [rows, columns] float32: what further batches would change in place."""
        ...


def products(rows: int, columns: int, like: Tensor, *, symmetric: bool = False) -> Products:
    """A mean over no batches yet.

    Args:
        rows, columns: widths of X and Y.
        like: activations as they will come: their dtype and device decide how products are computed.
        symmetric: X is Y; what is above the diagonal need not be right.
    """
    if are_compiled(like):
        from qwenq.gptq.native_products import NativeProducts

        return NativeProducts(rows, columns, like.dtype, symmetric=symmetric)
    return Float32Products(rows, columns, like.device, symmetric=symmetric)


def are_compiled(like: Tensor) -> bool:
    """Whether ``products`` of such activations are compiled code's."""
    return native_why_not(like.dtype, like.device) is None


def native_why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why products are not compiled for this CPU, in words that follow "because"; None: they are."""
    if device.type != "cpu":
        return f"that is for CPUs, not for {device.type}"
    return support.why_not_multiply(dtype)


def passed_over(dtype: torch.dtype, device: torch.device, *, exact: bool = False) -> str | None:
    """A sentence on compiled code that this machine or this installation lacks; None: none is missed.

    Products are compiled for bfloat16 and float32 on a CPU; ``columns`` and ``scales`` whatever the
    activations are; on a GPU columns alone.

    Args:
        exact: products are ``exact``'s, which are never compiled.
    """
    on_cpu = device.type == "cpu"
    summing = native_why_not(dtype, device) if on_cpu and dtype in support.FEATURES and not exact else None
    rounding = columns.missed(device)
    if not on_cpu:
        what = "rounding is"
    elif rounding:
        what = "Hessians, scales and rounding are" if summing else "scales and rounding are"
    else:
        what = "Hessians are"
    why = summing or rounding
    return f"{what} left to torch, which takes longer, because {why}" if why else None


class Float32Products:
    """By torch, activations of any float dtype converted to float32 first."""

    def __init__(
        self, rows: int, columns: int, device: torch.device | str, *, symmetric: bool = False
    ) -> None:
        self._mean = torch.zeros(rows, columns, dtype=torch.float32, device=device)
        self._rooms = [torch.empty(0, width, dtype=torch.float32, device=device) for width in (rows, columns)]
        self._symmetric, self._tokens = symmetric, 0

    def add(self, X: Tensor, Y: Tensor) -> None:
        """See ``Products``."""
        y = self._float32(1, Y)
        total = self._tokens + y.shape[0]
        keep, weight = self._tokens / total, 2.0 / total
        if self._symmetric:
            for start in range(0, y.shape[1], PANEL):  # the lower triangle only
                panel = y[:, start : start + PANEL]
                square = self._mean[start:, start : start + PANEL]
                square.addmm_(y[:, start:].T, panel, beta=keep, alpha=weight)
        else:
            self._mean.addmm_(self._float32(0, X).T, y, beta=keep, alpha=weight)
        self._tokens = total

    def mean(self) -> Tensor:
        """See ``Products``."""
        return self._mean

    def _float32(self, side: int, X: Tensor) -> Tensor:
        """[tokens, width], in space that is allocated once: new pages cost time."""
        x = X.reshape(-1, self._rooms[side].shape[1])  # [tokens, width]
        if len(self._rooms[side]) < len(x):
            self._rooms[side] = torch.empty_like(x, dtype=torch.float32)
        return self._rooms[side][: len(x)].copy_(x)


def mirror(H: Tensor) -> Tensor:
    """Make a matrix symmetric in place, from what is on and below its diagonal; returns it."""
    for start in range(0, len(H), PANEL):
        stop = min(start + PANEL, len(H))
        square = H[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        H[start:stop, stop:] = H[stop:, start:stop].T
    return H
