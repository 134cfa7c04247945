"""The pipeline as a function call, and a listener that remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_families import write_calibration

from qwenq.evals.rows import append_check_rows
from qwenq.events import Advance, Event, Notice, Start
from qwenq.gptq.pipeline import LayerDone
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.identity import result_model
from qwenq.quantization import LAYERS, Quantised, quantize
from qwenq.recipe import Recipe


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[LayerDone] = []
        self.total = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Notice(text):
                self.lines.append(text)
            case Start(step, total):
                self.lines.append(step)
                self.total = total if step == LAYERS else self.total
            case Advance(result=LayerDone() as done):
                self.done.append(done)


def recipe_for(model: Path, calibration: Path | None = None, **changes: Any) -> Recipe:
    source = calibration or write_calibration(model, model.parent / "calibration.safetensors")
    recipe = Recipe().override({"model": str(model)}, calibration={"source": str(source)})
    return recipe.override(quantize={"dtype": "float32", **changes})


def run(model: Path, out: Path, ear: Recorder | None = None, **changes: Any) -> Quantised:
    return quantize(recipe_for(model, **changes), out, ear or Recorder(), device="cpu")


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "qwenq.json").read_text())
    return content


def append_check(folder: Path, run_folder: Path) -> None:
    """Append the check in a folder's manifest to a run, as `qwenq eval` does."""
    model = result_model(open_checkpoint(folder), torch.float32, str(folder))
    append_check_rows(folder, model, run_folder)
