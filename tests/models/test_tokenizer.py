"""Both readers through one door: v1's ranks file, and tokenizer.json through transformers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError, UsageError
from qwenq.models.aux_files import copy_tokenizer_files
from qwenq.models.qwen_tokenizer import QwenTokenizer
from qwenq.models.tokenizer import Tokenizer, load_tokenizer

WORDS = "the cat sat on the mat 你好"
CHAT_GENERATION = {"chat_format": "chatml", "eos_token_id": 151643, "max_window_size": 500}
CONVERSATIONS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}],
    [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1 the cat"},
        {"role": "user", "content": "q2\n"},
    ],
]


def ranks() -> dict[bytes, int]:
    tokens = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"at", b" c", b" cat"]
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def v1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small v1 chat model's folder, as released: tokenizer_config.json asks for remote code."""
    folder = tmp_path_factory.mktemp("v1")
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items()]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, "seq_length": 256}))
    (folder / "generation_config.json").write_text(json.dumps(CHAT_GENERATION))
    settings_of_v1 = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "tokenizer_class": "QWenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of_v1))
    return folder


@pytest.fixture(scope="module")
def copied(v1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quantised v1 model carries."""
    folder = tmp_path_factory.mktemp("quantised")
    names = copy_tokenizer_files(v1_folder, folder)
    assert names == ["qwen.tiktoken", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in folder.iterdir()) == sorted(names)
    for name in ("config.json", "generation_config.json"):  # written by whoever writes the model
        (folder / name).write_bytes((v1_folder / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def json_folder(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer without its ranks file: transformers reads it."""
    folder = tmp_path_factory.mktemp("json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((copied / name).read_bytes())
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [264, 262]}')
    return folder


@pytest.fixture(scope="module")
def v1(v1_folder: Path) -> Tokenizer:
    return load_tokenizer(v1_folder)


@pytest.fixture(scope="module")
def hf(json_folder: Path) -> Tokenizer:
    return load_tokenizer(json_folder)


def test_v1_folder_facts(v1: Tokenizer) -> None:
    assert isinstance(v1, QwenTokenizer)
    assert (v1.vocab_size, v1.bos_id, v1.pad_id, v1.max_window) == (470, None, 262, 500)
    assert v1.eos_ids == (264, 262, 263)


def test_hf_folder_facts(hf: Tokenizer) -> None:
    assert not isinstance(hf, QwenTokenizer)
    assert (hf.vocab_size, hf.bos_id, hf.pad_id) == (470, None, 262)
    assert hf.eos_ids == (264, 262)


TEXT = st.one_of(st.text(max_size=30), st.text("the cat<|im_end|>\n ", max_size=30))


@given(TEXT, st.booleans())
@settings(max_examples=200)
def test_both_readers_give_the_same_ids(v1: Tokenizer, hf: Tokenizer, text: str, special: bool) -> None:
    text += "<|im_end|>the<|extra_7|>"
    ids = v1.encode(text, special=special)
    assert hf.encode(text, special=special) == ids
    assert hf.decode(ids) == v1.decode(ids)
    assert hf.decode_bytes(ids) == v1.decode_bytes(ids)
    assert hf.encode_many([text, "the"]) == v1.encode_many([text, "the"])


@given(st.lists(st.integers(0, 469), max_size=30))
@settings(max_examples=100)
def test_both_readers_decode_any_ids_alike(v1: Tokenizer, hf: Tokenizer, ids: list[int]) -> None:
    assert hf.decode_bytes(ids) == v1.decode_bytes(ids)
    stream = hf.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == v1.decode(ids)


def test_odd_input_is_read_alike(v1: Tokenizer, hf: Tokenizer) -> None:
    for text in ("", "a\ud800b", "\ud83d\ude00"):
        assert hf.encode(text) == v1.encode(text)
    assert hf.encode_many([]) == v1.encode_many([]) == []


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("asks", [True, False])
def test_the_exported_template_renders_make_context(
    v1: Tokenizer, hf: Tokenizer, messages: list[dict[str, str]], asks: bool
) -> None:
    assert hf.chat(messages, asks) == v1.chat(messages, asks)


def test_unknown_ids_are_named(hf: Tokenizer) -> None:
    for read in (hf.decode, hf.decode_bytes):
        with pytest.raises(ModelError, match="token id 470 is not in the vocabulary"):
            read([0, 470])


def test_fingerprints_are_stable_and_differ(v1: Tokenizer, hf: Tokenizer, json_folder: Path) -> None:
    assert hf.fingerprint == load_tokenizer(json_folder).fingerprint
    assert len({v1.fingerprint, hf.fingerprint}) == 2
    assert len(v1.fingerprint) == len(hf.fingerprint) == 16


def test_the_copy_loads_plainly_and_never_asks_for_remote_code(copied: Path) -> None:
    from transformers import AutoTokenizer

    assert "auto_map" not in (copied / "tokenizer_config.json").read_text()
    plain = AutoTokenizer.from_pretrained(str(copied), local_files_only=True)
    ours = load_tokenizer(copied)
    assert isinstance(ours, QwenTokenizer)
    assert plain("the<|im_end|>").input_ids == ours.encode("the<|im_end|>", special=True)
    assert (plain.eos_token, plain.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert plain.model_max_length == 256
    assert plain.decode([263, 257, 264], skip_special_tokens=True) == "the"


def test_copying_a_copy_changes_nothing(copied: Path, tmp_path: Path) -> None:
    names = copy_tokenizer_files(copied, tmp_path)
    assert sorted(names) == ["qwen.tiktoken", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert json_or_bytes(tmp_path / name) == json_or_bytes(copied / name)
    assert copy_tokenizer_files(copied, copied) == names


def json_or_bytes(file: Path) -> object:
    return json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()


def test_templates_and_vocabularies_are_copied_but_no_code(json_folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    copy_tokenizer_files(json_folder, source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "tokenization_x.py").write_text("raise SystemExit")
    (source / "model.safetensors").write_bytes(b"")
    assert copy_tokenizer_files(source, target) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    tokenizer = load_tokenizer(target)
    assert tokenizer.chat([{"role": "user", "content": "the"}]) == [257]


def test_a_folder_of_templates_is_copied_without_its_modes_and_what_else_it_holds(
    json_folder: Path, tmp_path: Path
) -> None:
    source, target, private = tmp_path / "source", tmp_path / "target", tmp_path / "private"
    copy_tokenizer_files(json_folder, source)
    templates = source / "additional_chat_templates"
    (templates / "deep").mkdir(parents=True)
    private.write_text("mine")
    (templates / "deep" / "link.jinja").symlink_to(private)
    (templates / "code.py").write_text("raise SystemExit")
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (templates / "tool_use.jinja").chmod(0o444)
    templates.chmod(0o555)
    assert copy_tokenizer_files(source, target)[-1] == templates.name
    copied = target / templates.name
    assert [entry.name for entry in copied.rglob("*")] == ["tool_use.jinja"]
    assert (copied / "tool_use.jinja").read_text() == "{{ messages }}"
    assert all(path.stat().st_mode & 0o200 for path in (copied, copied / "tool_use.jinja"))
    templates.chmod(0o755)


def test_a_base_model_ends_at_end_of_text_alone(v1_folder: Path, tmp_path: Path) -> None:
    for name in ("qwen.tiktoken", "config.json"):
        (tmp_path / name).write_bytes((v1_folder / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.max_window) == ((262,), None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [264, 262]}')  # a converted chat model
    assert load_tokenizer(tmp_path).eos_ids == (264, 262, 263)


def template_folder(json_folder: Path, folder: Path, template: str | None) -> Path:
    config = json.loads((json_folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        (None, "no chat template"),
    ],
)
def test_templates_run_in_a_sandbox_and_may_refuse(
    json_folder: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    tokenizer = load_tokenizer(template_folder(json_folder, tmp_path, template))
    with pytest.raises(UsageError, match=message):
        tokenizer.chat([{"role": "user", "content": "q"}])


def test_a_single_file_is_read_too(json_folder: Path, copied: Path) -> None:
    ids = load_tokenizer(copied).encode("the cat")
    assert load_tokenizer(json_folder / "tokenizer.json").encode("the cat") == ids
    with pytest.raises(CorruptFileError, match="262 ranks instead of 151643"):
        load_tokenizer(copied / "qwen.tiktoken")


@pytest.mark.parametrize("name", ["tokenizer.json", "qwen.tiktoken", "theirs"])
def test_a_single_file_of_terabytes_is_not_read(tmp_path: Path, name: str) -> None:
    """A file with holes: it takes no space on the disk."""
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptFileError, match=r"has 1\.1 TB to be read whole"):
        load_tokenizer(tmp_path / name)


def test_a_tokenizer_that_is_not_byte_level(tmp_path: Path) -> None:
    vocab = {"▁the": 0, "▁c": 1, "at": 2, "▁": 3, "<0xE4>": 4, "<0xBD>": 5, "<0xA0>": 6}
    fast = FastTokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    ids = [0, 1, 2, 3, 4, 5, 6, 7]
    assert tokenizer.decode(ids) == " the cat 你</s>"
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert pieces == [" the", " c", "at", " ", "", "", "你", "</s>"]
    assert stream.finish() == ""
    with pytest.raises(UnsupportedError, match="not byte-level"):
        tokenizer.decode_bytes([0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
@given(
    st.sampled_from(["config.json", "generation_config.json"]), st.sampled_from(["{", "[]", '"x"', "\x00"])
)
def test_damaged_json_is_named(v1_folder: Path, tmp_path: Path, name: str, content: str) -> None:
    for copied_name in ("qwen.tiktoken", "config.json", "generation_config.json"):
        (tmp_path / copied_name).write_bytes((v1_folder / copied_name).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(CorruptFileError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path / name)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        copy_tokenizer_files(tmp_path, tmp_path / "target")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_tokenizer(tmp_path)


def test_a_full_vocabulary_demands_the_released_number_of_ranks(v1_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes((v1_folder / "qwen.tiktoken").read_bytes())
    for config in ({}, {"vocab_size": 151936}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CorruptFileError, match="262 ranks instead of 151643"):
            load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 512}')
    (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml", "max_window_size": "x"}')
    with pytest.raises(CorruptFileError, match="max_window_size"):
        load_tokenizer(tmp_path)
