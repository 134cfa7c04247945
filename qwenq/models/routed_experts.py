"""Take experts apart into linears, in the place of transformers' parameters of three dimensions.

transformers keeps all experts of a block in two tensors and multiplies them by whatever code its
configuration names. Here an expert is a module with ``gate_proj``, ``up_proj`` and ``down_proj``, under the
names that quantised files have, so that each is quantised, packed and checked like any other linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Routed:
    """Which tokens an expert is given.

    Attributes:
        hidden: [tokens, width], the input of all experts of the block.
        rows: int64, ascending: those that this expert is given.
    """

    hidden: Tensor
    rows: Tensor


class Expert(nn.Module):
    """A gated MLP.

    Attributes:
        routed: what the linear that is about to run was routed; for the hooks of ``gptq.walk``.
    """

    def __init__(
        self, hidden: int, width: int, activation: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gate_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
            self.up_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
            self.down_proj = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self._activation = activation
        self.routed: Routed | None = None

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the outputs for ``hidden[rows]``, [rows, hidden]."""
        x = hidden[rows]
        self.routed = Routed(hidden, rows)
        inner = self._activation(self.gate_proj(x)) * self.up_proj(x)
        self.routed = Routed(hidden, rows)  # another batch may have run while this one paused
        return self.down_proj(inner)  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> Tensor:
        """Return the input of ``down_proj`` for other tokens, [tokens, width]; no hook sees it."""
        gate = functional.linear(x, self.gate_proj.weight)
        return self._activation(gate) * functional.linear(x, self.up_proj.weight)


class RoutedExperts(nn.ModuleList):
    """The experts of a block.

    Args:
        experts: in the router's order.
        every: call every expert, also for no token: then which linears run does not depend on the batch.
    """

    def __init__(self, experts: Iterable[Expert], *, every: bool) -> None:
        super().__init__(experts)
        self._every = every

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden: [tokens, width].
            chosen: int64 [tokens, k].
            weights: [tokens, k].
        """
        out = torch.zeros_like(hidden)
        numbers = range(len(self)) if self._every else chosen.unique().tolist()
        for number in numbers:
            rows, place = torch.where(chosen == number)
            found = self[number](hidden, rows) * weights[rows, place, None]
            out.index_add_(0, rows, found.to(out.dtype))
        return out


def unfuse(blocks: Iterable[nn.Module], *, every: bool) -> bool:
    """Replace fused experts by ``RoutedExperts`` on the meta device; return whether there were any.

    Modules of another make (biases, no gate, interleaved rows, [in, out]) are left alone: code that goes
    through the parameters of a block then meets theirs, and refuses them by name.
    """
    found = False
    for block in blocks:
        for name, module in list(block.named_modules()):
            if _is_fused(module):
                count, hidden, width = module.down_proj.shape
                dtype = module.down_proj.dtype
                experts = (Expert(hidden, width, module.act_fn, dtype) for _ in range(count))
                block.set_submodule(name, RoutedExperts(experts, every=every).eval())
                found = True
    return found


def _is_fused(module: nn.Module) -> bool:
    """Return whether these are gated experts, gate's rows before up's, and nothing else."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {"gate_up_proj", "down_proj"} or any(tensor.ndim != 3 for tensor in own.values()):
        return False
    count, hidden, width = own["down_proj"].shape
    ordinary = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    return bool(
        ordinary and own["gate_up_proj"].shape == (count, 2 * width, hidden) and callable(module.act_fn)
    )
