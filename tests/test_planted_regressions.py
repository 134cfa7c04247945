"""Regressions planted into real runs of the bundled model: each fails the gate, and for its own reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from brief_profiles import profile_briefly
from pipeline import append_check
from safetensors.torch import load_file, save_file

from qwenq.errors import CorruptFileError
from qwenq.profiling.measure import measure
from qwenq.profiling.spec import Point, subjects_of
from qwenq.reporting import gate
from qwenq.reporting.collect import collect
from qwenq.reporting.compare import compare, with_repeats
from qwenq.results import append_row, read_rows, write_environment
from qwenq.runtime.block import CompiledStep
from qwenq.runtime.quantised_linear import CpuNative
from qwenq.storage import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("planted")]  # one process: quantised once

ROOT = Path(__file__).parents[1]
LINEARS = 30 * 7
"""Of the bundled model."""
QUALITY = "accuracy:significant, kl:>0.05, size:>1.0"
"""The conditions of recipes/ci.toml, with answers held to Int4, too: those of one and the same model."""
SETTINGS = 'bits = 4\ngroup_size = 64\ndtype = "float32"'
PLAIN = 'dtype = "float32"\nscale_search = "none"\nact_order = "none"\nasymmetric_calibration = 0.0'
INT8 = f"bits = 8\ngroup_size = 64\n{PLAIN}"
WORSE = f"bits = 4\ngroup_size = -1\n{PLAIN}"


def python(*arguments: object, code: int = 0) -> str:
    """Standard error of ``python -m …``, which has to end with this exit code."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stderr


def quantise(folder: Path, settings: str) -> Path:
    """The bundled model on the committed tokens of the gate."""
    recipe = folder / "recipe.toml"
    folder.mkdir()
    recipe.write_text(f'[calibration]\nsource = "recipes/ci-tokens.safetensors"\n[quantize]\n{settings}\n')
    python("qwenq", "quantize", "--recipe", recipe, "--out", folder / "model")
    return folder / "model"


def evaluate(model: Path, run: Path) -> Path:
    """Sixty questions of the sample suite, on which the bundled model does not guess."""
    subjects = "repeated_answers,quoted_answers,marked_options"
    python(
        "qwenq", "eval", model, "--tasks", "mmlu", "--subjects", subjects, "--limit", 20,
        "--protocol", "base", "--sample", "--out", run,
    )  # fmt: skip
    return run


def record(model: Path, run: Path) -> Path:
    append_check(model, run)
    return run


def regressions(before: Path, after: Path, conditions: str, *turns: tuple[Path, Path]) -> set[str]:
    """Metrics that failed; nothing may be beyond comparison."""
    befores, afters = zip((before, after), *turns, strict=True)
    sides = (
        with_repeats(collect([first]), collect(more) if more else None) for first, *more in (befores, afters)
    )
    verdict = gate.judge(compare(*sides), gate.parse(conditions))
    assert not verdict.of("not comparable"), [item.reason for item in verdict.of("not comparable")]
    assert not verdict.unjudged
    return {item.comparison.row.metric for item in verdict.of("regression")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise(tmp_path_factory.mktemp("planted") / "good", SETTINGS)


@pytest.fixture(scope="module")
def before(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("planted") / "before"
    return record(model, evaluate(model, run))


def test_nothing_planted_nothing_found(model: Path, before: Path, tmp_path: Path) -> None:
    """Evaluated once more. Against the committed baseline, too: of its figures those that this run has."""
    after = record(model, evaluate(model, tmp_path / "after"))
    assert regressions(before, after, QUALITY) == set()
    committed = collect([ROOT / "reports" / "baselines" / "ci"])
    verdict = gate.judge(compare(committed, collect([after])), gate.parse("kl:>0.05, size:>1.0"))
    int4 = [item for item in verdict.judged if item.comparison.row.model.precision == "int4"]
    judged = {item.comparison.row.metric: item.outcome for item in int4}
    assert (judged["kl"], judged["size"]) == ("passed", "passed")


def test_a_worse_recipe_fails_for_its_divergence(before: Path, tmp_path: Path) -> None:
    """Whole rows instead of groups, and nothing of what makes GPTQ good here: smaller, and further away."""
    after = record(quantise(tmp_path / "worse", WORSE), tmp_path / "after")
    assert regressions(before, after, "kl:>0.05, size:>1.0") == {"kl"}


def damaged(model: Path, folder: Path, *, told: bool) -> Path:
    """A copy in which one tensor is not what it was; ``told``: and the manifest says that it should be so."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.3.mlp.down_proj.scales"
    tensors[name] = tensors[name].flip(0).mul(40).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    if told:
        manifest = json.loads((folder / "qwenq.json").read_text())
        manifest["files"][file.name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        (folder / "qwenq.json").write_text(json.dumps(manifest))
    return folder


def test_a_damaged_tensor_is_named_before_anything_is_compared(model: Path, tmp_path: Path) -> None:
    """The check in the manifest is not that of these bytes."""
    folder = damaged(model, tmp_path / "m", told=False)
    with pytest.raises(CorruptFileError, match="the bytes are not those that were written") as refused:
        append_check(folder, tmp_path / "r")
    assert "model.safetensors" in str(refused.value)
    assert not (tmp_path / "r").exists()


def test_a_tensor_that_was_written_wrong_fails_for_its_answers(tmp_path: Path) -> None:
    """A bug of what writes would hash its own mistake: only the answers show it.

    Those of Int8, which are the unquantised model's: Int4's may be near guessing before anything is damaged.
    """
    model = quantise(tmp_path / "int8", INT8)
    before = record(model, evaluate(model, tmp_path / "before"))
    after = evaluate(damaged(model, tmp_path / "m", told=True), tmp_path / "after")
    assert regressions(before, record(model, after), QUALITY) == {"accuracy"}


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    profile_briefly(monkeypatch, 4.0)


def profiled(model: Path, run: Path) -> Path:
    """Decoding in this process, where a kernel can be slowed; rows as `qwenq profile` writes them."""
    (subject,) = subjects_of([str(model)], []).subjects
    point = Point(replace(subject, dtype="bfloat16"), "sdpa", "fast", 1, 16, "cpu")  # what the kernel takes
    for row in measure(point):
        append_row(run, row)
    write_environment(run, {"cpu": {"model": "this one", "cores": os.cpu_count()}})
    return run


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no such kernel here")
def test_a_slowed_kernel_fails_for_its_speed(
    model: Path, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same kernel measured again does not. In turns: other tests run at the same time."""
    before, same = profiled(model, tmp_path / "before"), profiled(model, tmp_path / "same")
    turn = profiled(model, tmp_path / "before2"), profiled(model, tmp_path / "same2")
    assert regressions(before, same, "speed.protocol:<0.5, size:>1.0", turn) == set()
    speed = next(row.value for row in read_rows(before) if row.metric == "speed.protocol")
    step = 6 / speed  # seven times slower than it was, on a machine of any speed

    def slowed(call: Any, delay: float) -> Any:
        def slow(*arguments: Any) -> Any:
            end = time.perf_counter() + delay
            while time.perf_counter() < end:
                pass
            return call(*arguments)

        return slow

    monkeypatch.setattr("qwenq.profiling.measure.PROTOCOL_PATIENCE", 20.0)  # for the three that are judged
    for kernel, delay in ((CpuNative, step / LINEARS), (CompiledStep, step)):
        monkeypatch.setattr(kernel, "__call__", slowed(kernel.__call__, delay))  # whichever runs here
    after = profiled(model, tmp_path / "after")
    assert regressions(before, after, "speed.protocol:<0.5, size:>1.0") == {"speed.protocol"}
