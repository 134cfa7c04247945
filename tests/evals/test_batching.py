from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from qwenq.errors import DataError, UsageError
from qwenq.evals import batching
from qwenq.evals.batching import (
    ChoiceTokens,
    PrefixGroup,
    WriteTokens,
    encode_requests,
    group_by_prefix,
    request_hash,
    require_context,
)
from qwenq.evals.task import Choose, Item, Write
from qwenq.models.tokenizer import Tokenizer, load_tokenizer

ITEM = Item("s/1", "s", {"question": "?", "answer": "A"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiny_model(tmp_path_factory.mktemp("requests") / "tiny"))


def test_texts_are_texts_and_turns_are_chats(tokenizer: Tokenizer) -> None:
    turns = ({"role": "user", "content": "hi"},)
    text, chat = encode_requests(
        tokenizer, [ITEM, ITEM], [Write("<|im_end|> x", 5, ("y",)), Choose(turns, (" A", " B"))]
    )
    assert text == WriteTokens("s/1", tuple(tokenizer.encode("<|im_end|> x")), 5, ("y",))
    assert not set(text.prompt) & set(tokenizer.eos_ids)  # special tokens in a question are plain text
    assert chat.prompt == tuple(tokenizer.chat(list(turns)))
    assert isinstance(chat, ChoiceTokens)
    assert chat.choices == (tuple(tokenizer.encode(" A")), tuple(tokenizer.encode(" B")))


@pytest.mark.parametrize("request_", [Write("", 5), Choose("x", ("A", "")), Choose("x", ())])
def test_a_prompt_without_tokens_is_refused(request_: Write | Choose, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        encode_requests(tokenizer, [ITEM], [request_])
    assert caught.value.where == "s/1"


def test_a_template_that_refuses_the_chat_is_no_dead_end(tokenizer: Tokenizer) -> None:
    """Some take no system message, which the card protocol begins with."""

    class Refusing:
        encode_many = tokenizer.encode_many

        def chat(self, _: object) -> list[int]:
            raise UsageError("the chat template refuses this: no system role", where="here", hint=self.hint)

        hint: str | None = None

    refusing: Any = Refusing()
    asked = [Write(({"role": "system", "content": "x"},), 5)]
    with pytest.raises(UsageError, match="refuses this") as caught:
        encode_requests(refusing, [ITEM], asked)
    assert caught.value.where == "here" and "--protocol base" in str(caught.value.hint)
    refusing.hint = "its own"
    with pytest.raises(UsageError) as caught:
        encode_requests(refusing, [ITEM], asked)
    assert caught.value.hint == "its own"


def test_the_context_has_to_hold_prompt_and_answer() -> None:
    write = WriteTokens("w", tuple(range(10)), 6, ())
    choose = ChoiceTokens("c", tuple(range(10)), ((1,), (2, 3)))
    assert (write.needed, choose.needed) == (16, 11)
    require_context([write, choose], 16)
    require_context([write, choose], None)
    with pytest.raises(DataError, match="1 of 2 prompts") as caught:
        require_context([write, choose], 15)
    assert caught.value.where == "w"
    assert "--subjects" in str(caught.value.hint), "card has no examples to leave out"
    with pytest.raises(DataError, match="takes 10 tokens"):
        require_context([choose], 10)


def test_the_request_hash_covers_request_and_item() -> None:
    asked = {
        request_hash(item, request)
        for item in (ITEM, Item("s/1", "s", {"question": "?", "answer": "B"}))
        for request in (
            Write("p", 5),
            Write("p", 6),
            Write("q", 5),
            Write("p", 5, ("u",)),
            Choose("p", ("a",)),
        )
    }
    assert len(asked) == 10
    assert request_hash(ITEM, Write("\ud800", 5)) != request_hash(ITEM, Write("x", 5))
    assert request_hash(Item("other id", "s", ITEM.data), Write("p", 5)) in asked


# Group prompts by shared prefixes.


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
