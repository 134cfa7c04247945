"""Ids against the released ranks file's known ids, against `tokenizers`, and against the bytes themselves."""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import random
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer

from qwenq.errors import CorruptFileError, ModelError, UnsupportedError
from qwenq.models.qwen_tokenizer import (
    SPECIAL_TOKENS,
    QwenTokenizer,
    StreamDecoder,
    as_tokenizers,
    byte_of_char,
    read_ranks,
    recover_merges,
    to_nfc,
)

SAMPLE = "the theme: 'they're there', says the other 你好，你们好！ \n\n  naïve café 12 😀 the end of the age"


def small_ranks(extra: int = 60) -> dict[bytes, int]:
    """Ranks trained on SAMPLE: the most frequent pair of each round becomes a token."""
    ranks = {bytes([value]): value for value in range(256)}
    words = [[bytes([value]) for value in word.encode()] for word in SAMPLE.replace(" ", " \0").split("\0")]
    for _ in range(extra):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[left + right] = len(ranks)
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if word[i - 1 : i + 1] == [left, right]:
                    word[i - 1 : i + 1] = [left + right]
    return ranks


def ranks_text(ranks: dict[bytes, int]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


@pytest.fixture(scope="session")
def small() -> QwenTokenizer:
    return QwenTokenizer(small_ranks())


@pytest.fixture(scope="session")
def small_fast(small: QwenTokenizer) -> FastTokenizer:
    return as_tokenizers(small)


@pytest.fixture(scope="session")
def real(shared_data: Path) -> QwenTokenizer:
    return QwenTokenizer.from_file(shared_data / "qwen_tokenizer" / "qwen.tiktoken")


@pytest.fixture(scope="session")
def real_fast(real: QwenTokenizer) -> FastTokenizer:
    return as_tokenizers(real)


# --- the released file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (" A", [362]),
        (" B", [425]),
        (" C", [356]),
        (" D", [422]),
        ("A", [32]),
        ("B", [33]),
        ("C", [34]),
        ("D", [35]),
        ("\n", [198]),
        ("\n\n", [271]),
        ("我" * 7, [35946] * 7),
        ("system", [8948]),
        ("user", [872]),
        ("assistant", [77091]),
        ("答案：", [102349, 5122]),
        ("Human:", [33975, 25]),
        ('print("<|endoftext|>")', [1350, 9639, 91, 8691, 723, 427, 91, 82598]),
        ("123", [16, 17, 18]),
    ],
)
def test_known_ids(real: QwenTokenizer, text: str, ids: list[int]) -> None:
    assert real.encode(text) == ids
    assert real.decode(ids) == text


def test_special_ids_and_size(real: QwenTokenizer) -> None:
    named = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    named |= {f"<|extra_{i}|>": 151646 + i for i in range(205)}
    assert real.special_ids == named
    assert (real.vocab_size, real.eod_id, real.im_start_id, real.im_end_id) == (
        151851,
        151643,
        151644,
        151645,
    )
    assert real.eos_ids == (151645, 151643, 151644)
    assert QwenTokenizer(real.ranks, chat_format="raw").eos_ids == (151643,)
    for token, token_id in named.items():
        assert real.encode(f"a{token}b", special=True) == [64, token_id, 65]


def corpus(shared_data: Path) -> list[str]:
    """More than 3 MB of English, Chinese, code, emoji, control characters and random Unicode."""
    c4 = (shared_data / "c4" / "c4_validation_2k.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in c4[:600]]
    texts.append((shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:400_000])
    chinese = [shared_data / "zh_corpus" / name for name in ("cmrc2018_dev.txt", "d2l_zh.txt")]
    texts += [file.read_text(encoding="utf-8")[:300_000] for file in chinese]
    with gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        texts += [task["prompt"] + task["canonical_solution"] for task in map(json.loads, file)]
    texts += [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, base64, random)]
    rng = random.Random(1024)
    emoji = [*range(0x1F300, 0x1FB00), 0x200D, 0xFE0F, *range(0x1F3FB, 0x1F400), 0x20]
    control = [*range(0x20), 0x7F, *range(0x80, 0xA1), 0x2028, 0x2029, 0x200B, 0xFEFF, 0x61, 0x31]
    anything = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assigned = [c for c in anything if unicodedata.category(chr(c)) not in {"Cn", "Co"}]
    for pool in (emoji, control, anything, assigned):
        texts += ["".join(map(chr, rng.choices(pool, k=1000))) for _ in range(80)]
    return texts


def test_exported_json_gives_the_same_ids_on_megabytes(
    real: QwenTokenizer, real_fast: FastTokenizer, shared_data: Path
) -> None:
    texts = corpus(shared_data)
    assert sum(len(text.encode()) for text in texts) > 3_000_000
    for text, encoding in zip(texts, real_fast.encode_batch(texts), strict=True):
        ids = real.encode(text)
        assert encoding.ids == ids
        assert real.decode_bytes(ids) == to_nfc(text).encode()


# Marks, spaces, jamo, folds of the contractions' letters, digits of all scripts, emoji and joiners.
TRICKY = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.characters(categories=["Mn", "Mc", "Me"]),
        st.characters(categories=["Zs", "Zl", "Zp", "Cc", "Cf"]),
        st.characters(categories=["Nd", "Nl", "No"]),
        st.characters(min_codepoint=0x1100, max_codepoint=0x11FF),
        st.sampled_from("'’sStTmMdDlLvVrReEſK \t\r\n\u3000\u00a0<|>_0aé́"),
    ),
    max_size=40,
)


@given(TRICKY)
@settings(max_examples=600)
def test_exported_json_gives_the_same_ids_on_any_unicode(
    real: QwenTokenizer, real_fast: FastTokenizer, text: str
) -> None:
    assert real_fast.encode(text).ids == real.encode(text, special=True)


# --- any ranks file ----------------------------------------------------------------------------------------


@given(TRICKY)
@settings(max_examples=300)
def test_small_export_gives_the_same_ids(small: QwenTokenizer, small_fast: FastTokenizer, text: str) -> None:
    assert small_fast.encode(text).ids == small.encode(text, special=True)


@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SPECIAL_TOKENS)), max_size=8).map("".join))
@settings(max_examples=100)
def test_user_text_never_becomes_a_special_token(small: QwenTokenizer, text: str) -> None:
    ids = small.encode(text)
    assert all(token_id < len(small.ranks) for token_id in ids)
    assert small.decode_bytes(ids) == to_nfc(text).encode()


def test_special_tokens_are_parsed_on_request_only(small: QwenTokenizer, small_fast: FastTokenizer) -> None:
    text = "the<|im_start|>the<|extra_204|><|extra_205|>"
    ids = small.encode(text, special=True)
    assert ids == small_fast.encode(text).ids
    assert [i for i in ids if i >= len(small.ranks)] == [small.im_start_id, small.vocab_size - 1]
    assert small.decode(ids) == small.decode(small.encode(text)) == text


def test_a_mark_after_a_special_token_leaves_it_whole(
    small: QwenTokenizer, small_fast: FastTokenizer
) -> None:
    text = "<|im_end|>\u0338x"  # '>' and the overlay would compose to U+226F
    assert small.encode(text, special=True)[0] == small.im_end_id
    assert small_fast.encode(text).ids == small.encode(text, special=True)


def test_composed_and_decomposed_text_have_the_same_ids(small: QwenTokenizer) -> None:
    assert small.encode("cafe\u0301 가") == small.encode("caf\u00e9 가")


@given(TRICKY)
@settings(max_examples=300)
def test_nfc_is_unicodes_own(text: str) -> None:
    """The two tables differ in recent combining marks alone: not on the characters of Unicode 3.2."""
    old = "".join(char for char in text if unicodedata.ucd_3_2_0.category(char) != "Cn")
    assert to_nfc(old) == unicodedata.normalize("NFC", old)
    assert unicodedata.is_normalized("NFC", to_nfc(old))


def test_merges_are_recovered_in_rank_order() -> None:
    ranks = small_ranks()
    merges = recover_merges(ranks)
    assert [ranks[left + right] for left, right in merges] == list(range(256, 316))


def test_lone_surrogates_become_replacement_characters(small: QwenTokenizer) -> None:
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"
    assert small.encode("\ud83d\ude00") == small.encode("😀")


def test_white_space_without_end_is_an_error_not_a_crash(small: QwenTokenizer) -> None:
    assert small.decode(small.encode(" " * 200_000 + "x")) == " " * 200_000 + "x"
    with pytest.raises(UnsupportedError, match="cannot be split"):
        small.encode(" " * 2_000_000 + "x")


def test_bytes_inside_a_character_are_exact(small: QwenTokenizer) -> None:
    euro = "€".encode()
    assert [small.decode_bytes([value]) for value in euro] == [euro[:1], euro[1:2], euro[2:]]
    assert small.decode(list(euro[:2])) == "\ufffd"


@pytest.mark.parametrize("bad", [-1, 524, 10**9])
def test_an_unknown_id_is_named(small: QwenTokenizer, bad: int) -> None:
    assert small.vocab_size == 256 + 60 + 208 == 524
    with pytest.raises(ModelError, match=f"token id {bad} is not in the vocabulary"):
        small.decode([0, bad])


@given(st.lists(st.integers(0, 523), max_size=40))
@settings(max_examples=300)
def test_streamed_pieces_are_the_whole_text(small: QwenTokenizer, ids: list[int]) -> None:
    stream = small.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == small.decode(ids)


@given(st.text(max_size=20))
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    stream = StreamDecoder(bytes)
    pieces = [stream.push(value) for value in text.encode()]
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_byte_characters_are_a_bijection() -> None:
    table = byte_of_char()
    assert sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["a"], table["Ń"]) == (0x20, 0x0A, 0x61, 0xAD)


def test_fingerprint_follows_the_ranks(small: QwenTokenizer) -> None:
    shuffled = dict(reversed(small.ranks.items()))
    assert QwenTokenizer(shuffled).fingerprint == small.fingerprint
    assert QwenTokenizer(small_ranks(59)).fingerprint != small.fingerprint


def test_a_token_out_of_reach_of_merges_is_refused_by_the_export() -> None:
    ranks = {bytes([value]): value for value in range(256)} | {b"abc": 256}
    with pytest.raises(UnsupportedError, match="abc"):
        recover_merges(ranks)


# --- damaged files -----------------------------------------------------------------------------------------


def test_crlf_and_a_missing_last_line_end_are_accepted(tmp_path: Path) -> None:
    ranks = small_ranks()
    file = tmp_path / "qwen.tiktoken"
    file.write_bytes(ranks_text(ranks).replace("\n", "\r\n").removesuffix("\r\n").encode())
    assert read_ranks(file, expected=None) == ranks


@pytest.mark.parametrize(
    ("damage", "message", "place"),
    [
        (lambda lines: [*lines[:300], lines[300][:3]], "no `base64 rank` pair", "line 301"),
        (lambda lines: [*lines[:300], lines[300].split()[0] + " "], "no `base64 rank` pair", "line 301"),
        (lambda lines: [*lines[:9], "####" + lines[9], *lines[10:]], "bad base64", "line 10"),
        (lambda lines: [*lines[:9], "IQ= 9", *lines[10:]], "bad base64", "line 10"),
        (lambda lines: [*lines[:9], " 9", *lines[10:]], "an empty token", "line 10"),
        (lambda lines: [*lines[:9], "CQ== 1_0", *lines[10:]], "no `base64 rank` pair", "line 10"),
        (lambda lines: [*lines, lines[4]], "already has rank 4", "line 317"),
        (lambda lines: [*lines, "/////w== 12"], "rank 12 already occurred on line 13", "line 317"),
        (lambda lines: lines[:280] + lines[281:], "rank 280 is missing", "qwen.tiktoken"),
        (lambda lines: lines[:250], "none for the single byte 0xfa", "qwen.tiktoken"),
        (lambda lines: [], "none for the single byte 0x00", "qwen.tiktoken"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, damage, message: str, place: str) -> None:
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(damage(ranks_text(small_ranks()).splitlines())))
    with pytest.raises(CorruptFileError) as caught:
        read_ranks(file, expected=None)
    assert message in caught.value.what
    assert place in str(caught.value.where)


def test_a_file_cut_between_two_lines_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "qwen.tiktoken"
    file.write_text(ranks_text(small_ranks()))
    with pytest.raises(CorruptFileError, match="316 ranks instead of 151643"):
        QwenTokenizer.from_file(file)
    with pytest.raises(ModelError, match="cannot be read"):
        QwenTokenizer.from_file(tmp_path / "none.tiktoken")
