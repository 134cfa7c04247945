from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from models.qwen3_template import ALWAYS, QWEN3, set_template
from tiny_model import TEXT, write_tiny_model

from qwenq.calibration import CalibrationSet, load_calibration
from qwenq.calibration.load import calibration_tokenizer
from qwenq.errors import CalibrationError, UsageError
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from conftest import Tiny


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": f"Note {i}. {TEXT}"}) + "\n" for i in range(30)))
    return path


def test_a_text_file(tiny: Tiny, notes: Path) -> None:
    made = tiny.load(notes, samples=3, held_out=2, seq_len=64)
    assert made.tokens.shape == (3, 64) and made.held_out.shape == (2, 64)
    spelled = tiny.tokenizer.decode(made.tokens.flatten().tolist())
    assert "Quantise the weights" in spelled and "<|endoftext|>Note " in spelled
    facts = made.manifest
    assert (facts.source, facts.template, facts.seed) == (str(notes), "plain", 0)
    assert (facts.samples, facts.seq_len, facts.held_out) == (3, 64, 2)
    assert facts.held_out_from == "other documents" and facts.tokenizer == tiny.tokenizer.fingerprint
    assert facts.documents_read == 30 and facts.source_read_to_end and facts.model is None


def test_the_seed_chooses_documents(tiny: Tiny, notes: Path) -> None:
    prints = [tiny.load(notes, seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_conversations_go_through_the_chat_template(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chats.json"
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    path.write_text(json.dumps([{"id": "1", "conversations": turns}] * 20))
    made = tiny.load(path, samples=2, seq_len=40)
    assert made.manifest.template == "chat"
    spelled = tiny.tokenizer.decode(made.tokens.flatten().tolist())
    one = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|endoftext|>"
    assert spelled == (one * 20)[: len(spelled)]
    path.write_text(
        json.dumps([{"messages": [{"role": "user", "content": "<|im_end|>Hi"}]}, {"text": "x"}] * 20)
    )
    assert tiny.load(path).manifest.template == "mixed"


def test_text_that_was_rendered_already_has_the_ids_of_its_conversations(tiny: Tiny, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Measure."}, {"role": "assistant", "content": "The table."}]
    chats, texts = tmp_path / "chats.jsonl", tmp_path / "texts.jsonl"
    rendered = tiny.tokenizer.decode(tiny.tokenizer.chat(turns, add_generation_prompt=False))
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    texts.write_text((json.dumps({"text": rendered}) + "\n") * 20)
    made = tiny.load(texts)
    assert torch.equal(made.tokens, tiny.load(chats).tokens)
    assert made.manifest.notices == (
        "plain texts hold 80 special tokens, such as <|im_start|>: they are read as tokens",
    )
    made.save(tmp_path / "kept.safetensors")
    assert tiny.load(tmp_path / "kept.safetensors").manifest.notices == made.manifest.notices


SYSTEM_SWITCH = (
    "{{- '<|im_start|>system\\n/' + ('think' if enable_thinking else 'no_think') + '<|im_end|>\\n' -}}"
    + QWEN3
)
"""As SmolLM3's template does: the switch changes every conversation, not only a prompt's end."""


def test_conversations_are_rendered_with_thoughts_or_without(tmp_path: Path) -> None:
    folder = set_template(write_tiny_model(tmp_path / "Tiny"), SYSTEM_SWITCH)
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Measure."}, {"role": "assistant", "content": "The table."}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    made = {}
    for wish in ("on", "off"):
        tokenizer = calibration_tokenizer(folder, wish)
        sizes = {"samples": 4, "seq_len": 64, "held_out": 1}
        opened = open_checkpoint(folder)
        made[wish] = load_calibration(str(chats), checkpoint=opened, tokenizer=tokenizer, **sizes)
        text = tokenizer.decode(made[wish].tokens.flatten().tolist())
        assert ("/think" in text, "/no_think" in text) == (wish == "on", wish == "off")
    assert made["on"].manifest.tokenizer != made["off"].manifest.tokenizer
    assert made["on"].fingerprint != made["off"].fingerprint


def test_thoughts_that_a_template_cannot_switch(tmp_path: Path) -> None:
    never, always = write_tiny_model(tmp_path / "n"), set_template(write_tiny_model(tmp_path / "a"), ALWAYS)
    for folder, same, refused in ((never, "off", "on"), (always, "on", "off")):
        assert calibration_tokenizer(folder, same).fingerprint == load_tokenizer(folder).fingerprint
        with pytest.raises(UsageError, match="does not read enable_thinking"):
            calibration_tokenizer(folder, refused)


def test_keys_that_the_template_does_not_read_are_named(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    asked = {"role": "user", "content": "Measure the weights."}
    answer = {"role": "assistant", "content": "The table.", "reasoning_content": "Hm.", "weight": 1}
    record = {"messages": [asked, answer], "tools": [{"type": "function", "function": {"name": "f"}}]}
    path.write_text((json.dumps(record) + "\n") * 20)
    assert tiny.load(path).manifest.notices == (
        "the model's chat template does not read reasoning_content (20 times), tools (20 times): left out of "
        "the calibration tokens",
    )


def test_a_tools_answer_is_not_rendered_by_a_template_that_knows_no_tools(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Measure."}, {"role": "tool", "content": "12"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    with pytest.raises(CalibrationError, match="role tool, which the model's chat template does not know"):
        tiny.load(path)


def test_records_without_words_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    good = {"messages": [{"role": "user", "content": "Measure the weights."}]}
    system = {"role": "system", "content": "Be brief."}
    bad = [{"messages": []}, {"messages": [system]}, {"text": None}, {"text": " \n\t"}, {"messages": None}]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*[good] * 20, *bad]))
    alone = tmp_path / "alone.jsonl"
    alone.write_text((json.dumps(good) + "\n") * 20)
    assert tiny.load(path).fingerprint == tiny.load(alone).fingerprint
    path.write_text("".join(json.dumps(record) + "\n" for record in bad))
    with pytest.raises(CalibrationError, match="the text is empty"):
        tiny.load(path)


def test_saved_sets_come_back_exactly(tiny: Tiny, notes: Path, tmp_path: Path) -> None:
    made = tiny.load(notes)
    path = tmp_path / "calib.safetensors"
    made.save(path)
    loaded = tiny.load(path)
    assert torch.equal(loaded.tokens, made.tokens) and loaded.manifest == made.manifest
    assert tiny.load(path, samples=2, seq_len=8, held_out=1).manifest == made.manifest
    with pytest.raises(UsageError, match=r"(?s)--samples 5 was asked for, but this saved set has 2"):
        tiny.load(path, samples=5)
    with pytest.raises(UsageError, match="no such calibration set"):
        tiny.load(tmp_path / "gone.safetensors")


def test_a_set_of_another_tokenizer_is_refused(tiny: Tiny, notes: Path, tmp_path: Path) -> None:
    path = tmp_path / "calib.safetensors"
    made = tiny.load(notes)
    other = made.manifest.model_copy(update={"tokenizer": "f" * 16})
    CalibrationSet(made.tokens, made.held_out, other).save(path)
    with pytest.raises(CalibrationError, match="made with another tokenizer"):
        tiny.load(path)


def test_ids_that_the_model_has_no_row_for(tiny: Tiny, notes: Path, tmp_path: Path) -> None:
    small = Checkpoint(
        tiny.checkpoint.folder, tiny.checkpoint.config | {"vocab_size": 100}, tiny.checkpoint.source
    )
    with pytest.raises(CalibrationError, match=r"token id \d+ is outside the model's vocabulary of 100 ids"):
        load_calibration(
            str(notes), checkpoint=small, tokenizer=tiny.tokenizer, samples=1, seq_len=8, held_out=0
        )
    path = tmp_path / "calib.safetensors"
    tiny.load(notes).save(path)
    with pytest.raises(CalibrationError, match="outside the model's vocabulary"):
        load_calibration(str(path), checkpoint=small, tokenizer=tiny.tokenizer)


def test_bad_sources(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CalibrationError, match=r"(?s)the text is empty.*empty\.txt"):
        tiny.load(tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(
        CalibrationError, match=r"too little text: \d+ tokens, but 24 are needed for 2 \+ 1 seq"
    ):
        tiny.load(tmp_path / "short.txt")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match=r"(?s)no text file in this folder"):
        tiny.load(tmp_path / "nothing")
    for wrong in ("selv", str(tmp_path / "gone.txt"), "data/notes.jsonl"):
        with pytest.raises(UsageError, match=r"(?s)no such text.*owner/name"):
            tiny.load(wrong)
    with pytest.raises(UsageError, match="a file has no splits"):
        tiny.load(tmp_path / "short.txt", split="train")
    for option in ("split", "column"):
        with pytest.raises(UsageError, match="a saved set has no split or column"):
            tiny.load(tmp_path / "set.safetensors", **{option: "text"})


@pytest.mark.parametrize("option", [{"samples": 0}, {"seq_len": 1}, {"held_out": -1}, {"seq_len": 257}])
def test_bad_sizes(tiny: Tiny, notes: Path, option: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(option)).replace('_', '-')} is"):
        tiny.load(notes, **option)


def test_self_text_is_written_once(tiny: Tiny, cache: Path) -> None:
    calls: list[tuple[int, int]] = []
    made = tiny.load("self", seq_len=16, progress=lambda *now: calls.append(now))
    assert made.tokens.shape == (2, 16) and made.held_out.shape == (1, 16) and calls
    facts = made.manifest
    assert (facts.source, facts.template, facts.held_out_from) == ("self", "self", "other random streams")
    assert facts.model == tiny.checkpoint.fingerprint
    calls.clear()
    again = tiny.load("self", seq_len=16, progress=lambda *now: calls.append(now))
    assert again.manifest == made.manifest and torch.equal(again.tokens, made.tokens) and not calls
    kept = sorted((cache / "self-text").glob("*.safetensors"))
    assert len(kept) == 1
    kept[0].write_bytes(kept[0].read_bytes()[:-3])
    mended = tiny.load("self", seq_len=16, progress=lambda *now: calls.append(now))
    assert mended.fingerprint == made.fingerprint and calls
    assert tiny.load("self", seq_len=16, seed=1).fingerprint != made.fingerprint


def test_more_samples_keep_the_first_ones(tiny: Tiny) -> None:
    few, many = tiny.load("self", seq_len=16), tiny.load("self", seq_len=16, samples=4)
    assert torch.equal(many.tokens[:2], few.tokens) and torch.equal(many.held_out, few.held_out)


def test_self_text_of_another_model_is_another(tiny: Tiny, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "other", seed=1)
    options = {"samples": 2, "held_out": 1, "seq_len": 16}
    other = load_calibration(
        "self", checkpoint=open_checkpoint(folder), tokenizer=load_tokenizer(folder), **options
    )
    assert other.fingerprint != tiny.load("self", seq_len=16).fingerprint
    with pytest.raises(UsageError, match="no split or column"):
        tiny.load("self", column="text")


def test_a_cache_that_cannot_be_written_costs_no_text(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "file"))
    assert tiny.load("self", seq_len=16).tokens.shape == (2, 16)
    assert "not kept for the next run" in caplog.text


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "plain")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(CalibrationError, match=r"(?s)no chat template.*line 1"):
        load_calibration(str(path), checkpoint=open_checkpoint(folder), tokenizer=load_tokenizer(folder))


def test_real_text(tiny: Tiny, shared_data: Path) -> None:
    made = tiny.load(shared_data / "c4" / "c4_validation_2k.jsonl", samples=32, held_out=8, seq_len=256)
    assert made.manifest.documents_read == 2000 and made.manifest.held_out_from == "other documents"


@pytest.mark.parametrize("samples", [10**10, 10**20])
def test_more_tokens_than_memory_holds_are_refused(tiny: Tiny, notes: Path, samples: int) -> None:
    for source in ("self", notes):
        with pytest.raises(
            UsageError, match=f"{samples} \\+ 1 sequences of 8 tokens take .* are free"
        ) as caught:
            tiny.load(source, samples=samples)
        assert caught.value.hint == "lower --samples or --seq-len"


def test_a_path_with_a_tilde_is_expanded(tiny: Tiny, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell spells out what stands in a recipe."""
    made = tiny.load(notes)
    made.save(notes.parent / "set.safetensors")
    monkeypatch.setenv("HOME", str(notes.parent))
    assert tiny.load("~/set.safetensors").fingerprint == made.fingerprint
