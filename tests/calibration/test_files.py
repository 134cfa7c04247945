from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from qwenq.calibration.documents import Document, from_record
from qwenq.calibration.files import LONGEST_PASSAGE, PASSAGE, lines_of, read_file
from qwenq.errors import CalibrationError, UsageError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RUN_GPTQ = {
    "id": "identity_0",
    "conversations": [
        {"from": "assistant", "value": "dropped"},
        {"from": "user", "value": "Hi"},
        {"from": "assistant", "value": "Hello"},
    ],
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def contents(path: Path, column: str | None = None) -> list[Any]:
    return [document.content for document in read_file(path, column)]


@pytest.mark.parametrize(
    ("record", "column", "expected"),
    [
        ({"text": "one", "url": "x"}, None, "one"),
        ("one", None, "one"),
        ({"messages": CHAT}, None, CHAT),
        ({"conversations": CHAT}, None, CHAT),
        (RUN_GPTQ, None, CHAT),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            None,
            CHAT,
        ),
        ({"text": "one", "body": "two"}, "body", "two"),
        ({"dialog": CHAT}, "dialog", CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]}, None, CHAT),
        ({"text": "a \ud83d b"}, None, "a \ufffd b"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, CHAT[1], *CHAT]},
            None,
            [{"role": "system", "content": "Be brief."}, *CHAT],
        ),
    ],
)
def test_records_in_every_form(record: Any, column: str | None, expected: Any) -> None:
    document = from_record(record, "here", column)
    assert document.content == expected and document.characters > 0


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        ({"body": "x", "id": 3}, None, r"none of text, messages, conversations; it has 'body', 'id'"),
        ({"text": "x"}, "body", r"no 'body'; it has 'text'"),
        ({}, None, "it has nothing"),
        ([1], None, "a list, not an object"),
        ("x", "text", "a str, not an object"),
        ({"text": 5}, None, "a int, neither a text nor a list of messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, None, "the role 'narrator'"),
        ({"messages": CHAT, "tools": "{]"}, None, "'tools' is a text that is not JSON"),
        ({"messages": ["Hi"]}, None, "a message without a role and a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "a part of type image"),
        ({"messages": [CHAT[1]]}, None, "without a user's turn"),
    ],
)
def test_records_without_a_text_are_refused(record: Any, column: str | None, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        from_record(record, "chats.jsonl, line 3", column)
    assert caught.value.where == "chats.jsonl, line 3" and caught.value.hint


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": "一"}, ensure_ascii=False),
        "",
        json.dumps({"messages": CHAT}),
        '{"text": ""}',
    ]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(lines))
    assert list(read_file(path)) == [Document("一", f"{path}, line 1"), Document(CHAT, f"{path}, line 3")]


def test_a_cut_off_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "tw')
    reader = read_file(path)
    assert next(reader).content == "one"
    with pytest.raises(CalibrationError, match=r"(?s)not whole JSON.*the file seems cut off here.*line 2"):
        next(reader)
    write(path, '{"text": "one"\n{"text": "two"}\n')
    with pytest.raises(CalibrationError, match=r"not whole JSON") as caught:
        list(read_file(path))
    assert "cut off" not in caught.value.what and str(caught.value.where).endswith("line 1")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_other_encodings_are_named(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", b'"plain"\n' + "中文".encode("gb18030"))
    with pytest.raises(CalibrationError, match=r"(?s)not UTF-8: byte 0xd6 at position 0.*line 2.*iconv"):
        list(read_file(path) if suffix != ".jsonl" else lines_of(path))


def test_a_json_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([RUN_GPTQ, {"text": "one"}, "two"], indent=1))
    assert contents(path) == [CHAT, "one", "two"]
    assert contents(write(path, "")) == contents(write(path, "[]")) == []
    with pytest.raises(CalibrationError, match="holds a list of records, this one a dict"):
        contents(write(path, '{"one": "text"}'))
    with pytest.raises(CalibrationError, match=r"(?s)not whole JSON.*line 2"):
        contents(write(path, '[{"text": "one"},\n {"text": "tw'))


def test_a_huge_json_list_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(600_000_000)  # a hole: takes no room
    with pytest.raises(UsageError, match=r"(?s)over 512 MB.*jsonl"):
        contents(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = {"id": list(range(600)), "text": [f"text {i}" for i in range(600)], "body": ["b"] * 600}
    parquet.write_table(pyarrow.table(table), path)
    assert contents(path) == table["text"] and contents(path, "body") == ["b"] * 600
    with pytest.raises(CalibrationError, match="no 'bodi'; it has 'id', 'text', 'body'"):
        contents(path, "bodi")
    parquet.write_table(pyarrow.table({"messages": [CHAT, CHAT]}), path)
    assert contents(path) == [CHAT, CHAT]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CalibrationError, match="not a whole parquet file"):
        contents(path)


LINES = st.lists(
    st.one_of(st.just("\n"), st.integers(1, LONGEST_PASSAGE * 2).map(lambda size: "x" * size + "\n")),
    max_size=12,
)


@given(LINES)
def test_a_text_is_cut_into_passages_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "passages.txt", "".join(lines))
    passages = contents(path)
    assert "".join(passages).rstrip() == "".join(lines).rstrip()
    for passage in passages[:-1]:
        assert len(passage) >= (PASSAGE if passage.endswith("\n\n") or passage == "\n" else LONGEST_PASSAGE)
    for passage in passages:
        assert len(passage) < LONGEST_PASSAGE + max(map(len, lines))


@pytest.mark.parametrize(
    ("content", "how"),
    [
        ("words\n".encode("utf-16"), "`iconv -f UTF-16 -t UTF-8 a.txt`"),  # as Windows' shell writes a file
        ("words and words\n".encode("utf-16-le"), "`iconv -f UTF-16LE -t UTF-8 a.txt`"),
        ("words and words\n".encode("utf-16-be"), "`iconv -f UTF-16BE -t UTF-8 a.txt`"),
        (b"%PDF-1.7 words", "`pdftotext a.txt`"),
        (b"PK\x03\x04 words", "`unzip a.txt`"),
        ("问题".encode("gb18030"), "`iconv -f GB18030 -t UTF-8 a.txt`"),
    ],
)
def test_the_hint_names_the_encoding_to_convert_from(tmp_path: Path, content: bytes, how: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        list(read_file(tmp_path / "a.txt"))
    assert how in str(caught.value.hint)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)a folder is not a text.*\.jsonl"):
        read_file(tmp_path)
    with pytest.raises(UsageError, match=r"(?s)cannot read a \.docx file.*accepted: \.txt"):
        read_file(write(tmp_path / "a.docx", "x"))
    with pytest.raises(UsageError, match="no such text"):
        read_file(tmp_path / "gone.txt")
    with pytest.raises(UsageError, match=r"a \.txt file has no columns"):
        list(read_file(write(tmp_path / "a.txt", "x"), "text"))


def test_files_are_read_only_as_far_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n' * 10_000 + "not json")
    assert next(read_file(path)).content == "one"


def test_real_files(shared_data: Path) -> None:
    texts = contents(shared_data / "c4" / "c4_validation_2k.jsonl")
    assert len(texts) == 2000 and texts[0].startswith("We offer valet parking")
    passages = contents(shared_data / "wikitext2" / "valid.txt")
    whole = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    assert "".join(passages).rstrip() == whole.rstrip()


def test_a_dictionary_encoded_text_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = 60
    parquet.write_table(pyarrow.table({"text": ["x" * 10_000_000] * rows}), path)  # 600 MB as they are told
    assert path.stat().st_size < 1_000_000
    before = pyarrow.default_memory_pool().bytes_allocated()
    most, count = 0, 0
    for document in read_file(path):
        assert len(str(document.content)) == 10_000_000
        most, count = max(most, pyarrow.default_memory_pool().bytes_allocated() - before), count + 1
    assert count == rows
    assert most < 100_000_000
