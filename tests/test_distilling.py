"""Distilling as a part of `qwenq quantize`: what is written and said, and what text it may see."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import Recorder, manifest_of, recipe_for
from safetensors.torch import load_file
from tiny_families import write_calibration, write_family
from tiny_published import write_published

from qwenq.errors import UnsupportedError
from qwenq.gptq import distill
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.integrity import verify_files
from qwenq.quantization import Quantised, quantize

COARSE = {"initializer_range": 0.15}
PLAIN = {"refine": False, "scale_search": "none", "asymmetric_calibration": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def made(tmp_path: Path, ear: Recorder, samples: int = 24, **settings: Any) -> Quantised:
    model = tmp_path / "m"
    if not model.exists():
        write_family(model, "qwen2", "bfloat16", **COARSE)
    tokens = write_calibration(model, tmp_path / "c.safetensors", samples=samples, held_out=8)
    return quantize(
        recipe_for(model, tokens, **PLAIN, **settings), tmp_path / "out", ear, device="cpu", resume=False
    )


def test_only_scales_differ_and_the_check_sees_the_gain(tmp_path: Path) -> None:
    ear = Recorder()
    plain = made(tmp_path, ear)
    (tmp_path / "out").rename(tmp_path / "plain")
    tuned = made(tmp_path, ear, distill=6)
    assert plain.check is not None and tuned.check is not None
    assert tuned.check.kl.value < plain.check.kl.value
    told = manifest_of(tmp_path / "out")["distilled"]
    assert told["kept"] and told["after"] < told["before"]
    assert "distilled" not in manifest_of(tmp_path / "plain")
    assert any(
        line.startswith("distilled: KL of 3 sequences that were not learned from fell") for line in ear.lines
    )
    assert "distilling" in tuned.seconds and "distilling" not in plain.seconds
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(".scales")}
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    assert "model.safetensors" in verify_files(tmp_path / "out")


def test_nothing_is_tuned_on_the_text_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    embed = BlockwiseDecoder.embed

    def hashes(rows: torch.Tensor) -> set[str]:
        return {hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows}

    def watched(self: BlockwiseDecoder, batches: Any) -> Any:
        if tuning:
            seen.update(*(hashes(batch) for batch in batches))
        return embed(self, batches)

    distil, tuning = distill.distil, False

    def during(*given: Any) -> Any:
        nonlocal tuning
        tuning = True
        try:
            return distil(*given)
        finally:
            tuning = False

    monkeypatch.setattr(BlockwiseDecoder, "embed", watched)
    monkeypatch.setattr(distill, "distil", during)
    made(tmp_path, Recorder(), distill=1)
    stored = load_file(tmp_path / "c.safetensors")
    assert seen == hashes(stored["tokens"])
    assert not seen & hashes(stored["held_out"])


def test_too_few_sequences_to_decide_are_said(tmp_path: Path) -> None:
    ear = Recorder()
    made(tmp_path, ear, samples=3, distill=2)
    assert "not distilled: 3 calibration sequences are too few to hold some back that decide" in ear.lines
    assert "distilled" not in manifest_of(tmp_path / "out")


def test_random_weights_are_not_distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Recorder()
    monkeypatch.setattr("qwenq.models.random_weights.is_random", lambda config: True)
    assert made(tmp_path, ear, distill=1).check is None
    assert "not distilled: random weights have no accuracy" in ear.lines


def test_a_head_that_only_transformers_describes_is_refused_before_any_work(tmp_path: Path) -> None:
    model = write_published(tmp_path / "m", "mixtral")
    with pytest.raises(UnsupportedError, match="distilling is not possible with a model of type mixtral"):
        quantize(recipe_for(model, distill=1), tmp_path / "out", Recorder(), device="cpu")
    assert not list(tmp_path.glob("out*"))
