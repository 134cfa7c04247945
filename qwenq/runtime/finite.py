"""Keep sums in float32, and end a run whose logits overflow."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from qwenq.errors import ModelError


def sum_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    """Sum products of float16 on a GPU in float32 to the end: by default parts may be joined in float16.

    A switch of the whole process.
    """
    if device.type == "cuda" and dtype is torch.float16:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def checked(logits: Tensor, dtype: torch.dtype, *, prompt: bool) -> Tensor:
    """Return the logits, once they are sure to be finite.

    float16 ends at 65504, so there the logits of every prompt are looked at; with ``--debug`` those
    of every step in every dtype.

    Raises:
        ModelError: NaN or Inf among them.
    """
    wanted = (prompt and dtype is torch.float16) or bool(os.environ.get("QWENQ_DEBUG"))
    if wanted and not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"the logits hold NaN or Inf: activations overflow {str(dtype).removeprefix('torch.')}",
            where="--dtype",
            hint="use --dtype bfloat16, or float32 where the device has no bfloat16",
        )
    return logits
