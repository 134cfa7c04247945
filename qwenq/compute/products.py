"""Accumulate running means of products of activations, 2/n · Σ Xᵀ Y in float32, for Hessians and deviations.

The last bits depend on the order of the batches: several processes sum in another way (``gptq.hessian``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.compute import cpu

PANEL = 192  # columns of a product: wide enough for GEMM's speed, narrow enough to skip the upper triangle


def products(
    rows: int, columns: int, like: Tensor, *, symmetric: bool = False
) -> CProducts | Float32Products:
    """Return a mean over no batches yet, of products of ``rows`` by ``columns``, the widths of X and Y.

    ``like`` are activations, whose dtype and device decide how products are computed. ``symmetric``: X is Y,
    and what is above the diagonal need not be right.
    """
    if are_compiled(like):
        return CProducts(rows, columns, like.dtype, symmetric=symmetric)
    return Float32Products(rows, columns, like.device, symmetric=symmetric)


def are_compiled(like: Tensor) -> bool:
    """Return whether ``products`` of such activations are computed in C, which adds tokens in one order."""
    return cpu.unsupported_input(like.device, like.dtype) is None


class CProducts:
    """The mean over the batches so far, computed in C: see ``csrc/hessian.c``; arguments as ``products``."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, *, symmetric: bool = False) -> None:
        self._shape, self._dtype, self._symmetric = (rows, columns), dtype, symmetric
        self._code = cpu.DTYPE_CODES[dtype]
        self._panel = cpu.library_constant("qwenq_panel")
        self._per_word = cpu.library_constant("qwenq_tokens_per_word", self._code)
        self._panels = tuple(-(-width // self._panel) for width in self._shape)
        self._mean = torch.zeros(self._panels[0] * self._panel, self._panels[1] * self._panel)
        self._packed = [torch.empty(0, dtype=torch.int32)] * 2
        self._tokens = 0

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Add a batch: [..., rows] and [..., columns], as many tokens in both."""
        for name, x, width in zip("XY", (X, Y), self._shape, strict=True):
            cpu.require(name, x, self._dtype, (*x.shape[:-1], width), contiguous=False)
        tokens, others = (x.shape[:-1].numel() for x in (X, Y))
        if tokens != others:
            raise ValueError(f"{tokens} and {others} tokens")
        total = self._tokens + tokens
        right = self._pack(1, Y)
        left = right if self._symmetric else self._pack(0, X)
        cpu.call(
            "hessian_add", left, right, self._mean, -(-tokens // self._per_word), *self._panels,
            int(self._symmetric), self._tokens / total, 2.0 / total, self._code,
        )  # fmt: skip
        self._tokens = total

    def mean(self) -> Tensor:
        """Return 2/n · Σ Xᵀ Y, [rows, columns] float32, which further batches change in place."""
        rows, columns = self._shape
        return self._mean[:rows, :columns]

    def _pack(self, side: int, X: Tensor) -> Tensor:
        """Arrange [..., columns] as int32 [panels, words, panel], by runs; valid until the next batch."""
        columns = self._shape[side]
        x = X.reshape(-1, columns).contiguous()  # [tokens, columns]
        needed = -(-len(x) // self._per_word) * self._panels[side] * self._panel
        if self._packed[side].numel() < needed:
            self._packed[side] = torch.empty(needed, dtype=torch.int32)
        cpu.call("hessian_pack", x, self._packed[side], len(x), columns, self._panels[side], self._code)
        return self._packed[side]


class Float32Products:
    """The mean, computed by torch: activations of any float dtype are converted to float32 first."""

    def __init__(
        self, rows: int, columns: int, device: torch.device | str, *, symmetric: bool = False
    ) -> None:
        self._mean = torch.zeros(rows, columns, dtype=torch.float32, device=device)
        self._buffers = [
            torch.empty(0, width, dtype=torch.float32, device=device) for width in (rows, columns)
        ]
        self._symmetric, self._tokens = symmetric, 0

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Add a batch, see ``CProducts``."""
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
        """Return the mean, see ``CProducts``."""
        return self._mean

    def _float32(self, side: int, X: Tensor) -> Tensor:
        """Return X as float32 [tokens, width], in a buffer that is allocated once: new pages cost time."""
        x = X.reshape(-1, self._buffers[side].shape[1])  # [tokens, width]
        if len(self._buffers[side]) < len(x):
            self._buffers[side] = torch.empty_like(x, dtype=torch.float32)
        return self._buffers[side][: len(x)].copy_(x)


def mirror(H: Tensor) -> Tensor:
    """Make a matrix symmetric in place, from its lower triangle; return it."""
    for start in range(0, len(H), PANEL):
        stop = min(start + PANEL, len(H))
        square = H[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)
        H[start:stop, stop:] = H[stop:, start:stop].T
    return H
