"""The workflows: they are YAML, and their command lines are commands that exist with those options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from test_docs import ROOT, blocks, parse

from qwenq.cli.app import app, register
from qwenq.recipe import read_recipe
from qwenq.reporting.gate import parse as conditions

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
REGRESSION = ROOT / ".github" / "workflows" / "regression.yml"


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """Of all jobs, in order."""
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        yield from job["steps"]


def command_lines(script: str) -> Iterator[list[str]]:
    """Words behind ``qwenq``, of every call of it in a shell script; a variable is any one word."""
    whole = re.sub(r"\\\n\s*", " ", script)
    for line in whole.splitlines():
        found = re.search(r"(?:\.venv/bin/qwenq|-m qwenq)\s+(.*)", line)
        if found:
            call = re.split(r"\s*(?:\|\||\)$)", found[1])[0]
            yield shlex.split(re.sub(r"\$\{\{.*?\}\}", "x", call))


CALLS = [
    pytest.param(words, id=f"{path.stem}: {' '.join(words[:3])} {number}")
    for path in WORKFLOWS
    for number, words in enumerate(w for step in steps(path) for w in command_lines(step.get("run", "")))
]


@pytest.fixture(scope="module")
def commands() -> Any:
    register()
    return typer.main.get_command(app)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_one(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["name"] == path.stem
    assert content[True]  # YAML 1.1 reads `on` as true
    for job in content["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = "\n".join(step.get("run", "") for step in steps(path))
    for targets in re.findall(r"make ((?:[\w-]+ ?)+)", scripts):
        for target in targets.split():
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_gate_installs_the_files_whose_hashes_are_known() -> None:
    made = [line for step in steps(REGRESSION) for line in re.findall(r"make [\w -]+", step.get("run", ""))]
    assert made == ["make install-locked install"]


@pytest.mark.parametrize("words", CALLS)
def test_its_commands_take_these_options(words: list[str], commands: Any) -> None:
    parse(commands, words)
    for option, value in pairwise(words):
        assert option != "--fail-on" or conditions(value)
    for word in words:
        assert not word.startswith(("recipes/", "reports/")) or (ROOT / word).exists(), word


def used(text: str) -> Iterator[dict[str, Any]]:
    """Inputs of each use of the action in a workflow."""
    for job in yaml.safe_load(text)["jobs"].values():
        for step in job["steps"]:
            if step.get("uses") == "./" or "/qwenq@" in step.get("uses", ""):
                yield step["with"]


@pytest.mark.parametrize("text", [
    REGRESSION.read_text(encoding="utf-8"), *(text for name, text in blocks("yaml") if name == "ci.md"),
])  # fmt: skip
def test_the_action_is_given_inputs_that_it_has(text: str) -> None:
    (given,) = used(text)
    assert given.keys() <= ACTION["inputs"].keys()
    assert {name for name, one in ACTION["inputs"].items() if one.get("required")} <= given.keys()
    assert conditions(given.get("fail-on", "kl:>1"))
    assert yaml.safe_load(text)["permissions"]["pull-requests"] == "write"


def test_every_input_is_documented_and_reaches_the_scripts_as_text_only() -> None:
    """An expression within a script would run what a pull request writes into it."""
    documented = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    for name, one in ACTION["inputs"].items():
        assert f"| `{name}` |" in documented
        assert f"inputs.{name}" in str(ACTION["runs"])
        assert one["description"]
    assert not any("${{" in step.get("run", "") for step in ACTION["runs"]["steps"])


def test_all_that_the_gate_promises_is_in_it() -> None:
    """Quality against the baseline; then speed, before and after, every turn compared on its side."""
    calls = [words for step in steps(REGRESSION) for words in command_lines(step.get("run", ""))]
    assert [words[0] for words in calls] == ["profile", "compare"]
    (speed,) = (dict(pairwise(words)) for words in calls if words[0] == "compare")
    (quality,) = (step["with"] for step in steps(REGRESSION) if step.get("uses") == "./")
    gate = read_recipe(ROOT / quality["recipe"]).gate
    assert gate.baseline == "reports/baselines/ci"
    assert {one.metric for one in conditions(gate.fail_on)} == {"accuracy", "kl", "size"}
    assert f"{quality['out']}/models/" in REGRESSION.read_text(encoding="utf-8")
    assert {one.metric for one in conditions(speed["--fail-on"])} >= {"speed.decode", "speed.prefill"}
    turns = next(words for words in calls if "--more-new" in words)
    sides = [[word for word in turns if f"speed-{side}-" in word] for side in ("before", "after")]
    (script,) = (step["run"] for step in steps(REGRESSION) if "for turn in" in step.get("run", ""))
    (listed,) = re.findall(r"for turn in ([\d ]+);", script)
    before, _, profiled = script.partition("for turn in")
    assert re.search(r"\(cd build/gate/before && .* -m qwenq\.compute\.build\)", before), (
        "else torch computes it"
    )
    assert 'cd "$source"' in profiled
    for side in sides:
        assert [word[-1] for word in side] == listed.split()
    assert len(listed.split()) == 5
