"""The steps of a recipe: what they are, where they write, and that their commands exist."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from qwenq.cli.app import app, register
from qwenq.errors import DataError, UsageError
from qwenq.recipe import read_recipe
from qwenq.results import Model, Row, append_row, read_rows
from qwenq.workflow import Chain, Step, run_steps, steps_of

ROOT = Path(__file__).parents[1]

WHOLE = """
precisions = ["fp32", "bf16", "int8", "int4"]
[calibration]
samples = 4
[eval]
tasks = ["mmlu", "gsm8k"]
sample = true
limit = 20
[profile]
tokens = [64]
encode = [32]
attention = ["off", "sdpa"]
budget = "1m60s"
[report]
name = "small"
folder = "out"
[gate]
baseline = "baseline"
fail_on = "accuracy:significant"
"""


def chain(folder: Path, text: str = WHOLE) -> Chain:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return steps_of(read_recipe(path), path, folder / "work")


def test_the_steps_of_a_whole_chain(tmp_path: Path) -> None:
    assert [step.name for step in chain(tmp_path).steps] == [
        "quantise to int8",
        "quantise to int4",
        "evaluate fp32",
        "evaluate bf16",
        "evaluate int8",
        "evaluate int4",
        "profile",
        "report",
        "gate",
    ]
    assert chain(tmp_path).page == Path("out/small/index.html")


def test_the_bundled_model_is_profiled_beside_its_quantised_ones(tmp_path: Path) -> None:
    profile = next(step for step in chain(tmp_path).steps if step.name == "profile")
    assert profile.arguments[1] == "bundled"
    assert [Path(name).name[-4:] for name in profile.arguments[2:4]] == ["Int8", "Int4"]
    assert profile.arguments[4:6] == ("--precision", "fp32,bf16")


def test_quantised_models_are_evaluated_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """And unquantised ones in that of their precision, whatever is asked of the others."""
    steps = chain(tmp_path, WHOLE.replace("[profile]", 'dtype = "float32"\n[profile]')).steps
    dtypes = {step.name: arguments_of(step).get("--dtype") for step in steps if step.name[:4] == "eval"}
    assert dtypes == {
        "evaluate fp32": "float32",
        "evaluate bf16": "bfloat16",
        "evaluate int8": "float32",
        "evaluate int4": "float32",
    }
    (int4,) = (step for step in chain(tmp_path).steps if step.name == "evaluate int4")
    assert "--dtype" not in int4.arguments


def test_a_gate_names_conditions_only_where_the_recipe_does(tmp_path: Path) -> None:
    """Named ones that judge nothing fail; the default would, in a chain that measures no speed."""
    assert chain(tmp_path).steps[-1].arguments[3:5] == ("--fail-on", "accuracy:significant")
    made = chain(tmp_path, '[eval]\nsample = true\n[gate]\nbaseline = "baseline"\n')
    gate = made.steps[-1]
    forms = ("--markdown", str(made.work / "gate.md"), "--junit", str(made.work / "gate.xml"))
    assert gate.arguments == ("compare", "baseline", str(made.work), *forms)
    model = Model("m-Int4", "sha256:m", "int4", "m", nbytes=1000)
    point: dict[str, Any] = {"task": "mmlu", "protocol": "base", "version": 1, "limit": None}
    row = Row("accuracy", model, point, 1.0, "share", n=1, details={"items": {"a": True}})
    for run in (tmp_path / "baseline", made.work):
        append_row(run, row)
    command = [sys.executable, "-m", "qwenq", *gate.arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "speed:<0.95 judged nothing: the baseline has no such row" in done.stdout


def test_the_gate_of_this_repository_computes_in_float32() -> None:
    """What it quantises, checks and evaluates: a CPU without bfloat16 has to say the same."""
    path = ROOT / "recipes" / "ci.toml"
    recipe = read_recipe(path)
    assert recipe.eval
    assert (recipe.quantize.dtype, recipe.eval.dtype, recipe.precisions[0]) == ("float32", "float32", "fp32")
    evaluated = [step for step in steps_of(recipe, path).steps if step.name.startswith("evaluate")]
    assert [arguments_of(step)["--dtype"] for step in evaluated] == ["float32"] * 3
    baseline = read_rows(ROOT / "reports" / "baselines" / "ci")
    asked = [row for row in baseline if row.metric.startswith("accuracy")]
    assert {row.settings["dtype"] for row in asked} == {"float32"}
    assert {row.point["dtype"] for row in baseline if row.metric == "kl"} == {"float32"}


def arguments_of(step: Step) -> dict[str, str]:
    """Each option and what stands behind it."""
    return dict(pairwise(step.arguments))


def test_a_recipe_of_quantising_alone(tmp_path: Path) -> None:
    made = chain(tmp_path, "[quantize]\nbits = 8")
    assert [step.name for step in made.steps] == ["quantise to int8"]
    assert made.page is None


@pytest.mark.parametrize(
    "text", [WHOLE, 'model = "qwen-7b-chat"\nweights = "random"\n[profile]\n', "[eval]\n"]
)
def test_every_step_is_a_command_with_options_that_exist(tmp_path: Path, text: str) -> None:
    register()
    commands: Any = typer.main.get_command(app)
    for step in chain(tmp_path, text).steps:
        name, *arguments = step.arguments
        commands.commands[name].make_context(name, arguments)


@pytest.mark.parametrize(
    ("limit", "asked"), [("20", "20"), ("{ mmlu = 20, gsm8k = 150 }", "mmlu=20,gsm8k=150")]
)
def test_a_limit_for_all_tasks_or_by_task(tmp_path: Path, limit: str, asked: str) -> None:
    steps = {step.name: step for step in chain(tmp_path, f"[eval]\nlimit = {limit}").steps}
    step = steps["evaluate bf16"]
    assert step.arguments[step.arguments.index("--limit") + 1] == asked


def test_random_weights_are_profiled_and_never_evaluated(tmp_path: Path) -> None:
    text = 'model = "qwen-7b-chat"\nweights = "random"\nprecisions = ["bf16", "int4"]\n'
    profile, report = chain(tmp_path, f"{text}[profile]").steps  # nothing is quantised that nobody reads
    assert report.name == "report"
    assert profile.arguments[:4] == ("profile", "qwen-7b-chat", "--precision", "bf16,int4")
    with pytest.raises(UsageError, match="measure chance"):
        chain(tmp_path, f"{text}[eval]")
    assert [step.name for step in chain(tmp_path, text).steps] == ["quantise to int4"]


def test_another_recipe_gets_other_folders_and_the_same_one_its_own(tmp_path: Path) -> None:
    def folder(text: str) -> Path:
        return chain(tmp_path, text).steps[0].makes

    assert folder("") == folder("[eval]\nlimit = 3")
    assert folder("") != folder("[quantize]\ndamp = 0.02")
    assert folder("") != folder("[calibration]\nsamples = 3")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = f'model = "{tmp_path / "model"}"'
    before = folder(text)
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert folder(text) != before


def test_what_a_later_step_needs_of_the_machine_is_required_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))

    def absent(*_: object) -> None:
        raise UsageError("it is not here")

    monkeypatch.setattr("qwenq.workflow._run_steps", lambda *_: 0)
    evaluation = '[eval]\ntasks = ["humaneval"]\nsample = true\n'
    with monkeypatch.context() as patch:
        patch.setattr("qwenq.models.bundled.find_gguf", absent)
        for text in ("", evaluation):
            with pytest.raises(UsageError, match="it is not here"):
                run_steps(chain(tmp_path, text))
        assert run_steps(chain(tmp_path, f'model = "{tmp_path}"\n')) == 0
    with monkeypatch.context() as patch:
        patch.setattr("qwenq.evals.sandbox.run.find_sandbox", absent)
        with pytest.raises(UsageError, match="it is not here"):
            run_steps(chain(tmp_path, f'model = "{tmp_path}"\n{evaluation}'))
        letters = evaluation.replace("humaneval", "mmlu")
        assert run_steps(chain(tmp_path, f'model = "{tmp_path}"\n{letters}')) == 0


def test_benchmarks_that_are_not_there_are_missed_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenq.workflow._run_steps", lambda *_: 0)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    text = f'model = "{tmp_path}"\n[eval]\ndata = "{tmp_path / "data"}"\ntasks = ["gsm8k"]\n'
    with pytest.raises(DataError, match="no such benchmark file"):
        run_steps(chain(tmp_path, text))
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        run_steps(chain(tmp_path, text))
