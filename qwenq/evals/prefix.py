"""Group prompts by shared prefixes, each of which is encoded once.

In sorted order every set of prompts with a common prefix is a run of neighbours: the LCP-interval tree of a
suffix array (Abouelhoda, Kurtz and Ohlebusch 2004), here over whole prompts. From the leaves up, each node
chooses between one group and those of its children by the tokens saved, less a fixed cost for every group, as
groups are not batched with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

GROUP_COST = 96
"""Cost of a group in tokens, estimated: a forward pass for its prefix, and smaller batches."""


@dataclass(frozen=True)
class Group:
    """Prompts with a common prefix.

    Attributes:
        length: of the prefix in tokens; less than any of the prompts, as the last token of each has to be
            computed. 0: they share nothing.
        members: indexes of the prompts.
    """

    length: int
    members: tuple[int, ...]


@dataclass
class _Node:
    """A run of sorted prompts that share ``depth`` tokens, and its best division into groups."""

    depth: int
    left: int
    children: list[_Node] = field(default_factory=list)
    right: int = 0
    saved: int = 0
    groups: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.right - self.left + 1

    def close(self, right: int) -> _Node:
        """Choose the division, once all children have theirs."""
        self.right = right
        apart = [child for child in self.children if child.saved > child.size * self.depth]
        inside = {place for child in apart for place in range(child.left, child.right + 1)}
        rest = [place for place in range(self.left, right + 1) if place not in inside]
        self.saved = sum(child.saved for child in apart)
        self.groups = [group for child in apart for group in child.groups]
        if rest:
            self.saved += (len(rest) - 1) * self.depth - GROUP_COST
            self.groups.append((self.depth, rest))
        all_apart = sum(child.saved for child in self.children)
        if sum(child.size for child in self.children) == self.size and all_apart > self.saved:
            self.saved, self.groups = all_apart, [g for child in self.children for g in child.groups]
        return self


def group_by_prefix(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Return groups in the order of their first members; every prompt, of one id or more, is in one."""
    if not prompts:
        return []
    rows = [np.asarray(prompt, dtype=">u4") for prompt in prompts]  # big endian: bytes sort as numbers do
    order = sorted(range(len(rows)), key=lambda index: rows[index].tobytes())
    shared = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    root = _tree(shared)
    groups = [Group(depth, tuple(sorted(order[place] for place in run))) for depth, run in root.groups]
    return sorted(groups, key=lambda group: group.members)


def _common(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> int:
    """Return the length of the common prefix, one less than the shorter prompt at most."""
    limit = min(len(a), len(b)) - 1
    differs = np.flatnonzero(a[:limit] != b[:limit])
    return int(differs[0]) if len(differs) else limit


def _tree(shared: Sequence[int]) -> _Node:
    """Build the tree bottom-up from the lengths that neighbours share; return its root."""
    stack = [_Node(0, 0)]
    for place, depth in enumerate(shared):
        left, done = place, None
        while depth < stack[-1].depth:
            done = stack.pop().close(place)
            left = done.left
            if depth <= stack[-1].depth:
                stack[-1].children.append(done)
                done = None
        if depth > stack[-1].depth:
            stack.append(_Node(depth, left, [done] if done is not None else []))
    last = len(shared)
    while len(stack) > 1:
        done = stack.pop().close(last)
        stack[-1].children.append(done)
    return stack[0].close(last)
