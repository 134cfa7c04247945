"""Run a block once while its linears are replaced one after the other ("true sequential").

Quantising a block needs, in this order: the inputs of q/k/v over the whole calibration set, their new
weights, then the inputs of o_proj *as the quantised q/k/v produce them*, and so on. Running the block again
from its start for each of these steps costs a forward pass per step. Here each batch runs in a greenlet that
pauses where a linear's input is known and goes on once its weights have been replaced, so that every linear
is evaluated once per batch, by the block's own code in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qwenq.errors import UnsupportedError
from qwenq.models.transformers_model import Hook, Routed, hooked, linears_of

Forward = Callable[[Tensor], Tensor]
Routing = list["Routed | None"]
"""Of an expert's linears: which tokens the input is made of, per batch and then per reference batch."""
Solve = Callable[[Sequence[str], list[Tensor], list[Tensor], Routing], dict[str, Tensor]]
"""(names of a group, its input by batch, its input by reference batch, its routing) → new weights by name."""


def shared_inputs(
    block: nn.Module, forward: Forward, sample: Tensor, kind: Callable[[str], object] = lambda _: None
) -> list[list[str]]:
    """Return groups of linears that read the same tensor, are of one kind, and run one after the other.

    A linear that runs after another group (``kv_a_proj`` of latent attention, after ``q_b_proj``) has a group
    of its own: else its weight would be replaced before the original model's activations have met it.

    Args:
        sample: [1, tokens, hidden], any values.
        kind: of a linear by its name: those that are quantised alike have the same.
    """
    seen: list[tuple[Tensor, object, list[str]]] = []

    def note(name: str) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if seen and seen[-1][0] is args[0] and seen[-1][1] == kind(name):
                seen[-1][2].append(name)
            else:
                seen.append((args[0], kind(name), [name]))

        return hook

    with hooked(linears_of(block), note):
        forward(sample)
    return [names for *_, names in seen]


def run_sequential(
    block: nn.Module,
    forward: Forward,
    batches: Sequence[Tensor],
    groups: Sequence[Sequence[str]],
    solve: Solve,
    reference: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """Run all batches through the block; ``solve`` replaces each group before it is evaluated.

    Args:
        batches: hidden states, [batch, tokens, hidden] each.
        solve: called once per group, in order; the weights it returns take the place of the block's.
        reference: hidden states of the original model for some of the batches, in their order. They pause at
            the same linears and go on with the original weights: one copy of the block serves both.

    Returns:
        The block's output per batch with the new weights, and per reference batch with the original ones.
    """
    main = getcurrent()
    first = {names[0]: block.get_submodule(names[0]) for names in groups}

    def pause(name: str) -> Hook:
        parent = block.get_submodule(name.rpartition(".")[0])

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            main.switch((name, args[0], getattr(parent, "routed", None)))

        return hook

    with hooked(first, pause):
        runs = [greenlet(forward) for _ in (*batches, *reference)]
        states = [run.switch(batch) for run, batch in zip(runs, (*batches, *reference), strict=True)]
        count = len(batches)
        for names in groups:
            if any(state[0] != names[0] for state in states):
                raise UnsupportedError("a block whose path depends on the batch", where=names[0])
            inputs = [x for _, x, _ in states]
            weights = solve(names, inputs[:count], inputs[count:], [routed for *_, routed in states])
            original = [run.switch() for run in runs[count:]]
            for name, weight in weights.items():
                block.get_submodule(name).weight.data = weight
            states = [run.switch() for run in runs[:count]] + original
    return states[:count], states[count:]
