"""The benchmark scripts still fit the package: what they import is there, what they call takes these options.

Nothing is measured, and neither torch nor a peer is loaded: names are looked up in the sources.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from test_docs import ROOT, parse

from qwenq.cli.app import app
from qwenq.cli.commands import register

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))

by_name = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def source_of(module: str) -> Path | None:
    """Of a module of the package, or of one that lies beside the scripts."""
    place = Path(*module.split("."))
    folder = ROOT if place.parts[0] == "qwenq" else BENCHMARKS
    found = (folder / place.with_suffix(".py"), folder / place / "__init__.py")
    return next((file for file in found if file.is_file()), None)


def bound(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """What statements bind when they run, those in branches included; not what is only there for types."""
    for node in statements:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Import() | ast.ImportFrom():
                yield from ((alias.asname or alias.name.split(".")[0], node) for alias in node.names)
            case ast.Assign(targets=targets):
                names = (
                    name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
                )
                yield from ((name.id, node) for name in names)
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, node
            case ast.If(test=test) if "TYPE_CHECKING" in ast.unparse(test):
                yield from bound(node.orelse)
            case ast.If() | ast.Try() | ast.With():
                handlers = [s for handler in getattr(node, "handlers", []) for s in handler.body]
                yield from bound([*node.body, *getattr(node, "orelse", []), *handlers])


@cache
def contents(file: Path) -> dict[str, ast.stmt]:
    return dict(bound(ast.parse(file.read_text(encoding="utf-8")).body))


def has(module: str, name: str) -> bool:
    """Whether a module has a name, or a package a module of that name."""
    file = source_of(module)
    if file is None:
        return False
    return name in contents(file) or source_of(f"{module}.{name}") is not None


def own(module: str) -> bool:
    return module.partition(".")[0] == "qwenq" or source_of(module) is not None


def missing(tree: ast.AST) -> Iterator[str]:
    """Imports of the package, or of other scripts, that lead nowhere; functions' own included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if own(a.name) and source_of(a.name) is None)
        elif isinstance(node, ast.ImportFrom) and node.module and own(node.module):
            for alias in node.names:
                if alias.name == "*" or not has(node.module, alias.name):
                    yield f"{node.module}.{alias.name}"


def programs(tree: ast.AST) -> Iterator[ast.AST]:
    """A script, and what it hands to ``python -c``."""
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            with suppress(SyntaxError):  # a sentence
                yield ast.parse(node.value)


def script(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@by_name
def test_what_scripts_import_is_there(path: Path) -> None:
    assert [name for program in programs(script(path)) for name in missing(program)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import qwenq.runtime.gone",
        "from qwenq.runtime.gone import load",
        "from qwenq.runtime.engine import gone",
        "from _common import gone",
        "from qwenq.runtime.engine import *",
        "def f():\n    from qwenq.gptq import gone",
        "code = 'import sys; from qwenq.gptq import gone'",
    ],
)
def test_an_import_that_leads_nowhere_is_found(line: str) -> None:
    assert [name for program in programs(ast.parse(line)) for name in missing(program)]


def modules_of(tree: ast.AST) -> dict[str, str]:
    """Modules of the package by the name that a script has for them: ``from qwenq.gptq import rows``."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qwenq")
        for alias in node.names
        if source_of(f"{node.module}.{alias.name}")
    }


def reaches(modules: dict[str, str], dotted: str) -> bool:
    """Whether ``module.name`` or ``module.Class.method`` is there."""
    first, name, *rest = dotted.split(".")
    file = source_of(modules[first])
    assert file
    node = contents(file).get(name)
    if not rest or not isinstance(node, ast.ClassDef):
        return node is not None
    return rest[0] in dict(bound(node.body))


@by_name
def test_what_scripts_take_from_modules_is_there(path: Path) -> None:
    for scope in script(path).body:  # a function's modules are its own: another one may call a list so
        modules = modules_of(scope)
        used = {
            ast.unparse(node)
            for node in ast.walk(scope)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        }
        assert {name for name in used if not reaches(modules, name)} == set()


def clocked(tree: ast.AST) -> Iterator[str]:
    """``owner.name`` of every function that `quantize_profile` replaces by one that takes its time.

    The name is a string, or the last of each tuple that a loop around the call goes through.
    """
    for outer in ast.walk(tree):
        calls = [outer] if isinstance(outer, ast.Expr) else outer.body if isinstance(outer, ast.For) else []
        for call in (c.value for c in calls if isinstance(c, ast.Expr) and isinstance(c.value, ast.Call)):
            if ast.unparse(call.func) != "clocked":
                continue
            owner, name = call.args[2:4]
            if isinstance(name, ast.Constant):
                yield f"{ast.unparse(owner)}.{name.value}"
            elif isinstance(outer, ast.For):
                values = ast.literal_eval(outer.iter)
                yield from (f"{ast.unparse(owner)}.{value[-1]}" for value in values)


def test_what_the_profile_of_quantising_clocks_is_there() -> None:
    tree = script(BENCHMARKS / "quantize_profile.py")
    modules, names = modules_of(tree), set(clocked(tree))
    assert len(names) > 6
    assert {name for name in names if not reaches(modules, name)} == set()


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of the standard library alone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


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
    made = recorded(load, "quantize_variants", lambda m: m.prepare(folder, Path("model"), variants))
    yield "calibrate", made[:1]
    made = recorded(load, "quantize_variants", lambda m: m.measure({}, Path("model"), tokens, variants))
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
    assert tried == 19
