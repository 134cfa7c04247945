from __future__ import annotations

from typing import Any

import pytest
from tiny_model import write_tiny_model

from qwenq.errors import DataError, UsageError
from qwenq.evals.batching import ChoiceTokens, WriteTokens, encode_requests, request_hash, require_context
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
