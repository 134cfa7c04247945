"""For a process that works alone: running means over the batches, in float32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qwenq.compute.products import are_compiled, mirror, products


def running_hessian(inputs: Sequence[Tensor]) -> Tensor:
    """Return 2/n · Σ x xᵀ, [width, width] float32, symmetric.

    Args:
        inputs: [..., width] each, any float dtype; at least one token.
    """
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
