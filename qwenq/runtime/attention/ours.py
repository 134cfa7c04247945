"""Run our Triton kernels behind `Attention`: FlashAttention as first published, and split-KV decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from qwenq.compute import gpu
from qwenq.errors import UnsupportedError
from qwenq.runtime.attention.flash import check_flash, check_half
from qwenq.runtime.attention.plain import attend
from qwenq.runtime.kernels.triton_support import triton_label
from qwenq.runtime.span import Span


class FlashV1:
    """FlashAttention (arXiv 2205.14135, Algorithm 1), work split over batch × heads only."""

    name = "v1"

    def __init__(self) -> None:
        self.implementation = f"qwenq FlashAttention-1 forward kernel ({triton_label()})"

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        from qwenq.runtime.kernels.triton_flash_v1 import flash_v1

        return flash_v1(queries, keys, values, span.positions)


class Split:
    """Decode steps: the cache split over programs (flash-decoding). Longer inputs: torch's SDPA."""

    name = "split"

    def __init__(self) -> None:
        self.implementation = (
            f"decode: qwenq split-KV kernel ({triton_label()}); prefill: torch {torch.__version__} SDPA"
        )

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        from qwenq.runtime.kernels.triton_split_decode import split_decode

        if queries.shape[2] > 1:
            return attend(queries, keys, values, span)
        positions = span.positions[:, 0].expand(len(queries)).contiguous()  # [batch]
        return split_decode(queries, keys, values, positions)


def flash_v1_ours(device: torch.device, dtype: torch.dtype) -> FlashV1:
    """Return our kernel of version 1, if it can run here."""
    _check("v1", device, dtype)
    return FlashV1()


def split(device: torch.device, dtype: torch.dtype) -> Split:
    """Return split-KV decoding, if it can run here."""
    _check("split", device, dtype)
    return Split()


def _check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    # The interpreter is no GPU but runs the kernels all the same; the label names it.
    if gpu.interpreting():
        check_half(name, dtype)
    else:
        check_flash(name, device, dtype)
    if reason := gpu.unsupported_reason(device):
        raise UnsupportedError(
            f"attention {name}: {reason}", where=f"--attention {name}", hint="use --attention sdpa or off"
        )
