from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.evals import batching
from qwenq.evals.batching import PrefixGroup, group_by_prefix

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=8)


def cost(prompts: Sequence[Sequence[int]], groups: Sequence[PrefixGroup]) -> int:
    """Tokens to compute, and the fixed cost of every group."""
    total = 0
    for group in groups:
        total += group.length + batching.GROUP_COST
        total += sum(len(prompts[member]) - group.length for member in group.members)
    return total


@given(prompts=PROMPTS)
def test_groups_are_sound(prompts: list[list[int]]) -> None:
    groups = group_by_prefix(prompts)
    assert sorted(member for group in groups for member in group.members) == list(range(len(prompts)))
    for group in groups:
        beginnings = {tuple(prompts[member][: group.length]) for member in group.members}
        assert len(beginnings) == 1
        assert all(group.length < len(prompts[member]) for member in group.members)  # the last is computed


def shared(prompts: Sequence[Sequence[int]], members: Sequence[int]) -> int:
    limit = min(len(prompts[member]) for member in members) - 1
    first = prompts[members[0]]
    return next((p for p in range(limit) if any(prompts[m][p] != first[p] for m in members)), limit)


@pytest.mark.parametrize("fixed", [0, 1, 3])
@given(prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6))
def test_no_worse_than_all_together_or_each_alone(fixed: int, prompts: list[list[int]]) -> None:
    everybody = range(len(prompts))
    together = [PrefixGroup(shared(prompts, everybody), tuple(everybody))]
    alone = [PrefixGroup(0, (member,)) for member in everybody]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "GROUP_COST", fixed)
        ours = cost(prompts, group_by_prefix(prompts))
        assert ours <= min(cost(prompts, together), cost(prompts, alone))


def test_subjects_are_found_and_chance_likeness_is_not() -> None:
    """Two subjects with headers of their own behind a common beginning; some questions begin alike."""
    header = list(range(10))
    first = [[*header, *range(100, 600), 1000 + i % 5, 2000 + i, 7] for i in range(20)]
    second = [[*header, *range(600, 1000), 1000 + i % 5, 2000 + i, 7] for i in range(20)]
    mixed = [prompt for pair in zip(first, second, strict=True) for prompt in pair]
    groups = group_by_prefix(mixed)
    assert [(group.length, len(group.members)) for group in groups] == [(510, 20), (410, 20)]


def test_one_prompt_and_none() -> None:
    assert group_by_prefix([]) == []
    assert [group.members for group in group_by_prefix([[1]])] == [(0,)]


def test_the_same_prompt_twice_is_computed_to_its_last_token() -> None:
    (group,) = group_by_prefix([[*range(300)], [*range(300)]])
    assert group.length == 299


def test_fourteen_thousand_prompts_take_seconds_at_most() -> None:
    import time

    headers = [[subject] * 900 for subject in range(57)]
    prompts = [[*headers[i % 57], i % 7, i % 11, i, *range(80)] for i in range(14_000)]
    started = time.process_time()
    groups = group_by_prefix(prompts)
    assert len(groups) == 57
    assert time.process_time() - started < 5
