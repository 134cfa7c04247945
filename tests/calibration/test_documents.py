"""A conversation keeps everything that a chat template may read, under the names that templates know."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwenq.calibration.documents import from_record

ASK = {"role": "user", "content": "How warm is it?"}
CALL = {"name": "weather", "arguments": {"city": "Köln"}}
TOOL = {"type": "function", "function": {"name": "weather"}}


def messages(record: dict[str, Any]) -> Any:
    return from_record(record, "here", None).content


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])])
def test_tool_calls_stay_and_their_arguments_are_objects(arguments: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "content": "12", "tool_call_id": "c1", "name": "weather"}
    found = messages({"messages": [ASK, turn, answer]})
    assert found[1]["content"] == "" and found[1]["tool_calls"][0]["function"] == CALL
    assert found[2] == answer


def test_reasoning_is_kept_and_empty_keys_are_dropped() -> None:
    turn = {
        "role": "assistant",
        "content": "12",
        "reasoning_content": "Look.",
        "tool_calls": None,
        "name": "",
    }
    found = messages({"messages": [ASK, turn]})
    assert found[1] == {"role": "assistant", "content": "12", "reasoning_content": "Look."}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_system_and_tools_of_a_record_join_the_conversation(tools: Any) -> None:
    turns = [{"from": "human", "value": "Ahoy?"}, {"from": "gpt", "value": "Ahoy."}]
    document = from_record({"system": "A pirate.", "tools": tools, "conversations": turns}, "here", None)
    assert document.content == [
        {"role": "system", "content": "A pirate."},
        {"role": "user", "content": "Ahoy?"},
        {"role": "assistant", "content": "Ahoy."},
    ]
    assert document.tools == (TOOL,)
    for blank in ("", "[]", None):
        assert from_record({"tools": blank, "conversations": turns}, "here", None).tools == ()


def test_a_system_message_of_its_own_wins_over_the_records() -> None:
    found = messages({"system": "Outer.", "messages": [{"role": "system", "content": "Inner."}, ASK]})
    assert [message["content"] for message in found] == ["Inner.", ASK["content"]]


def test_role_names_of_other_tools_are_translated() -> None:
    turns = [
        {"from": "developer", "value": "Be brief."},
        {"from": "human", "value": "How warm is it?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "12"},
        {"from": "model", "value": "12 degrees."},
    ]
    found = messages({"conversations": turns})
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["tool_calls"] == [{"type": "function", "function": CALL}]


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_the_key_that_holds_something_is_read(blank: Any) -> None:
    assert messages({"text": blank, "messages": [ASK]}) == [ASK]
    assert messages({"text": blank, "messages": None, "conversations": [ASK]}) == [ASK]


def test_a_conversation_in_a_column_of_text_is_read() -> None:
    assert messages({"messages": json.dumps([ASK])}) == [ASK]
