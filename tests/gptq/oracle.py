"""Algorithm 1 of the GPTQ paper (arXiv 2210.17323), line by line; groups are fixed beforehand.

It shares no code with the solver: H⁻¹ is formed, its Cholesky factor taken, W kept as the paper has it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def algorithm_1(
    W: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, bits: int, order: Tensor | None = None, B: int = 128
) -> tuple[Tensor, Tensor]:
    """Quantise W [rows, in] under H [in, in] to ``bits`` on the grid ``scales``, ``zeros`` [rows, groups].

    Returns:
        The integers [rows, in], and the real values that were rounded to them, both in natural column order.
    """
    rows, columns = W.shape
    group_size = columns // scales.shape[1]
    order = torch.arange(columns) if order is None else order
    W = W[:, order].clone()
    Q = torch.zeros_like(W)  # line 1
    integers, rounded = torch.zeros_like(W), torch.zeros_like(W)
    H_inv = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)  # line 3
    for i in range(0, columns, B):
        end = min(i + B, columns)
        E = torch.zeros(rows, end - i, dtype=W.dtype)  # line 2
        for j in range(i, end):
            group = int(order[j]) // group_size
            scale, zero = scales[:, group].to(W.dtype), zeros[:, group].to(W.dtype)
            rounded[:, j] = W[:, j] / scale + zero
            integers[:, j] = rounded[:, j].round().clamp(0, 2**bits - 1)
            Q[:, j] = scale * (integers[:, j] - zero)  # line 6
            E[:, j - i] = (W[:, j] - Q[:, j]) / H_inv[j, j]  # line 7
            W[:, j:end] -= E[:, j - i, None] * H_inv[None, j, j:end]  # line 8
        W[:, end:] -= E @ H_inv[i:end, end:]  # line 10
    back = torch.argsort(order)
    return integers[:, back], rounded[:, back]
