"""Tokenizers and chat templates from strangers: data and programs that came with the weights."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from attempts import Tally, attempt, budget
from hostile_bytes import VALUES, damaged_bytes, damaged_json
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

from qwenq.errors import ModelError, UsageError
from qwenq.models import chatml
from qwenq.models.qwen_tokenizer import QwenTokenizer
from qwenq.models.tokenizer import Tokenizer, load_tokenizer

ASK = [{"role": "user", "content": "Quantise <|im_end|> 你好"}]
TYPES = [*VALUES, "ByteLevel", "Sequence", "Replace", "Regex", "(a+)+$", "(", "BPE", "Unigram", "WordPiece"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_model(tmp_path_factory.mktemp("tokenizers") / "model")
    attempt(Tally(), 10**9, lambda: use(load_tokenizer(made)))
    return made


def use(tokenizer: Tokenizer) -> None:
    """Everything that commands ask of a tokenizer."""
    assert len(tokenizer.fingerprint) == 16
    for text in ("", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "Quantise <|im_end|> 你好 \ud800 \u0300"):
        ids = tokenizer.encode(text)
        tokenizer.encode(text, special=True)
        tokenizer.decode(ids)
        stream = tokenizer.stream()
        "".join([*(stream.push(token) for token in ids), stream.finish()])
    tokenizer.encode_many(["a", "b"])
    assert all(isinstance(token, int) for token in tokenizer.eos_ids)


def sound(folder: Path, name: str) -> Any:
    value = json.loads((folder / name).read_bytes())
    if name == "tokenizer.json":
        value["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
            {"type": "Replace", "pattern": {"Regex": "x{2,}"}, "content": "x"},
        ]}  # fmt: skip
        value["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        value["padding"] = {
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip
    return value


FILES = {
    "tokenizer.json": {},
    "tokenizer_config.json": {},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "x", "lstrip": False}},
    "added_tokens.json": {"<|new|>": 320},
    "generation_config.json": {"eos_token_id": [2, 0], "max_window_size": 6144, "chat_format": "chatml"},
}


@pytest.mark.parametrize("name", FILES)
def test_tokenizer_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, tally: Tally, name: str
) -> None:
    value = FILES[name] or sound(folder, name)
    share = 2.0 if name.startswith("tokenizer") else 0.5

    @budget(share)
    @given(raw=damaged_json(value, TYPES))
    def tried(raw: bytes) -> None:
        hostile = tmp_path_factory.mktemp("t")
        for kept in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (hostile / kept).write_bytes((folder / kept).read_bytes())
        (hostile / name).write_bytes(raw)

        def read() -> None:
            tokenizer = load_tokenizer(hostile)
            use(tokenizer)

        attempt(tally, len(raw) + 20_000, read)
        assert not Path("pwned").exists()

    tried()


RANKS = b"".join(
    b"%s %d\n" % (base64.b64encode(token), rank)
    for rank, token in enumerate([*(bytes([value]) for value in range(256)), b"ab", b"abc", b"\xe4\xbd"])
)


@budget(2)
@given(raw=damaged_bytes(RANKS))
def test_ranks_files(tmp_path_factory: pytest.TempPathFactory, tally: Tally, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("ranks") / "qwen.tiktoken"
    path.write_bytes(raw)
    attempt(tally, len(raw), lambda: use(QwenTokenizer.from_file(path, expected_ranks=None)))


def with_template(folder: Path, target: Path, template: str) -> Tokenizer:
    target.mkdir()
    (target / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(target)


BOMBS = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a number that never ends": "{{ (9 ** (9 ** 9)) | string | length }}",
    "a string of terabytes": "{{ 'a' * 1000000000000 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "padding": "{{ '%9999999999d' % 1 }}",
    "a prompt of a hundred megabytes": "{{ 'a' * 100000000 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attributes by filter": "{{ messages | attr('__class__') | attr('__base__') }}",
    "another file": "{% include '/etc/passwd' %}",
    "changing the messages": "{{ messages.append(1) }}{{ messages.clear() }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_templates_that_would_take_everything(
    folder: Path, tmp_path: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch, bomb: str
) -> None:
    process = chatml.TemplateProcess(seconds=1.0)
    monkeypatch.setattr("qwenq.models.tokenizer.PROCESS", process)
    tokenizer = with_template(folder, tmp_path / "bomb", BOMBS[bomb])
    assert not attempt(tally, 1000, lambda: tokenizer.chat(ASK))
    good = with_template(folder, tmp_path / "good", "{{ messages[0].content }}")
    assert good.decode(good.chat(ASK)) == ASK[0]["content"]  # the next one is not harmed
    process.close()


@pytest.mark.parametrize("escape", ESCAPES)
def test_templates_that_would_break_out(folder: Path, tmp_path: Path, tally: Tally, escape: str) -> None:
    tokenizer = with_template(folder, tmp_path / "escape", ESCAPES[escape])
    try:
        assert not attempt(tally, 1000, lambda: tokenizer.chat(ASK))
    except AssertionError:  # rendered: then it saw nothing
        assert "os.py" not in tokenizer.decode(tokenizer.chat(ASK))
    assert not Path("pwned").exists()


PIECES = st.sampled_from([
    "{{", "}}", "{%", "%}", "{#", "messages", "[0]", ".content", "|tojson", "|attr('__class__')", "for m in",
    "endfor", "if", "else", "endif", "set x =", "raise_exception('\\x1b[2J')", "strftime_now('%Y')", "1/0",
    "'a'", "range(9)", "namespace(a=1)", "loop.index", "{{ messages[0].content }}", "\x1b]0;x\x07", "é", "\n",
    "|join", "|sort", "|map('upper')", "not", "~", "**", "9", "{% break %}", "{% generation %}", "bos_token",
])  # fmt: skip


@budget(3)
@given(template=st.lists(PIECES, min_size=1, max_size=12).map(" ".join))
def test_templates_made_of_pieces(tally: Tally, template: str) -> None:
    render = chatml.PROCESS.render
    attempt(tally, 1000, lambda: render(template, ASK, True, {"bos_token": "<s>"}))


def test_rules_that_blow_a_text_up_are_refused(folder: Path, tmp_path: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for part, inner, content in (("normalizer", "normalizers", "aa"), ("decoder", "decoders", "aa")):
        rules = [rule | {"content": content}] * 40
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(definition | {part: {"type": "Sequence", inner: rules}})
        )
        with pytest.raises(ModelError, match="times as long"):
            load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("largest", [2**31, 2**32 - 1])
def test_an_id_far_beyond_the_vocabulary_is_refused(folder: Path, tmp_path: Path, largest: int) -> None:
    """The library would list all ids between, and ends the process where that takes too much memory."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["q"] = largest
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ModelError, match=f"an id of {largest}"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_no_file_outside_is_opened_for_an_older_version(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.0.1.json").write_bytes((folder / "tokenizer.json").read_bytes())
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "fast_tokenizer_files": ["../tokenizer.0.1.json"],
    }
    (hostile / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="something else than files of this folder"):
        load_tokenizer(hostile)


def test_a_template_sees_what_transformers_shows_it(folder: Path, tmp_path: Path) -> None:
    """The process renders what the library renders, special tokens and helpers included."""
    template = "{{ bos_token }}|{{ eos_token }}|{{ messages | tojson }}|{{ add_generation_prompt }}"
    tokenizer = with_template(folder, tmp_path / "same", template)
    hf: Any = tokenizer._hf  # type: ignore[attr-defined]
    expected = hf.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    special = hf.special_tokens_map
    assert chatml.PROCESS.render(hf.get_chat_template(), ASK, True, special) == expected
    with pytest.raises(UsageError, match="no"):
        with_template(folder, tmp_path / "own", "{{ raise_exception('no') }}").chat(ASK)
