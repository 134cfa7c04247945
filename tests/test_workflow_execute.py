"""Doing the steps of a recipe: in order, once, again when something changed, and what a signal does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from listening import notices_to

from qwenq.recipe import Recipe, read_recipe
from qwenq.workflow import Chain, Step, is_done, run_steps, steps_of


def quantising(folder: Path) -> Chain:
    """The steps of a recipe that says nothing: the bundled model to Int4."""
    path = folder / "recipe.toml"
    path.touch()
    return steps_of(read_recipe(path), path, folder / "work")


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


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    made = quantising(tmp_path)
    assert not is_done(made, made.steps[0])
    made.steps[0].makes.mkdir(parents=True)
    assert is_done(made, made.steps[0])


def test_a_name_without_a_hash_leads_to_the_newest_model(steps: Path) -> None:
    alias = steps / "models" / "m-Int4"
    for name in ("old", "new"):
        made = steps / "models" / name / "m-Int4"
        made.parent.mkdir(parents=True)
        step = replace(marker(str(made.relative_to(steps)), steps), makes=made, whole=True, alias=alias)
        assert run_steps(made_of(steps, step)) == 0
        assert alias.resolve() == made
    again = replace(step, makes=steps / "models" / "old" / "m-Int4")
    assert run_steps(made_of(steps, again)) == 0  # done already, and asked for again
    assert alias.resolve() == again.makes
    assert sorted(path.name for path in alias.parent.iterdir()) == ["m-Int4", "new", "old"]


def test_somebodys_folder_under_that_name_stays(steps: Path) -> None:
    alias = steps / "models" / "m-Int4"
    (alias / "precious").mkdir(parents=True)
    step = replace(marker("made", steps), whole=True, alias=alias)
    assert run_steps(made_of(steps, step)) == 0
    assert (alias / "precious").is_dir()


def test_a_work_folder_that_a_kill_left_beside_a_whole_model_is_removed(tmp_path: Path) -> None:
    made = quantising(tmp_path)
    leftover = made.steps[0].makes.with_name(f"{made.steps[0].makes.name}.partial")
    made.steps[0].makes.mkdir(parents=True)
    (leftover / "layers").mkdir(parents=True)
    (leftover / "layers" / "0.safetensors").write_bytes(b"of no use any more")
    assert run_steps(made) == 0
    assert not leftover.exists()


def test_a_step_that_is_done_is_not_done_again(steps: Path) -> None:
    both = made_of(steps, marker("one", steps), marker("two", steps))
    assert run_steps(both) == 0
    assert run_steps(both) == 0
    assert log(steps) == ["one", "two"]


def test_what_failed_ends_the_chain_and_is_tried_again(steps: Path) -> None:
    said: list[str] = []
    broken = made_of(steps, marker("one", steps), marker("two", steps, code=5), marker("three", steps))
    assert run_steps(broken, notices_to(said)) == 5
    assert "exit code 5" in said[-1]
    mended = made_of(steps, *broken.steps[:1], marker("two", steps), broken.steps[2])
    assert run_steps(mended, notices_to(said)) == 0
    assert log(steps) == ["one", "two", "two", "three"]


def test_what_a_step_reads_or_has_made_decides(steps: Path) -> None:
    source = steps / "source"
    source.write_text("a")
    one = made_of(steps, marker("one", steps, reads=(source,)))
    run_steps(one)
    assert is_done(one, one.steps[0])
    source.write_text("longer")
    assert not is_done(one, one.steps[0])
    run_steps(one)
    (steps / "one").unlink()
    assert not is_done(one, one.steps[0])


def test_rows_that_are_gone_are_made_again(steps: Path) -> None:
    """All steps leave theirs in one file: that it is there again, from the first, is not all of theirs."""
    script = marker("one", steps)
    (steps / "step.py").write_text(
        "import sys, pathlib\n"
        "folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "with (folder / 'log').open('a') as log: log.write(name + '\\n')\n"
        "with (folder / 'work' / 'results.jsonl').open('a') as rows: rows.write(name + '\\n')\n"
    )
    rows = steps / "work" / "results.jsonl"
    names = ("one", "two", "three")
    chain = made_of(
        steps, *(replace(script, name=n, arguments=(str(steps), n, "0"), makes=rows) for n in names)
    )
    for _ in range(2):
        assert run_steps(chain) == 0
    assert log(steps) == [*names]
    rows.unlink()
    for _ in range(2):
        assert run_steps(chain) == 0
    assert log(steps) == [*names, *names]
    assert rows.read_text().split() == [*names]


def test_a_verdict_is_always_asked_for(steps: Path) -> None:
    gate = made_of(steps, replace(marker("gate", steps), always=True))
    run_steps(gate)
    run_steps(gate)
    assert log(steps) == ["gate", "gate"]


def test_a_verdict_on_what_was_there_already_says_so(steps: Path) -> None:
    """After a change of the code the same command would judge what the code before it has made."""
    whole = made_of(steps, marker("one", steps), replace(marker("gate", steps), always=True))
    for expected in (0, 1):
        said: list[str] = []
        run_steps(whole, notices_to(said))
        assert sum("earlier results" in line for line in said) == expected
    assert log(steps) == ["one", "gate", "gate"]


def test_a_model_that_was_whole_when_a_kill_came_gets_its_entry_in_the_journal(steps: Path) -> None:
    both = made_of(steps, replace(marker("model", steps), whole=True), marker("rows", steps))
    (steps / "model").touch()  # and no journal
    for _ in range(2):
        assert run_steps(both) == 0
        lines = (steps / "work" / "journal.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == ["model", "rows"]
    assert log(steps) == ["rows"]


def test_a_torn_line_of_the_journal_is_no_end(steps: Path) -> None:
    one = made_of(steps, marker("one", steps))
    run_steps(one)
    journal = steps / "work" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert not is_done(one, one.steps[0])
    run_steps(one)
    assert is_done(one, one.steps[0])
    assert log(steps) == ["one", "one"]


def test_a_name_with_a_line_separator_of_unicode_is_one_line_of_the_journal(steps: Path) -> None:
    """A model's folder may have it, and a step whose end is not found would be done again and again."""
    one = made_of(steps, marker("a\u2028b\x85c", steps))
    run_steps(one)
    assert is_done(one, one.steps[0])


def test_a_folder_of_any_bytes_is_no_traceback_after_the_step(steps: Path) -> None:
    one = marker("one", steps)
    named = made_of(steps, replace(one, arguments=(*one.arguments, "\udcff")))
    assert run_steps(named) == 0
    assert is_done(named, named.steps[0])


def test_ctrl_c_ends_the_step_and_the_chain(steps: Path) -> None:
    (steps / "step.py").write_text(
        "import pathlib, sys, time\n"
        "try:\n"
        "    pathlib.Path(sys.argv[1]).touch()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt: pathlib.Path(sys.argv[1] + '.saved').touch(); sys.exit(130)\n"
    )
    script = (
        "import sys; from pathlib import Path\n"
        "from qwenq.recipe import Recipe\n"
        "from qwenq.workflow import Chain, Step\n"
        "from qwenq.workflow import run_steps\n"
        f"step = Step('long', ({str(steps / 'begun')!r},), Path({str(steps / 'begun')!r}), module='step')\n"
        f"run_steps(Chain(Recipe(), (step,), Path({str(steps / 'work')!r}), None), print)\n"
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
        "from qwenq.workflow import Chain, Step\n"
        "from qwenq.workflow import run_steps\n"
        f"folder = Path({str(steps)!r})\n"
        "made = tuple(Step(n, (str(folder / n),), folder / n, module='step') for n in ('one', 'two'))\n"
        "run_steps(Chain(Recipe(), made, folder / 'work', None), print)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert (steps / "one").exists()
    assert not (steps / "two").exists()
    (entry,) = map(json.loads, (steps / "work" / "journal.jsonl").read_text().splitlines())
    assert entry["step"] == "one"
