from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import PADDING_ROWS, SPECIAL, write_tiny_model

from qwenq.calibration import self_text
from qwenq.calibration.self_text import (
    HELD_OUT_ROWS,
    batch_rows,
    cache_bytes_per_row,
    draws,
    separator_of,
    vocabulary_of,
    write_self_text,
)
from qwenq.errors import CalibrationError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.tokenizer import load_tokenizer

ROWS, SEQ_LEN = [0, 1, 2, 5, HELD_OUT_ROWS], 48
END_OF_TEXT, IM_START, IM_END = range(3)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def write(folder: Path, rows: list[int] = ROWS, seed: int = 3, **options: Any) -> torch.Tensor:
    return write_self_text(
        open_checkpoint(folder), load_tokenizer(folder), rows, SEQ_LEN, seed=seed, **options
    )


def test_every_token_is_the_one_its_draw_selects(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers in float64, without a cache: the draw lies in the chosen id's interval."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(self_text, "product_dtype", lambda _: torch.float32)  # bfloat16 rounds draws away
    text, uniforms = write(model_folder), draws(3, ROWS, SEQ_LEN)
    oracle = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    size = load_tokenizer(model_folder).vocab_size
    with torch.no_grad():
        probabilities = oracle(text).logits[..., :size].softmax(-1)
    upper = probabilities.cumsum(-1)
    restarts = 0
    for row in range(len(ROWS)):
        assert text[row, 0] == IM_START
        for place in range(1, SEQ_LEN):
            token, before = int(text[row, place]), int(text[row, place - 1])
            if before in (END_OF_TEXT, IM_END):
                assert token == IM_START  # a new text begins
                restarts += 1
                continue
            high = upper[row, place - 1, token]
            low = high - probabilities[row, place - 1, token]
            assert low - 1e-5 <= uniforms[row, place] <= high + 1e-5
    assert restarts > 0


def test_a_rows_text_does_not_depend_on_the_other_rows(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = write(model_folder)
    assert torch.equal(write(model_folder, [5, 1])[0], together[3])
    monkeypatch.setattr(self_text, "_MOST_ROWS", 2)
    assert torch.equal(write(model_folder), together)


def test_seed_and_row_choose_the_text(model_folder: Path) -> None:
    text = write(model_folder)
    assert torch.equal(text, write(model_folder)) and text.shape == (len(ROWS), SEQ_LEN)
    assert len({tuple(row) for row in text.tolist()}) == len(ROWS)
    assert not torch.equal(text, write(model_folder, seed=4))


def test_padded_rows_of_the_embedding_are_never_sampled(tmp_path: Path) -> None:
    """The padding rows get by far the largest logits, and must still not appear."""
    from safetensors.torch import load_file, save_file

    folder = write_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    size = load_tokenizer(folder).vocab_size
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][size:] *= 1000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = (
        (folder / "config.json")
        .read_text()
        .replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    (folder / "config.json").write_text(config)
    assert open_checkpoint(folder).config["vocab_size"] == size + PADDING_ROWS
    assert int(write(folder).max()) < size


def test_without_bos_texts_begin_with_the_separator(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, bos=False)
    text = write(folder)
    assert (text[:, 0] == END_OF_TEXT).all()
    after = text[:, 1:][text[:, :-1] == END_OF_TEXT]
    assert (after != END_OF_TEXT).any()  # the separator itself begins the next text


def test_the_vocabulary_has_bos_ends_and_real_size(model_folder: Path, tmp_path: Path) -> None:
    checkpoint, tokenizer = open_checkpoint(model_folder), load_tokenizer(model_folder)
    words = vocabulary_of(checkpoint, tokenizer)
    assert (words.start, words.ends, words.size) == (IM_START, {END_OF_TEXT, IM_END}, tokenizer.vocab_size)
    assert tokenizer.decode([separator_of(tokenizer)]) == SPECIAL[0]
    checkpoint.config["qwen_v1"] = {"real_vocab": 290}
    assert vocabulary_of(checkpoint, tokenizer).size == 290


def test_draws_are_uniform_and_a_row_has_its_own() -> None:
    numbers = draws(0, range(50), 400)
    assert numbers.dtype == torch.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert torch.equal(draws(0, [7, HELD_OUT_ROWS], 400)[0], numbers[7])
    assert torch.equal(draws(0, [7], 100)[0], numbers[7, :100])
    histogram = torch.histc(numbers.float(), 10, 0, 1)  # 2000 expected in each, standard deviation 42
    assert (histogram - 2000).abs().max() < 200
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.25


def test_batches_follow_from_the_shape_alone() -> None:
    qwen_7b = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
    assert cache_bytes_per_row(qwen_7b, 2048, torch.bfloat16) == 1 << 30  # 0.5 MiB a token
    smol = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    assert cache_bytes_per_row(smol, 512, torch.float32) == 2 * 30 * 3 * 64 * 512 * 4
    assert [batch_rows(n) for n in (1 << 30, 1 << 20, 1 << 40)] == [2, 64, 1]


def test_progress_ends_at_the_total(model_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    write(model_folder, progress=lambda *now: seen.append(now))
    assert seen == sorted(seen) and seen[-1] == (len(ROWS) * SEQ_LEN,) * 2


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU has float16 alone, and a model larger activations than that holds."""
    from safetensors.torch import load_file, save_file

    folder = write_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for part in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{part}_proj.weight"] *= 1e4
    monkeypatch.setattr(self_text, "product_dtype", lambda _: torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="logits are not finite"):
        write(folder)


def test_a_bos_id_outside_the_embedding_is_refused(model_folder: Path) -> None:
    checkpoint = open_checkpoint(model_folder)
    few = replace(checkpoint, config={**checkpoint.config, "vocab_size": IM_START})
    with pytest.raises(CalibrationError, match=f"begin with token {IM_START} .* knows 0 … {IM_START - 1}"):
        vocabulary_of(few, load_tokenizer(model_folder))
