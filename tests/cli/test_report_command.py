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
    ({}, 0, "Passed: no condition failed"),
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
    assert "not a pass" in done.stdout


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


@pytest.mark.parametrize("arguments", [
    ("before", "./before"),
    ("before", "after", "--more-new", "after"),
    ("before", "after", "--more-baseline", "after"),
])  # fmt: skip
def test_a_run_is_not_compared_with_itself(runs: Path, arguments: tuple[str, ...]) -> None:
    """It would pass whatever it is."""
    write_run(runs / "after")
    done = qwenq("compare", *arguments, cwd=runs)
    assert (done.returncode, "this run is named twice" in done.stderr) == (2, True)


@pytest.mark.parametrize("condition", ["", " ", ","])
def test_a_condition_that_is_not_there_is_no_gate_that_passes(runs: Path, condition: str) -> None:
    """``--fail-on "$CONDITIONS"`` where nobody has set that."""
    write_run(runs / "after", correct=60)
    done = qwenq("compare", "before", "after", "--fail-on", condition, cwd=runs)
    assert (done.returncode, "no condition is named" in done.stderr) == (2, True)


def test_a_reader_who_has_seen_enough_changes_no_verdict(runs: Path) -> None:
    """``qwenq compare … | head -1``; files are written all the same."""
    write_run(runs / "after")
    command = [sys.executable, "-m", "qwenq", "compare", "before", "after", "--markdown", "comment.md"]
    with subprocess.Popen(command, cwd=runs, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    whole = qwenq("compare", "before", "after", cwd=runs)
    assert (process.returncode, said) == (whole.returncode, "")
    assert (runs / "comment.md").read_text().startswith("### ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_a_message(runs: Path) -> None:
    write_run(runs / "after")
    command = [sys.executable, "-m", "qwenq", "compare", "before", "after"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=runs, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "it cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verdict_is_shown_though_its_file_cannot_be_written(runs: Path) -> None:
    write_run(runs / "after", correct=60)
    done = qwenq("compare", "before", "after", "--markdown", "before/results.jsonl/x.md", cwd=runs)
    assert "Regression: 1 of" in done.stdout
    assert (done.returncode, "is a file where a folder has to be" in done.stderr) == (1, True)


@pytest.mark.parametrize("name", ["results.jsonl", "environment.json"])
def test_what_was_measured_is_not_replaced_by_a_verdict(runs: Path, name: str) -> None:
    write_run(runs / "after")
    held = (runs / "after" / name).read_bytes()
    done = qwenq("compare", "before", "after", "--junit", f"before/../after/{name}", cwd=runs)
    assert (done.returncode, "would replace what was measured" in done.stderr) == (2, True)
    assert (runs / "after" / name).read_bytes() == held


def test_of_one_row_is_spoken_in_the_singular(runs: Path) -> None:
    write_run(runs / "after")
    done = qwenq("compare", "before", "after", "--fail-on", "kl:>0.05, size:>1, speed:<0.9", cwd=runs)
    assert "1 row not covered by a condition, or not measured in the baseline: accuracy" in done.stdout
    done = qwenq("compare", "before", "after", "--fail-on", "kl:>0.05", cwd=runs)
    assert "1 row passed: 1 the same" in done.stdout
    assert "Passed: no condition failed in 1 row." in done.stdout


def test_runs_of_one_name_are_told_apart(runs: Path) -> None:
    """Of two lines with one label, one would have stood for both."""
    write_run(runs / "other" / "before", speed=40.0)
    done = qwenq("report", "before", "other/before", "--out", "out", cwd=runs)
    assert done.returncode == 0, done.stderr
    text = (runs / "out" / "README.md").read_text()
    assert "| Int4 | before | 50.00 (49.50–50.50) |" in text
    assert "| Int4 | before (2) | 40.00 (39.60–40.40) |" in text
    done = qwenq("report", "before", "before/", "--out", "out", cwd=runs)
    assert (done.returncode, "this run is named twice" in done.stderr) == (2, True)


def test_neither_torch_nor_plots_are_loaded_to_compare(runs: Path) -> None:
    write_run(runs / "after")
    script = (
        "import sys; sys.argv = ['qwenq', 'compare', 'before', 'after']\n"
        "from qwenq.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'matplotlib', 'pandas', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=runs, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
