"""A block's forward pass as a coroutine that pauses at every linear that is about to be quantised.

Quantising a block needs, in this order: the inputs of q/k/v over the whole calibration set, their new
weights, then the inputs of o_proj *as the quantised q/k/v produce them*, and so on ("true sequential").
Running the block again from its start for each of these steps costs a forward pass per step. Here each batch
runs in a greenlet that pauses where a linear's input is known and goes on once its weights have been
replaced, so that every linear is evaluated once per batch, by whatever code transformers has for the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from qwenq.errors import UnsupportedError

Forward = Callable[[Tensor], Tensor]


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The block's linear layers by name, in definition order."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def shared_inputs(block: nn.Module, forward: Forward, sample: Tensor) -> list[list[str]]:
    """Groups of linears that read the very same tensor, in the order of evaluation.

    Args:
        block: a decoder block.
        forward: runs the block on hidden states.
        sample: [1, tokens, hidden], any values.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, names in seen:
                if tensor is args[0]:
                    names.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    with _hooks(block, note):
        forward(sample)
    return [names for _, names in seen]


def walk(
    block: nn.Module,
    forward: Forward,
    batches: Sequence[Tensor],
    groups: Sequence[Sequence[str]],
    solve: Callable[[Sequence[str], list[Tensor]], None],
) -> list[Tensor]:
    """Run all batches through the block, handing over the inputs of each group before it is evaluated.

    Args:
        block: a decoder block.
        forward: runs the block on hidden states.
        batches: hidden states, [batch, tokens, hidden] each.
        groups: from ``shared_inputs``.
        solve: called once per group, in order, with its names and one input per batch; replaces the weights.

    Returns:
        The block's output per batch, computed with the replaced weights.
    """
    main = getcurrent()
    first = {names[0] for names in groups}

    def pause(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None] | None:
        if name not in first:
            return None

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            main.switch((name, args[0]))

        return hook

    with _hooks(block, pause):
        runs = [greenlet(forward) for _ in batches]
        states = [run.switch(batch) for run, batch in zip(runs, batches, strict=True)]
        for names in groups:
            if any(name != names[0] for name, _ in states):
                raise UnsupportedError("a block whose path depends on the batch", where=names[0])
            solve(names, [x for _, x in states])
            states = [run.switch() for run in runs]
    return states


@contextmanager
def _hooks(
    block: nn.Module, make: Callable[[str], Callable[[nn.Module, tuple[Any, ...]], None] | None]
) -> Iterator[None]:
    handles = [
        linear.register_forward_pre_hook(hook)
        for name, linear in linears_of(block).items()
        if (hook := make(name)) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
