"""The benchmark scripts still fit the package, where mypy, which reads them too, cannot see: inside strings.

Names that they replace, programs that they hand to ``python -c``, options of the commands that they start.
Nothing is measured.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from test_docs import ROOT, parse

from qwenq.cli.app import app, register
from qwenq.results import read_rows

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))


def script(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def programs() -> Iterator[tuple[str, ast.ImportFrom]]:
    """What scripts hand to ``python -c`` imports from the package; mypy sees strings there."""
    for path in SCRIPTS:
        for node in ast.walk(script(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
                with suppress(SyntaxError):  # a sentence
                    inner = ast.walk(ast.parse(node.value))
                    yield from ((path.stem, one) for one in inner if isinstance(one, ast.ImportFrom))


def test_what_programs_in_strings_import_is_there() -> None:
    found = [(stem, node) for stem, node in programs() if (node.module or "").startswith("qwenq")]
    assert {stem for stem, _ in found} == {
        "_common", "_lm_eval_tasks", "before_after", "decode_vs_peers", "gate_noise", "quantize_memory",
    }  # fmt: skip
    for _, node in found:
        module = importlib.import_module(str(node.module))
        assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_what_the_profile_of_quantising_clocks_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces functions by their names, which are strings."""
    from qwenq.gptq import experts, linears, pipeline, solver

    profile = load_script(monkeypatch, "quantize_profile")
    asked: list[tuple[object, str]] = []
    monkeypatch.setattr(
        profile, "clocked", lambda _, step, owner, name, *__, **___: asked.append((owner, name))
    )
    profile.clock()
    assert {owner for owner, _ in asked} == {experts, linears, solver, pipeline, pipeline._Layer}
    assert [name for owner, name in asked if not callable(getattr(owner, name, None))] == []


def load_script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of the standard library alone."""
    return partial(load_script, monkeypatch)


@pytest.fixture(scope="module")
def commands() -> Any:
    register()
    return typer.main.get_command(app)


def options_of(load: Callable[[str], ModuleType], name: str, line: str) -> Any:
    """What a script makes of its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *line.split()])
        return load(name).parse_options()


USAGES = [
    pytest.param(path.stem, line, id=line)
    for path in SCRIPTS
    for line in re.findall(
        r"^ +python (benchmarks/.*)$", ast.get_docstring(script(path), clean=False) or "", re.M
    )
    if any(isinstance(node, ast.FunctionDef) and node.name == "parse_options" for node in script(path).body)
]


@pytest.mark.parametrize(("name", "line"), USAGES)
def test_a_script_takes_the_options_that_its_head_shows(
    load: Callable[[str], ModuleType], name: str, line: str
) -> None:
    file, *words = shlex.split(line, comments=True)
    assert file == f"benchmarks/{name}.py"
    options_of(load, name, " ".join(words))


def recorded(
    load: Callable[[str], ModuleType], name: str, call: Callable[[ModuleType], object]
) -> list[list[str]]:
    """Command lines that a part of a script starts; then it may fail, as nothing of theirs is there."""
    module, found = load(name), []

    def run_child(command: Any, *_: object, **__: object) -> Any:
        found.append([str(part) for part in command])
        return load("_common").Child(1.0, 1.0, 1.0, "{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_child", run_child)
        patch.setattr(module, "resolve_bundled", lambda: Path("model"), raising=False)
        patch.setattr("subprocess.run", run_child)
        patch.setattr(sys, "exit", lambda *_: None)
        with suppress(Exception):
            call(module)
    return found


def of_qwenq(command: list[str]) -> list[str]:
    """Words behind ``-m qwenq``."""
    place = max(n for n, word in enumerate(command) if word == "qwenq" and command[n - 1] == "-m")
    return command[place + 1 :]


def starts(load: Callable[[str], ModuleType], folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """What each script starts: its name, and command lines of qwenq."""
    (folder / "c4").mkdir()
    (folder / "c4" / "text.jsonl").touch()
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "text.txt").touch()
    options = options_of(load, "quantize_vs_peers", f"--data {folder}")
    bench = load("quantize_vs_peers").Bench(options, Path("model"), folder)
    yield "calibrate", recorded(load, "quantize_vs_peers", lambda m: m.prepare(bench))[:1]
    yield "quantize", [list(map(str, load("quantize_vs_peers").qwenq_command(bench, Path("out"))))]
    options = options_of(load, "quantize_memory", f"--work {folder}")
    yield "quantize", recorded(load, "quantize_memory", lambda m: m.measure(options, Path("model")))
    for limit in ("", " --mmlu-limit 2"):
        race = load("eval_vs_lm_eval")
        options = options_of(load, "eval_vs_lm_eval", f"--data {folder} --work {folder}{limit}")
        for turn in (turn for turn in race.TURNS if turn.tool == "qwenq"):
            call = lambda m, o=options, t=turn: m.run_qwenq(o, t, Path("model"), folder)  # noqa: E731
            yield "eval", recorded(load, "eval_vs_lm_eval", call)
    variants, tokens = folder / "variants", (folder / "c.safetensors", folder / "e.safetensors")
    variants.mkdir()
    made = recorded(
        load, "quantize_variants", lambda m: m.prepare(folder, Path("model"), variants, m.Sizes())
    )
    yield "calibrate", made[:1]
    made = recorded(
        load, "quantize_variants", lambda m: m.measure(m.recipe({}, 64), Path("model"), tokens, variants)
    )
    yield "quantize", made
    options = options_of(load, "quantize_moe", f"--data {folder} --work {folder} --only peers")
    made = recorded(load, "quantize_moe", lambda m: m.race(options, Path("model"), "qwenq"))
    yield "calibrate", made[:1]
    yield "quantize", made[1:2]
    made = recorded(
        load,
        "quantize_budget",
        lambda m: m.quantised(m.Bench(Path("model"), variants, 64, Path("python")), {}, folder / "out"),
    )
    yield "quantize", made
    yield "quantize", recorded(load, "scale_out", lambda m: m.quantize(folder))
    yield "eval", recorded(load, "scale_out", lambda m: m.evaluate(folder))
    yield "quantize", recorded(load, "gate_noise", lambda m: m.quantised(folder))
    steps = recorded(load, "gate_noise", lambda m: m.measure(Path("model"), folder / "run"))
    yield from zip(("eval", "profile"), ([step] for step in steps[1:]), strict=True)
    runs = [folder / "a", folder / "b"]
    yield (
        "compare",
        recorded(load, "gate_noise", lambda m: m.judged(runs, runs, "kl:>0.05", folder / "junit")),
    )


def test_commands_of_qwenq_that_scripts_start_take_these_options(
    load: Callable[[str], ModuleType], commands: Any, tmp_path: Path
) -> None:
    tried = 0
    for expected, found in starts(load, tmp_path):
        assert [of_qwenq(command)[0] for command in found] == [expected]
        for command in found:
            parse(commands, of_qwenq(command))
            tried += 1
    assert tried == 22


def test_servers_are_measured_and_a_refusal_is_recorded(
    load: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Two programs in the place of servers: one streams, one ends with an error."""
    served = load("served")
    program = tmp_path / "server.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from profiling.streaming_server import Server\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "Server(port).serve_forever()\n"
    )
    name, run = "model-GPTQ-Int4", tmp_path / "run"
    options = argparse.Namespace(threads=1, seconds=1.0)
    for precision, command in {
        "bf16": (sys.executable, str(program)),
        "int8": (sys.executable, "-c", "raise ValueError('no Int8 here')"),
    }.items():
        one = served.Served(f"big/{name}", precision, command)
        served.measure(one, served.Load((1, 2), 8, 6), options, run, tmp_path / "log")
    rows = read_rows(run)
    assert {row.status for row in rows if row.model.precision == "bf16"} == {"ok"}
    refused = [row for row in rows if row.model.precision == "int8"]
    assert {row.reason for row in refused} == {"the server refuses it: no Int8 here"}
    assert {row.metric for row in refused} == set(served.METRICS)
    page = served.write_report([run], tmp_path / "report", "t").parent / "README.md"
    assert re.search(r"\| Int8 \| 1 \| n/a[¹²] \|", page.read_text(encoding="utf-8"))
