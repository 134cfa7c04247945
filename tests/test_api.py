"""The Python API: names, types, laziness, and every example of docs/python.md."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from listening import notices_to
from tiny_model import write_tiny_model

import qwenq
from qwenq import api
from qwenq.errors import QuantisationError, UsageError
from qwenq.events import Advance, Event, Notice, Start
from qwenq.gptq.solver import quantize_weight
from qwenq.progress import StepListener, shown
from qwenq.recipe import QuantizeRecipe, Recipe
from qwenq.reporting.collect import collect
from qwenq.reporting.losses import summary_of
from qwenq.results import Model, Row

ROOT = Path(__file__).parents[1]
IMPORT_SECONDS = 0.1
BASE = "Qwen/Qwen2.5-0.5B-Instruct"


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    inherited = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=inherited, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def small_model(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 8192}
    return write_tiny_model(folder, **sizes)


def test_public_names() -> None:
    assert set(qwenq.__all__) == {
        "LoadedModel", "Recipe", "Results", "__version__", "calibrate", "check", "compare", "convert",
        "errors", "evaluate", "events", "gptq", "load", "perplexity", "plan", "profile", "push", "quantize",
        "read_recipe", "report",
    }  # fmt: skip
    code = "import qwenq\nfor name in qwenq.__all__: print(name, type(getattr(qwenq, name)).__name__)"
    kinds = dict(line.split() for line in python(code).splitlines())
    functions = {
        "calibrate", "check", "compare", "convert", "evaluate", "load", "perplexity", "plan", "profile",
        "push", "quantize", "read_recipe", "report",
    }  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == "function"} == functions
    assert set(dir(qwenq)) >= set(qwenq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qwenq.quantise


def test_importing_qwenq_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; began = time.process_time(); import qwenq; "
        "print(time.process_time() - began); import qwenq.api; print(*sys.modules)"
    )
    runs = [python(code).splitlines() for _ in range(3)]
    modules, seconds = runs[0][1], min(float(run[0]) for run in runs)
    heavy = {"torch", "transformers", "numpy", "pydantic", "rich", "pandas", "matplotlib", "typer"}
    assert heavy & set(modules.split()) == set()
    assert seconds < IMPORT_SECONDS


def test_the_package_is_typed() -> None:
    assert (ROOT / "qwenq" / "py.typed").exists()


def test_functions_are_documented_and_take_the_commands_options() -> None:
    for name in api.__all__:
        function = getattr(api, name)
        assert inspect.getdoc(function), name
        assert all(p.annotation is not p.empty for p in inspect.signature(function).parameters.values())


def test_every_example_of_the_documentation_runs(tmp_path: Path) -> None:
    examples(tmp_path, "import qwenq\n")


def examples(folder: Path, head: str) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    small_model(folder / BASE)
    code = "".join(blocks).replace("import qwenq\n", head, 1)
    said = python(code, folder, QWENQ_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    assert "torch.uint8 torch.Size([64, 2])" in said
    assert (folder / "reports" / "q4" / "index.html").is_file()
    assert "did you mean" in said or "qwen3-8b" in said
    assert "quantising 2 2" in said
    found = collect([folder / "runs" / "q4-speed"])  # its base was neither evaluated nor profiled
    (opens,) = summary_of(found, found.families[0])
    assert re.match(
        r"Int4: \w+, KL divergence [\d.]+ nats/token, same top token .*; [\d.]+ MB; decodes ", opens
    )


def test_a_function_has_the_errors_of_its_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="group_size"):
        api.quantize(tmp_path, group_size=48)
    with pytest.raises(UsageError, match="bitz"):
        api.quantize(tmp_path, bitz=4)
    with pytest.raises(UsageError, match="named twice"):
        api.compare(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="there is nothing to measure"):
        api.profile(tmp_path, tokens=(), encode=())
    with pytest.raises(UsageError, match=r"profile\.attention = 'v3'"):
        api.profile(tmp_path, attention=("v3",))


def test_a_recipe_is_a_file_or_an_object_and_arguments_replace_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("qwenq.quantization.quantize", lambda recipe, *rest, **options: seen.append(recipe))
    file = tmp_path / "r.toml"
    file.write_text("[quantize]\nbits = 8\ndamp = 0.2\n")
    for recipe in (file, str(file), Recipe().override(quantize={"bits": 8, "damp": 0.2})):
        api.quantize("m", recipe=recipe, bits=4, samples=3, progress=False)
    assert {(r.model, r.quantize.bits, r.quantize.damp, r.calibration.samples) for r in seen} == {
        ("m", 4, 0.2, 3)
    }


def test_rows_become_a_data_frame() -> None:
    model = Model("Tiny", "f", "int4", "Tiny")
    rows = [
        Row("accuracy", model, {"task": "mmlu", "limit": 2}, 0.5, "share", n=4),
        Row("speed.decode", model, {"context": 1}, None, "tokens/s", status="unavailable", reason="no GPU"),
    ]
    frame = api.Results(rows, Path("runs/x")).to_pandas()
    assert list(frame["metric"]) == ["accuracy", "speed.decode"]
    assert frame.loc[0, "task"] == "mmlu" and frame.loc[1, "reason"] == "no GPU"
    assert len(api.Results(rows)) == 2 and list(api.Results(rows)) == rows
    assert "<table" in api.Results(rows)._repr_html_()


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_in_a_pipe_writes_notices_only(progress: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with shown(progress) as listener:
        listener(Start("quantising", 3, "layers"))
        listener(Advance("quantising", 1, 3))
        listener(Notice("group size 32"))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.strip() == ("group size 32" if progress else "")


def test_a_callback_receives_every_event() -> None:
    seen: list[Event] = []
    with shown(seen.append) as listener:
        listener(Start("x", 1))
    said: list[str] = []
    notices_to(said)(Notice("y"))
    assert seen == [Start("x", 1)] and said == ["y"]


def test_the_bar_follows_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown(True) as bar:
        assert isinstance(bar, StepListener)
        bar(Start("checking", None, "steps"))
        bar(Advance("checking", 2, 5))
        assert bar._bar is not None
        (task,) = bar._bar.tasks
        assert (task.description, task.completed, task.total) == ("checking", 2, 5)
        bar(Start("quantising", 3, "layers", done=1))
        (task,) = bar._bar.tasks
        assert (task.completed, task.total, task.fields["what"]) == (1, 3, "layers")


def problem(seed: int = 0, rows: int = 24, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    X = torch.randn(512, width) @ torch.randn(width, width)
    return torch.randn(rows, width), 2 / len(X) * X.T @ X


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_a_weight_is_quantised_on_its_grid_at_the_error_that_is_told(bits: int, sym: bool) -> None:
    W, H = problem()
    kept = W.clone(), H.clone()
    found = quantize_weight(W, H, bits=bits, group_size=32, sym=sym)
    assert torch.equal(W, kept[0]) and torch.equal(H, kept[1])
    assert int(found.integers.max()) < 2**bits
    scales, zeros = (t.repeat_interleave(32, 1) for t in (found.scales, found.zeros))
    torch.testing.assert_close(found.dequantized, (found.integers.float() - zeros) * scales)
    damped = H + found.damp * H.diagonal().mean() * torch.eye(64)
    D = (W - found.dequantized).double()
    share = ((D @ damped.double()) * D).sum() / ((W.double() @ damped.double()) * W.double()).sum()
    assert found.error == pytest.approx(float(share), rel=1e-3, abs=1e-6)
    assert found.error <= found.rtn_error


def test_defaults_of_the_tensor_entry_are_the_recipes() -> None:
    defaults = {name: p.default for name, p in inspect.signature(quantize_weight).parameters.items()}
    recipe = QuantizeRecipe()
    names = ("bits", "sym", "scale_search", "damp")
    assert {name: defaults[name] for name in names} == {name: getattr(recipe, name) for name in names}


def test_a_weight_that_does_not_fit_its_hessian_is_refused() -> None:
    W, H = problem()
    for weight, hessian, options in ((W, H[:32, :32], {}), (W, H, {"group_size": 48}), (W, H, {"bits": 9})):
        with pytest.raises(UsageError):
            quantize_weight(weight, hessian, **options)
    H[3, 3] = torch.nan
    with pytest.raises(QuantisationError):
        quantize_weight(W, H, group_size=32)


def test_another_calibration_source_drops_what_describes_the_recipes_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line: a file has no splits, and the model's own text no columns either."""
    seen: list[Recipe] = []
    monkeypatch.setattr("qwenq.quantization.quantize", lambda recipe, *rest, **options: seen.append(recipe))
    (tmp_path / "notes.txt").write_text("text")
    mine = {"source": "owner/name", "split": "train", "column": "body", "samples": 3}
    recipe = Recipe().override(calibration=mine)
    sources = ("self", str(tmp_path / "notes.txt"), str(tmp_path / "set.safetensors"), "owner/other", None)
    for source in sources:
        api.quantize("m", recipe=recipe, calibration=source, progress=False)
    assert [(r.calibration.split, r.calibration.column, r.calibration.samples) for r in seen] == [
        (None, None, 3),
        (None, "body", 3),
        ("train", None, "auto"),
        ("train", "body", 3),
        ("train", "body", 3),
    ]


def test_settings_out_of_range_are_refused_as_on_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"eval\.limit = 0"):
        api.evaluate(tmp_path, limit=0)
    with pytest.raises(UsageError, match="'gsm8k' is not among the tasks"):
        api.evaluate(tmp_path, "mmlu", limit={"gsm8k": 3})
    with pytest.raises(UsageError, match="no such folder"):
        api.evaluate(tmp_path, data=tmp_path / "gone")
    with pytest.raises(UsageError, match="the name of a model behind --endpoint"):
        api.evaluate(model="served")
    with pytest.raises(UsageError, match=r"profile\.encode = -1"):
        api.profile(tmp_path, encode=(-1,))
    with pytest.raises(UsageError, match=r"has to end in \.safetensors"):
        api.calibrate(tmp_path, tmp_path / "set.bin")


def test_a_calibration_set_that_is_another_is_not_overwritten(tmp_path: Path) -> None:
    small_model(tmp_path / BASE)
    text, out = tmp_path / "notes.txt", tmp_path / "set.safetensors"
    text.write_text("Some words to read, one after the other, and again. " * 400)
    sizes = {"samples": 2, "seq_len": 16, "held_out": 1, "progress": False}
    first = api.calibrate(tmp_path / BASE, out, source=text, **sizes)  # type: ignore[arg-type]
    assert api.calibrate(tmp_path / BASE, out, source=text, **sizes).fingerprint == first.fingerprint  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds something else"):
        api.calibrate(tmp_path / BASE, out, source=text, **{**sizes, "samples": 3})  # type: ignore[arg-type]
    forced = api.calibrate(tmp_path / BASE, out, source=text, force=True, **{**sizes, "samples": 3})  # type: ignore[arg-type]
    assert forced.tokens.shape == (3, 16)
