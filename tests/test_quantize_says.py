"""What `qwenq quantize` says of its choices, and of what it had to do otherwise."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from pipeline import Recorder, manifest_of, recipe_for, run
from tiny_families import save_calibration, write_family
from tiny_model import write_tiny_model

from qwenq.distributed import ALONE, Team
from qwenq.errors import VerificationError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.shapes import ModelShape
from qwenq.planner.calibration_size import USABLE
from qwenq.planner.estimates import quantisation_memory
from qwenq.planner.plan import PlanOptions, find_model, make_plan
from qwenq.quantization import quantize
from qwenq.recipe import Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))


def test_choices_are_said_with_their_reasons(tmp_path: Path) -> None:
    ear = Recorder()
    run(write_family(tmp_path / "m"), tmp_path / "out", ear)
    said = "\n".join(ear.lines)
    for part in (
        "computing in float32 on cpu: as asked",
        "group size 32: the largest of 128, 64, 32 that divides every input width",
        "Int4 · symmetric · act-order, static groups · scale search weighted by the Hessian's diagonal"
        " · asymmetric calibration 0.5 (GPTAQ) · coordinate descent, 2 sweeps · damping 0.1",
        "4 × 32 tokens (the sizes of that set)",
    ):
        assert part in said
    ear = Recorder()
    settings = {
        "sym": False,
        "any_engine": True,
        "act_order": "none",
        "scale_search": "mse",
        "asymmetric_calibration": 0.0,
    }
    run(write_family(tmp_path / "n"), tmp_path / "other", ear, **settings)
    said = "\n".join(ear.lines)
    assert (
        "Int4 · asymmetric (format gptq_v2, which some kernels do not load) · no act-order"
        " · scale search by unweighted error · no asymmetric calibration · coordinate descent, 2 sweeps"
    ) in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("team", [ALONE, Team(launched=True)])
def test_what_runs_in_torch_for_want_of_a_kernel_is_said(
    tmp_path: Path, team: Team, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun's processes sum up Hessians in a way of their own; the rest they compute like any other.

    Attention and Hessians are compiled for bfloat16 and float32.
    """
    monkeypatch.setenv("QWENQ_CPU", "torch")
    model, ear = write_family(tmp_path / "m"), Recorder()
    made = quantize(recipe_for(model, dtype=dtype), tmp_path / "out", ear, device="cpu", team=team)
    said = [line for line in ear.lines if "run in torch" in line]
    compiled = dtype != "float16"
    slower = ["rounding and coordinate descent, scale search" + (", Hessians" if compiled else "")]
    slower += ["attention, norms and activations"] if compiled else []
    why = " run in torch, which takes longer, because QWENQ_CPU=torch turns it off"
    assert said == [f"{what}{why}" for what in slower]
    told = manifest_of(made.folder)["computed_in"]
    assert told["solver"] == "torch"
    assert told["attention"] == "sdpa"
    assert told["sums"] == ("exact" if team.launched else "torch")


def test_raised_damping_is_said_with_its_modules(tmp_path: Path) -> None:
    model = write_family(tmp_path / "m")
    tokens = torch.full((4, 16), 9)
    path = save_calibration(model, tmp_path / "c.safetensors", tokens, tokens[:2].clone())
    ear = Recorder()
    recipe = recipe_for(model, path, damp=1e-9, bits=8)
    with suppress(VerificationError):  # one token is no calibration; the damping is what is looked at
        quantize(recipe, tmp_path / "out", ear, device="cpu")
    assert any(
        line.startswith("layer 1, self_attn.q_proj") and "damping raised to" in line for line in ear.lines
    )


def test_calibration_that_memory_does_not_hold_is_made_smaller_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `qwenq plan` answers for such a machine; sizes that the recipe gives are kept."""
    model, ear = write_tiny_model(tmp_path / "m", hidden_size=64, intermediate_size=128), Recorder()
    shape = ModelShape.from_config(open_checkpoint(model).config)
    usual = quantisation_memory(shape, samples=48, seq_len=256, dtype="float32").peak
    memory = int(usual / USABLE) - 1
    monkeypatch.setattr("qwenq.models.machine.memory_limit", lambda: memory)
    recipe = Recipe().override({"model": str(model)}, quantize={"dtype": "float32", "bits": 8})
    made = quantize(recipe, tmp_path / "out", ear, device="cpu")
    said = "\n".join(ear.lines)
    assert "calibration: 24 × 256 tokens instead of 48 × 256, which take 0.5 GiB by estimate" in said
    assert "24 × 256 tokens (as many as fit the memory)" in said
    assert manifest_of(made.folder)["calibration"]["samples"] == 24
    options = PlanOptions(ram=memory)
    assert make_plan(find_model(str(model)), options).quantisation[0].size.samples == 24
    ear = Recorder()
    asked = recipe.override(calibration={"samples": 48, "seq_len": 256})
    quantize(asked, tmp_path / "asked", ear, device="cpu")
    said = "\n".join(ear.lines)
    assert "memory may not suffice: quantising with 48 × 256 tokens takes 0.5 GiB by estimate" in said
    assert "48 × 256 tokens (as asked)" in said
