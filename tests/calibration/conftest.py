from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from qwenq.calibration import CalibrationSet, load_calibration
from qwenq.models.checkpoint import Checkpoint, open_checkpoint
from qwenq.models.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Tiny:
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    def load(self, spec: object, **options: Any) -> CalibrationSet:
        sizes = {"samples": 2, "held_out": 1, "seq_len": 8}
        given = sizes | options if not str(spec).endswith(".safetensors") else options
        return load_calibration(str(spec), checkpoint=self.checkpoint, tokenizer=self.tokenizer, **given)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return Tiny(open_checkpoint(folder), load_tokenizer(folder))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("QWENQ_CACHE", str(folder))
    return folder
