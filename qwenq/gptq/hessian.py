"""Accumulate the Hessian of a linear layer's quantisation error, H = 2/n · Σ x xᵀ (arXiv 2210.17323, §3).

For one output row w of a layer, replacing w by q costs ‖(w − q) X‖² = ½ n (w − q) H (w − q)ᵀ, so H is shared
by all rows and by all layers that read the same input (q/k/v; gate/up). The deviation from the original
model's inputs, 2/n · Σ (x̃ − x) xᵀ, is summed in the same ways: a process that works alone keeps running means
in float32; several processes add integers, whose sums are the same in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qwenq.compute.products import are_compiled, mirror, products
from qwenq.distributed import ALONE, Team


def hessian(inputs: Sequence[Tensor], team: Team = ALONE) -> Tensor:
    """Return H, [width, width] float32, symmetric; computed in float32 whatever dtype the activations have.

    Args:
        inputs: this rank's activations by batch, [..., width] each; every rank has a batch.
        team: the ranks that share the batches; each gets the same H, whatever their number.
    """
    if not team.launched:
        return running_hessian(inputs)
    width, device = inputs[0].shape[-1], inputs[0].device

    def columns(batch: int, some: slice) -> Tensor:
        return inputs[batch].reshape(-1, width)[:, some].float()  # [tokens, these columns]

    tokens = [x.numel() // width for x in inputs]
    found = mean_products(columns, columns, tokens, (width, width), device, same=True, team=team)
    if found is None:
        raise ValueError("a Hessian of no tokens")
    return found


def running_hessian(inputs: Sequence[Tensor]) -> Tensor:
    """Return 2/n · Σ x xᵀ, [width, width] float32, symmetric, of inputs [..., width] of any float dtype."""
    if not sum(x.numel() for x in inputs):
        raise ValueError("a Hessian of no tokens")
    width = inputs[0].shape[-1]
    sums = products(width, width, inputs[0], symmetric=True)
    for x in inputs:
        sums.add(x, x)
    return mirror(sums.mean())


def running_deviation(inputs: Sequence[Tensor], references: Sequence[Tensor], H: Tensor) -> Tensor | None:
    """Return 2/n · Σ (x̃ − x) xᵀ, [width, width] float32; None: there is no reference.

    Compiled products add the tokens in one order: there it is 2/n · Σ x̃ xᵀ − H, without a rounded difference,
    and zero where x̃ = x. torch's may add in another order for each shape, and H⁻¹ would enlarge what is left:
    there the difference comes first.

    Args:
        inputs: [..., width] each, as the quantised layers so far produce them.
        references: of these batches, the same tokens in the original model; or empty.
        H: ``running_hessian`` of the inputs.
    """
    if not references:
        return None
    compiled = are_compiled(inputs[0])
    sums = products(len(H), len(H), inputs[0])
    for x, original in zip(inputs, references, strict=True):
        sums.add(original if compiled else original.float() - x.float(), x)
    return sums.mean().sub_(H) if compiled else sums.mean()


def running_output_deviation(
    inputs: Sequence[Tensor], references: Sequence[Tensor], W: Tensor
) -> Tensor | None:
    """Return 2/n · Σ W (x̃ − x) xᵀ, [rows, width] float32; None: there is no reference.

    W (x̃ − x) is computed in the activations' dtype and only its product with x in float32: rounding a token's
    deviation before it meets its x leaves the sum in the span of the inputs, where H⁻¹ does not enlarge it.

    Args:
        inputs, references: as for ``running_deviation``.
        W: [rows, width] float32.
    """
    if not references:
        return None
    sums = products(W.shape[0], W.shape[1], inputs[0])
    weight = W.T.to(inputs[0].dtype)
    for x, original in zip(inputs, references, strict=True):
        sums.add((original - x) @ weight, x)
    return sums.mean()


# For several processes: sums that are the same in any order, and for any number of processes.
#
# Floating-point sums depend on their order; sums of integers do not. So each batch's product XᵀY is rounded
# to whole multiples of a tiny unit before it is added: float64 adds whole numbers below 2⁵³ exactly. The
# unit follows the columns' energies, as powers of two (nothing else is lost by scaling): after scaling no
# column has an energy above 1 in any batch, so by Cauchy and Schwarz no element of a product exceeds 1, and
# one unit is 2^-(51 - log2(batches)): at a thousand batches 2⁻⁴¹, where float32 holds 1 to 2⁻²³.
#
# A batch's own product still depends on the library, the processor and the number of its threads.


PANEL = 512  # rows of a product at a time: wide enough for full GEMM speed, and what is beside H stays small
CHUNK = 1 << 18  # elements that are rounded and added at a time: they stay in the cache
DIGITS = 51  # float64 counts to 2^53; one bit for rounding in float32, one to be sure

Columns = Callable[[int, slice], Tensor]  # (batch, columns) → [tokens, these columns], float32 or bfloat16


def mean_products(
    left: Columns,
    right: Columns,
    tokens: Sequence[int],
    widths: tuple[int, int],
    device: torch.device | str = "cpu",
    *,
    same: bool = False,
    team: Team = ALONE,
) -> Tensor | None:
    """Return 2/n · Σ lᵀ r over all tokens of all ranks, [widths[0], widths[1]] float32; None: no tokens.

    Args:
        left, right: activations by batch; a batch's product is computed in the dtype of the right.
        tokens: of each batch; may be empty on this rank.
        same: left and right are the same; only what is on and below the diagonal is computed, and mirrored.
        team: the ranks; each gets the sums.
    """
    counts = torch.tensor([len(tokens), sum(tokens)], dtype=torch.float64, device=device)
    team.all_reduce_sum(counts)
    batches, n = int(counts[0]), int(counts[1])
    if n == 0:
        return None
    digits = DIGITS - math.ceil(math.log2(batches))
    rows = _scales(left, len(tokens), widths[0], device, team)
    columns = rows if same else _scales(right, len(tokens), widths[1], device, team)
    result = torch.empty(widths, dtype=torch.float32, device=device)
    for start in range(0, widths[0], PANEL):
        panel = slice(start, min(start + PANEL, widths[0]))
        wide = slice(0, panel.stop if same else widths[1])
        units = rows[panel] * 2.0**digits
        total = torch.zeros(panel.stop - start, wide.stop, dtype=torch.float64, device=device)
        for batch in range(len(tokens)):
            values = right(batch, wide)
            product = ((left(batch, panel) * units).to(values.dtype).T @ values).float()
            for part in _parts(total):
                total[part] += product[part].mul_(columns[wide]).round_()
        team.all_reduce_sum(total)
        for part in _parts(total):
            sizes = units[part].double()[:, None] * columns[wide].double()
            result[panel, wide][part] = total[part].div_(sizes).mul_(2 / n).float()
    return mirror(result) if same else result


def exact_deviation(
    inputs: Sequence[Tensor],
    references: Sequence[Tensor],
    width: int,
    device: torch.device | str,
    team: Team,
) -> Tensor | None:
    """Return C as ``running_deviation`` does, the same on every rank and for any number of them.

    Products of a batch are computed in bfloat16 where the activations are: the deviation to three digits, for
    a fraction of float32's time.
    """

    def deviations(batch: int, some: slice) -> Tensor:
        x, original = (part.reshape(-1, width)[:, some] for part in (inputs[batch], references[batch]))
        return original.float() - x.float()

    def activations(batch: int, some: slice) -> Tensor:
        x = inputs[batch].reshape(-1, width)[:, some]
        return x if x.dtype is torch.bfloat16 else x.float()

    tokens = [x.numel() // width for x in references]
    return mean_products(deviations, activations, tokens, (width, width), device, team=team)


def _scales(values: Columns, batches: int, width: int, device: torch.device | str, team: Team) -> Tensor:
    """Return powers of two that bring a column's energy in any batch to at most 1, [width] float32."""
    energies = torch.zeros(width, dtype=torch.float32, device=device)
    for batch in range(batches):
        for start in range(0, width, 8 * PANEL):
            some = slice(start, min(start + 8 * PANEL, width))
            energies[some] = torch.maximum(energies[some], values(batch, some).float().square().sum(0))
    team.all_reduce_max(energies)
    exponents = torch.frexp(energies).exponent.int()  # energy < 2^exponent
    halves = (exponents + 1).div(2, rounding_mode="floor")  # its root <= 2^half
    scales = (127 - halves).bitwise_left_shift(23).view(torch.float32)  # 2^-half, bit by bit: exact
    sound = torch.isfinite(energies) & (energies > 0)
    return torch.where(sound, scales, torch.ones_like(scales))  # one that is not shows on the diagonal


def _parts(matrix: Tensor) -> list[slice]:
    """Return the rows of a matrix in runs of CHUNK elements or less."""
    rows, width = matrix.shape
    step = max(1, CHUNK // width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
