"""Run a block once while its linears are replaced one after the other ("true sequential").

Quantising a block needs, in this order: the inputs of q/k/v over the whole calibration set, their new
weights, then the inputs of o_proj *as the quantised q/k/v produce them*, and so on. Running the block again
from its start for each of these steps costs a forward pass per step. Here each batch runs in a greenlet that
pauses where a linear's input is known and goes on once its weights have been replaced, so that every linear
is evaluated once per batch, by the block's own code in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qwenq.errors import UnsupportedError
from qwenq.models.transformers_model import Hook, Routed, hooked, linears_of

Forward = Callable[[Tensor], Tensor]
Routing = list["Routed | None"]
"""Of an expert's linears: which tokens the input is made of, per batch and then per reference batch."""
Residuals = list[Tensor]
"""The residual stream that a group's output is added to, per batch and then per reference batch."""
Solve = Callable[[Sequence[str], list[Tensor], list[Tensor], Routing, Residuals], dict[str, Tensor]]
"""(names of a group, its input by batch, its input by reference batch, its routing, its residuals; none for a
group that is no key of ``residual_sources``) → new weights by name."""


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


def residual_sources(block: nn.Module, forward: Forward, sample: Tensor) -> dict[str, str]:
    """Return the linears whose output is added to the residual stream, and where each one's stream is read.

    Found by running the block: a later state of the stream is an earlier one and the linear's output, bit for
    bit. States are the block's input (""), what modules without parts, such as norms, are given (their name),
    and the block's output. An output that is normalised, scaled or summed with another before it is added
    has no entry.

    Args:
        block: a decoder block.
        forward: runs the block on hidden states.
        sample: [1, tokens, hidden], any values.
    """
    states: list[tuple[str, Tensor]] = [("", sample)]
    outputs: list[tuple[str, Tensor, int]] = []  # a linear's name, its output, how many states are before it
    linears = linears_of(block)

    def keep_state(name: str) -> Hook:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape == sample.shape:
                states.append((name, args[0]))

        return hook

    def keep_output(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, args, output: outputs.append((name, output, len(states)))

    parts = {name: part for name, part in block.named_modules() if name and not list(part.children())}
    handles = [linear.register_forward_hook(keep_output(name)) for name, linear in linears.items()]
    handles += [
        part.register_forward_pre_hook(keep_state(name))
        for name, part in parts.items()
        if name not in linears
    ]
    try:
        states.append(("", forward(sample)))
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str] = {}
    for name, output, before in outputs:
        for source, state in states[:before]:
            if any(_is_sum(later, state, output) for _, later in states[before:]):
                found.setdefault(name, source)
    return found


def _is_sum(total: Tensor, state: Tensor, output: Tensor) -> bool:
    return output.shape == state.shape and torch.equal(total, state + output)


def run_sequential(
    block: nn.Module,
    forward: Forward,
    batches: Sequence[Tensor],
    groups: Sequence[Sequence[str]],
    solve: Solve,
    reference: Sequence[Tensor] = (),
    residuals: Mapping[str, str] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run all batches through the block; ``solve`` replaces each group before it is evaluated.

    Args:
        batches: hidden states, [batch, tokens, hidden] each.
        solve: called once per group, in order; the weights it returns take the place of the block's.
        reference: hidden states of the original model for some of the batches, in their order. They pause at
            the same linears and go on with the original weights: one copy of the block serves both.
        residuals: from ``residual_sources``, of groups of one linear; None: ``solve`` is given none.

    Returns:
        The block's output per batch with the new weights, and per reference batch with the original ones.
    """
    main = getcurrent()
    first = {names[0]: block.get_submodule(names[0]) for names in groups}
    sources = dict(residuals or {})
    read = {source: block.get_submodule(source) for source in sources.values() if source}
    streams: dict[tuple[object, str], Tensor] = {}  # by run and where they are read; until their last reader

    def keep(source: str) -> Hook:
        return lambda _, args: streams.update({(getcurrent(), source): args[0]})

    def pause(name: str) -> Hook:
        parent = block.get_submodule(name.rpartition(".")[0])

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            main.switch((name, args[0], getattr(parent, "routed", None)))

        return hook

    with hooked(read, keep), hooked(first, pause):
        runs = [greenlet(forward) for _ in (*batches, *reference)]
        streams |= {(run, ""): batch for run, batch in zip(runs, (*batches, *reference), strict=True)}
        states = [run.switch(batch) for run, batch in zip(runs, (*batches, *reference), strict=True)]
        count = len(batches)
        for names in groups:
            if any(state[0] != names[0] for state in states):
                raise UnsupportedError("a block whose path depends on the batch", where=names[0])
            inputs = [x for _, x, _ in states]
            source = sources.pop(names[0], None)
            given = [] if source is None else [streams[run, source] for run in runs]
            if source not in sources.values():
                streams = {key: stream for key, stream in streams.items() if key[1] != source}
            weights = solve(names, inputs[:count], inputs[count:], [routed for *_, routed in states], given)
            del given
            original = [run.switch() for run in runs[count:]]
            for name, weight in weights.items():
                block.get_submodule(name).weight.data = weight
            states = [run.switch() for run in runs[:count]] + original
    return states[:count], states[count:]
