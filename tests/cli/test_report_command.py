"""``qwenq report`` and ``qwenq compare`` as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenq.results import Model, Row, append_row, read_rows, write_environment


def qwenq(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwenq", *arguments]
    known = {**os.environ, "GITHUB_ACTIONS": "", **environment}
    return subprocess.run(command, cwd=cwd, env=known, capture_output=True, text=True, check=False)


def write_run(folder: Path, *, correct: int = 80, speed: float = 50.0, kl: float = 0.1) -> None:
    model = Model("m-Int4", f"sha256:{correct}", "int4", "m", nbytes=1_000)
    items = {f"q/{number}": number < correct for number in range(100)}
    point = {"task": "mmlu", "protocol": "card", "version": 1}
    append_row(folder, Row("accuracy", model, point, correct / 100, "share", n=100, details={"items": items}))
    at = {"attention": "off", "engine": "fast", "context": 1, "tokens": 64, "batch": 1, "device": "cpu"}
    append_row(folder, Row("speed.decode", model, at, speed, "tokens/s", speed * 0.99, speed * 1.01, 5))
    append_row(folder, Row("kl", model, {"text": "t"}, kl, "nats/token"))
    write_environment(folder, {"cpu": {"model": "Imaginary CPU", "cores": 2}})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "before")
    return tmp_path


def test_a_report_ends_with_the_path_of_its_page(runs: Path) -> None:
    done = qwenq("report", "before", "--out", "reports/m", "--title", "A title", cwd=runs)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reports/m/index.html\n"
    assert (runs / "reports/m/README.md").read_text().startswith("# A title\n")


def test_a_run_that_is_not_there_is_explained(runs: Path) -> None:
    done = qwenq("report", "nowhere", "--out", "out", cwd=runs)
    assert done.returncode == 2
    assert "no results.jsonl there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (runs / "out").exists()


@pytest.mark.parametrize(("changes", "code", "says"), [
    ({}, 0, "Passed: no regression"),
    ({"correct": 60}, 1, "fails accuracy:significant"),
    ({"speed": 40.0}, 1, "fails speed:<0.95"),
    ({"kl": 0.2}, 1, "fails kl:>0.05"),
    ({"speed": 60.0, "kl": 0.05}, 0, "better"),
])  # fmt: skip
def test_the_gate_by_default(runs: Path, changes: dict[str, float], code: int, says: str) -> None:
    write_run(runs / "after", **changes)
    done = qwenq("compare", "before", "after", cwd=runs)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout


def test_what_cannot_be_compared_is_no_pass(runs: Path) -> None:
    write_run(runs / "after")
    write_environment(runs / "after", {"cpu": {"model": "Another CPU", "cores": 2}})
    done = qwenq("compare", "before", "after", cwd=runs)
    assert done.returncode == 3
    assert "another machine: processor Another CPU instead of Imaginary CPU" in done.stdout
    assert qwenq("compare", "before", "after", "--fail-on", "accuracy:significant", cwd=runs).returncode == 0
    assert qwenq("compare", "before", "after", "--fail-on", "memory:>1.05", cwd=runs).returncode == 3


def changed(run: Path, *, point: dict[str, Any] | None = None, **changes: Any) -> None:
    """The rows of a run with other facts: of the model where it has them, else of the row."""
    made = []
    for row in read_rows(run):
        known = {key: value for key, value in changes.items() if hasattr(row.model, key)}
        others = {key: value for key, value in changes.items() if key not in known}
        at = row.point | {key: value for key, value in (point or {}).items() if key in row.point}
        made.append(replace(row, model=replace(row.model, **known), point=at, **others))
    (run / "results.jsonl").unlink()
    for row in made:
        append_row(run, row)


@pytest.mark.parametrize(("precision", "changes", "says"), [
    ("int4", {"family": "n"}, "another model: n instead of m"),
    ("bf16", {"fingerprint": "sha256:tuned"}, "another model: other weights under the same name"),
    ("int4", {"point": {"protocol": "base"}}, "another protocol: base instead of card"),
    ("int4", {"point": {"version": 2}}, "another version: 2 instead of 1"),
    ("int4", {"settings": {"dtype": "bfloat16"}}, "another dtype: bfloat16 instead of float32"),
    ("int4", {"settings": {}}, "another dtype: unknown instead of float32"),
])  # fmt: skip
def test_what_is_another_measurement_is_no_pass(
    runs: Path, precision: str, changes: dict[str, Any], says: str
) -> None:
    """The same figures to the last digit, and still exit code 3."""
    write_run(runs / "after")
    for run in (runs / "before", runs / "after"):
        changed(run, precision=precision, settings={"dtype": "float32"})
    condition = ("--fail-on", "accuracy:significant")
    assert qwenq("compare", "before", "after", *condition, cwd=runs).returncode == 0
    changed(runs / "after", **changes)
    done = qwenq("compare", "before", "after", *condition, cwd=runs)
    assert done.returncode == 3, done.stdout + done.stderr
    assert says in done.stdout
    assert "no pass" in done.stdout


def test_files_and_annotations_for_ci(runs: Path) -> None:
    write_run(runs / "after", correct=60)
    options = ("--markdown", "a/comment.md", "--junit", "a/junit.xml")
    done = qwenq("compare", "before", "after", *options, cwd=runs, GITHUB_ACTIONS="true")
    assert done.returncode == 1
    assert "::error title=Int4 accuracy" in done.stdout
    assert (runs / "a/comment.md").read_text().startswith("### Regression: 1 of 4 rows")
    assert '<failure message="' in (runs / "a/junit.xml").read_text()
    assert "::error" not in qwenq("compare", "before", "after", cwd=runs).stdout


def test_a_wrong_condition_is_misuse(runs: Path) -> None:
    done = qwenq("compare", "before", "before", "--fail-on", "sped:<0.95", cwd=runs)
    assert done.returncode == 2
    assert "did you mean 'speed'?" in done.stderr


@pytest.mark.parametrize("option", ["--markdown", "--junit"])
def test_a_folder_to_write_a_file_to_is_misuse(runs: Path, option: str) -> None:
    (runs / "there").mkdir()
    done = qwenq("compare", "before", "after", option, "there", cwd=runs)
    assert done.returncode == 2
    assert f"{option} is a folder" in done.stderr


def test_neither_torch_nor_plots_are_loaded_to_compare(runs: Path) -> None:
    script = (
        "import sys; sys.argv = ['qwenq', 'compare', 'before', 'before']\n"
        "from qwenq.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'matplotlib', 'pandas', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=runs, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
