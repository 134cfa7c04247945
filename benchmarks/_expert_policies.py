"""How the Hessian of an expert is best made where it sees few tokens: block by block, on real activations.

Usage: ``python _expert_policies.py MODEL TOKENS.safetensors LAYER…``. MODEL is what _mixture.py wrote, TOKENS
a calibration set with held-out sequences. Experts of some blocks are quantised for each policy, number of
tokens and set of them, on the unquantised model's activations; down_proj for what gate and up give once they
are quantised. Each line of the output is JSON: the share of the routed experts' output energy that this loses
on the held-out sequences, which are the same for all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from qwenq.gptq.linears import quantise_group
from qwenq.gptq.settings import Settings

SETTINGS = Settings(4, 64, True, True, "hessian", 0.1, 0.0, True)
ROUTED = 2
"""Experts that a token is routed to here: those that the router prefers. With as many as keep the mixture's
perplexity, an expert's tokens are nearly the block's; trained mixtures route to 3 % of their experts."""
SIZES = (256, 1024, 4096)
"""Tokens of a block to calibrate on."""
SETS = 2
"""Disjoint sets of tokens of each size, as far as there are so many."""


@dataclass(frozen=True)
class Policy:
    """H = (n · H_own + κ · H_block) / (n + κ).

    Attributes:
        pull: κ as a share of the input width; infinite: H_block alone.
        below: n as a share of the input width, from which on κ is 0.
        squared: whether each token counts by the square of its routing weight, their mean being one.
    """

    pull: float
    below: float
    squared: bool = False


ALWAYS = float("inf")
POLICIES = {
    "own": Policy(0, 0),
    "pull_16_below_4": Policy(1 / 16, 1 / 4),
    "pull_16": Policy(1 / 16, ALWAYS),
    "pull_4": Policy(1 / 4, ALWAYS),
    "squared": Policy(0, 0, squared=True),
    "squared_pull_16": Policy(1 / 16, ALWAYS, squared=True),
    "block": Policy(ALWAYS, ALWAYS),
}


@dataclass(frozen=True)
class Text:
    """Inputs of a block's experts.

    Attributes:
        x: [tokens, hidden].
        weights: [tokens, experts]; zero where an expert is not chosen.
    """

    x: Tensor
    weights: Tensor

    def part(self, start: int, count: int) -> Text:
        """Return some of the tokens."""
        some = slice(start, start + count)
        return Text(self.x[some], self.weights[some])


def hessian(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return 2/n · Σ x xᵀ, [width, width]; tokens count by ``scale``, whose mean is brought to one."""
    if scale is None:
        return x.T @ x * (2 / len(x))
    return (x * (scale / scale.mean())[:, None]).T @ x * (2 / len(x))


def drawn(own: Tensor, weights: Tensor, block: Tensor, policy: Policy) -> Tensor:
    """Return H of an expert.

    Args:
        own: [n, width], its tokens.
        weights: [n], the router's of them.
        block: [width, width], H of all tokens.
        policy: how both are joined.
    """
    n, width = own.shape
    pull = policy.pull * width if n < policy.below * width else 0.0
    if n == 0 or pull == ALWAYS:
        return block.clone()
    H = hessian(own, weights.square() if policy.squared else None)
    return (H * n + block * pull) / (n + pull)


Expert = dict[str, Tensor]
"""The weights of gate_proj, up_proj and down_proj, float32."""


def quantised(expert: Expert, text: Text, number: int, of_block: Tensor, policy: Policy) -> Expert:
    """Return the weights of an expert on their grids."""
    weights = text.weights[:, number]
    rows = weights > 0
    inputs = {name: expert[name] for name in ("gate_proj", "up_proj")}
    new = solved(inputs, drawn(text.x[rows], weights[rows], of_block, policy))
    inner = silu(linear(text.x, new["gate_proj"])) * linear(text.x, new["up_proj"])
    H = drawn(inner[rows], weights[rows], hessian(inner), policy)
    return new | solved({"down_proj": expert["down_proj"]}, H)


def solved(weights: Expert, H: Tensor) -> Expert:
    """Return weights that read one input on their grids."""
    found = quantise_group(weights, H, None, SETTINGS)
    return {name: one.grid.values(one.integers) for name, one in found.items()}


def output(expert: Expert, x: Tensor) -> Tensor:
    """Return an expert's output, [tokens, hidden]."""
    inner = silu(linear(x, expert["gate_proj"])) * linear(x, expert["up_proj"])
    return linear(inner, expert["down_proj"])


def lost(experts: list[Expert], text: Text, held_out: Text, policy: Policy) -> float:
    """Return the share of the routed output's energy that is lost on the held-out tokens."""
    of_block, error, whole = hessian(text.x), torch.zeros_like(held_out.x), torch.zeros_like(held_out.x)
    for number, expert in enumerate(experts):
        rows = held_out.weights[:, number] > 0
        share = held_out.weights[rows, number, None]
        new = quantised(expert, text, number, of_block, policy)
        wanted = output(expert, held_out.x[rows])
        error[rows] += share * (output(new, held_out.x[rows]) - wanted)
        whole[rows] += share * wanted
    return float(error.square().sum() / whole.square().sum())


def texts(model: Any, tokens: Tensor, layers: list[int]) -> dict[int, Text]:
    """Return what reaches the experts of some blocks."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def keep(layer: int, args: tuple[Any, ...]) -> None:
        hidden, chosen, weights = args
        top = weights.topk(ROUTED)
        shares = top.values / top.values.sum(1, keepdim=True)
        dense = torch.zeros(len(hidden), model.config.num_experts)
        dense.scatter_(1, chosen.gather(1, top.indices), shares)
        found[layer].append((hidden, dense))

    model.model.layers = model.model.layers[: max(layers) + 1]
    hooks = [
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda _, args, layer=layer: keep(layer, args)
        )
        for layer in layers
    ]
    for row in tokens.split(1):
        model.model(row, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {layer: Text(*map(torch.cat, zip(*parts, strict=True))) for layer, parts in found.items()}


def experts_of(tensors: dict[str, Tensor], layer: int, count: int) -> list[Expert]:
    """Return the experts of a block."""
    prefix, names = f"model.layers.{layer}.mlp.experts", ("gate_proj", "up_proj", "down_proj")
    return [
        {name: tensors[f"{prefix}.{number}.{name}.weight"].float() for name in names}
        for number in range(count)
    ]


def rows(
    model: Any, tensors: dict[str, Tensor], stored: dict[str, Tensor], layers: list[int]
) -> Iterator[Any]:
    """Yield a row for each block, number of tokens, set and policy."""
    seen = texts(model, stored["tokens"], layers)
    held_out = texts(model, stored["held_out"], layers)
    for layer in layers:
        experts = experts_of(tensors, layer, model.config.num_experts)
        for size in SIZES:
            for start in range(0, min(SETS * size, len(seen[layer].x) - size + 1), size):
                text = seen[layer].part(start, size)
                counts = (text.weights > 0).sum(0)
                for name, policy in POLICIES.items():
                    yield {
                        "layer": layer,
                        "tokens": size,
                        "set": start // size,
                        "policy": name,
                        "lost": lost(experts, text, held_out[layer], policy),
                        "experts_tokens": [int(counts.min()), int(counts.max())],
                    }


@torch.inference_mode()
def main(folder: Path, tokens: Path, layers: list[int]) -> None:
    """Load, measure, tell."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    for row in rows(model, tensors, load_file(tokens), layers):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
