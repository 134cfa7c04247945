"""The steps of a recipe: what they are, that their commands exist, and when one is necessary again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from qwenq.cli.app import app
from qwenq.cli.commands import register
from qwenq.errors import UsageError
from qwenq.evals.recorded import rows_of
from qwenq.recipe import Recipe, read_recipe
from qwenq.results import Model, Row, append_row, read_rows
from qwenq.run.chain import Chain, Step, chain_of
from qwenq.run.execute import is_done, run_chain

ROOT = Path(__file__).parents[2]

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
    return chain_of(read_recipe(path), path, folder / "work")


def test_the_steps_of_a_whole_chain(tmp_path: Path) -> None:
    assert [step.name for step in chain(tmp_path).steps] == [
        "quantise to int8",
        "quantise to int4",
        "record the check of int8",
        "record the check of int4",
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
    assert chain(tmp_path).steps[-1].arguments[3:] == ("--fail-on", "accuracy:significant")
    made = chain(tmp_path, '[eval]\nsample = true\n[gate]\nbaseline = "baseline"\n')
    gate = made.steps[-1]
    assert gate.arguments == ("compare", "baseline", str(made.work))
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
    evaluated = [step for step in chain_of(recipe, path).steps if step.name.startswith("evaluate")]
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
        if step.module == "qwenq":
            name, *arguments = step.arguments
            commands.commands[name].make_context(name, arguments)


def test_random_weights_are_profiled_and_never_evaluated(tmp_path: Path) -> None:
    text = 'model = "qwen-7b-chat"\nweights = "random"\nprecisions = ["bf16", "int4"]\n'
    (*_, profile, _) = chain(tmp_path, f"{text}[profile]").steps
    assert profile.arguments[:4] == ("profile", "qwen-7b-chat", "--precision", "bf16,int4")
    with pytest.raises(UsageError, match="measure chance"):
        chain(tmp_path, f"{text}[eval]")


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    made = chain(tmp_path, "")
    assert not is_done(made, made.steps[0])
    made.steps[0].makes.mkdir(parents=True)
    assert is_done(made, made.steps[0])


def test_a_name_without_a_hash_leads_to_the_newest_model(steps: Path) -> None:
    alias = steps / "models" / "m-Int4"
    for name in ("old", "new"):
        made = steps / "models" / name / "m-Int4"
        made.parent.mkdir(parents=True)
        step = replace(marker(str(made.relative_to(steps)), steps), makes=made, whole=True, alias=alias)
        assert run_chain(made_of(steps, step), lambda line: None) == 0
        assert alias.resolve() == made
    again = replace(step, makes=steps / "models" / "old" / "m-Int4")
    assert run_chain(made_of(steps, again), lambda line: None) == 0  # done already, and asked for again
    assert alias.resolve() == again.makes
    assert sorted(path.name for path in alias.parent.iterdir()) == ["m-Int4", "new", "old"]


def test_somebodys_folder_under_that_name_stays(steps: Path) -> None:
    alias = steps / "models" / "m-Int4"
    (alias / "precious").mkdir(parents=True)
    step = replace(marker("made", steps), whole=True, alias=alias)
    assert run_chain(made_of(steps, step), lambda line: None) == 0
    assert (alias / "precious").is_dir()


def test_a_work_folder_that_a_kill_left_beside_a_whole_model_is_removed(tmp_path: Path) -> None:
    made = chain(tmp_path, "")
    leftover = made.steps[0].makes.with_name(f"{made.steps[0].makes.name}.partial")
    made.steps[0].makes.mkdir(parents=True)
    (leftover / "layers").mkdir(parents=True)
    (leftover / "layers" / "0.safetensors").write_bytes(b"of no use any more")
    assert run_chain(made, lambda line: None) == 0
    assert not leftover.exists()


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


def marker(name: str, folder: Path, *, code: int = 0, reads: tuple[Path, ...] = ()) -> Step:
    """A step that leaves a line in a log and makes a file."""
    script = folder / "step.py"
    script.write_text(
        "import sys, pathlib\n"
        "folder, name, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])\n"
        "with (folder / 'log').open('a') as log: log.write(name + '\\n')\n"
        "(folder / name).touch()\n"
        "sys.exit(code)\n"
    )
    return Step(name, (str(folder), name, str(code)), folder / name, reads, module="step")


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def made_of(folder: Path, *made: Step) -> Chain:
    return Chain(Recipe(), made, folder / "work", None)


def log(folder: Path) -> list[str]:
    return (folder / "log").read_text().split()


def test_a_step_that_is_done_is_not_done_again(steps: Path) -> None:
    both = made_of(steps, marker("one", steps), marker("two", steps))
    assert run_chain(both, lambda line: None) == 0
    assert run_chain(both, lambda line: None) == 0
    assert log(steps) == ["one", "two"]


def test_what_failed_ends_the_chain_and_is_tried_again(steps: Path) -> None:
    said: list[str] = []
    broken = made_of(steps, marker("one", steps), marker("two", steps, code=5), marker("three", steps))
    assert run_chain(broken, said.append) == 5
    assert "exit code 5" in said[-1]
    assert (
        run_chain(made_of(steps, *broken.steps[:1], marker("two", steps), broken.steps[2]), said.append) == 0
    )
    assert log(steps) == ["one", "two", "two", "three"]


def test_what_a_step_reads_or_has_made_decides(steps: Path) -> None:
    source = steps / "source"
    source.write_text("a")
    one = made_of(steps, marker("one", steps, reads=(source,)))
    run_chain(one, lambda line: None)
    assert is_done(one, one.steps[0])
    source.write_text("longer")
    assert not is_done(one, one.steps[0])
    run_chain(one, lambda line: None)
    (steps / "one").unlink()
    assert not is_done(one, one.steps[0])


def test_a_verdict_is_always_asked_for(steps: Path) -> None:
    gate = made_of(steps, replace(marker("gate", steps), always=True))
    run_chain(gate, lambda line: None)
    run_chain(gate, lambda line: None)
    assert log(steps) == ["gate", "gate"]


def test_a_torn_line_of_the_journal_is_no_end(steps: Path) -> None:
    one = made_of(steps, marker("one", steps))
    run_chain(one, lambda line: None)
    journal = steps / "work" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert not is_done(one, one.steps[0])
    run_chain(one, lambda line: None)
    assert is_done(one, one.steps[0])
    assert log(steps) == ["one", "one"]


def test_rows_of_a_check_are_those_of_the_manifest() -> None:
    check = {
        "kl": {"value": 0.1, "low": 0.08, "high": 0.12},
        "same_top": {"value": 0.8, "low": 0.7, "high": 0.9},
        "perplexity_ratio": {"value": None, "low": None, "high": None},
        "sequences": 8, "seq_len": 64, "tokens": 504, "dtype": "float32", "device": "cpu",
        "modules": [{"name": "model.layers.0.mlp.up_proj", "error": 0.01, "rtn_error": 0.02}],
        "kl_by_position": [
            {"first": 1, "last": 32, "n": 256, "value": 0.15, "low": 0.1, "high": 0.2},
            {"first": 33, "last": 63, "n": 248, "value": 0.05, "low": None, "high": None},
        ],
    }  # fmt: skip
    calibration = {"source": "self", "tokens": "abc"}
    manifest = {"check": check, "calibration": calibration, "made_by": "qwenq 1", "recipe": {}}
    kl, same, ratio = rows_of(manifest, Model("m", "f", "int4", "m"), "qwenq quantize m")
    assert (kl.metric, kl.value, kl.low, kl.high, kl.n) == ("kl", 0.1, 0.08, 0.12, 504)
    assert same.details == {"command": "qwenq quantize m"}
    assert kl.details == {
        "command": "qwenq quantize m",
        "modules": check["modules"],
        "positions": [16.5, 48.0], "values": [0.15, 0.05], "counts": [256, 248],
        "lows": [0.1, None], "highs": [0.2, None],
    }  # fmt: skip
    assert (same.metric, same.value) == ("same_top", 0.8)
    assert (ratio.metric, ratio.status, ratio.reason) == ("perplexity.ratio", "failed", "not finite")


def test_ctrl_c_ends_the_step_and_the_chain(steps: Path) -> None:
    (steps / "step.py").write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path(sys.argv[1] + '.saved').touch(); sys.exit(130)\n"
    )
    script = (
        "import sys; from pathlib import Path\n"
        "from qwenq.recipe import Recipe\n"
        "from qwenq.run.chain import Chain, Step\n"
        "from qwenq.run.execute import run_chain\n"
        f"step = Step('long', ({str(steps / 'begun')!r},), Path({str(steps / 'begun')!r}), module='step')\n"
        f"run_chain(Chain(Recipe(), (step,), Path({str(steps / 'work')!r}), None), print)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stderr=subprocess.PIPE
    ) as child:
        deadline = time.monotonic() + 120
        while not (steps / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)
        child.communicate()
    assert child.returncode != 0
    assert (steps / "begun.saved").exists()
    assert not (steps / "work" / "journal.jsonl").exists()


def test_sigterm_stops_the_chain_though_the_step_was_as_good_as_done(steps: Path) -> None:
    """It came when the step did not listen any more: the step counts, and the next one does not begin."""
    (steps / "step.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(0.2)\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
    )
    script = (
        "import sys; from pathlib import Path\n"
        "from qwenq.recipe import Recipe\n"
        "from qwenq.run.chain import Chain, Step\n"
        "from qwenq.run.execute import run_chain\n"
        f"folder = Path({str(steps)!r})\n"
        "made = tuple(Step(n, (str(folder / n),), folder / n, module='step') for n in ('one', 'two'))\n"
        "run_chain(Chain(Recipe(), made, folder / 'work', None), print)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert (steps / "one").exists()
    assert not (steps / "two").exists()
    (entry,) = map(json.loads, (steps / "work" / "journal.jsonl").read_text().splitlines())
    assert entry["step"] == "one"


def test_json_lines_of_the_journal_say_what_was_done(steps: Path) -> None:
    run_chain(made_of(steps, marker("one", steps)), lambda line: None)
    (entry,) = map(json.loads, (steps / "work" / "journal.jsonl").read_text().splitlines())
    assert entry["step"] == "one"
    assert entry["command"][0] == "step"
    assert entry["seconds"] >= 0
