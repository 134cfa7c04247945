"""The rules of the house (docs/design.md): who may import whom, how long things get, what is never done."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwenq"
FILES = sorted(PACKAGE.rglob("*.py"))

LEAVES = {
    "errors",
    "events",
    "http",
    "storage",
    "recipe",
    "results",
    "environment",
    "published",
    "distributed",
    "statistics",
    "comparison",
    "stopping",
}
ROOMS = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
COMPOSER = ROOMS - {"cli", "__main__"}
COMPOSERS = {"api", "checking", "conversion", "quantization", "workflow"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "events": set(),
    "http": {"errors", "events", "stopping"},
    "storage": {"errors"},
    "progress": {"events", "storage"},
    "recipe": {"errors"},
    "results": {"errors", "storage"},
    "environment": set(),
    "published": set(),
    "distributed": {"errors"},
    "stopping": set(),
    "statistics": set(),
    "comparison": {"results", "statistics"},
    "compute": {"errors"},
    "models": LEAVES | {"compute"},
    "calibration": LEAVES | {"models"},
    "gptq": LEAVES | {"models", "calibration", "compute"},
    "runtime": LEAVES | {"models", "compute"},
    "evals": LEAVES | {"models", "runtime", "compute"},
    "profiling": LEAVES | {"models", "runtime"},
    "reporting": LEAVES,
    "planner": LEAVES | {"models"},
    "publishing": LEAVES | {"models", "reporting"},
    **dict.fromkeys(COMPOSERS, COMPOSER),
    "cli": ROOMS,
    "__main__": {"cli"},
}
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 60
P95_FUNCTION_LINES = 40
HELP_SECONDS = 0.3
HEAVY = {"torch", "transformers", "pydantic", "numpy", "scipy", "rich", "safetensors", "tokenizers"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Absolute names of modules and of what is taken from them, lazy and type-only imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[Function]:
    yield from (node for node in ast.walk(parsed(path)) if isinstance(node, Function))


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_every_room_has_its_rule() -> None:
    assert set(MAY_IMPORT) == ROOMS


def test_imports_go_one_way() -> None:
    crossed = []
    may_import = MAY_IMPORT | {"__init__": COMPOSER}
    for path in FILES:
        room = room_of(path)
        known = {name.split(".")[1] for name in imported(parsed(path)) if name.startswith("qwenq.")}
        crossed += [
            f"{short(path)} → {other}" for other in (known & ROOMS) - {room} - may_import.get(room, set())
        ]
    assert crossed == []


def test_no_module_imports_itself_through_others() -> None:
    """No circles, those through lazy imports included."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    graph = {
        name: {n for full in imported(parsed(path)) for n in (full, full.rpartition(".")[0]) if n != name}
        & set(names.values())
        for path, name in names.items()
    }
    graph = {name: {n for n in found if not name.startswith(f"{n}.")} for name, found in graph.items()}
    while leaves := {name for name, found in graph.items() if not found & set(graph)}:
        graph = {name: found for name, found in graph.items() if name not in leaves}
    assert graph == {}, "modules of a circle, or behind one"


def test_a_file_can_be_read_in_one_sitting() -> None:
    ours = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {short(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ours}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_a_function_fits_on_one_screen() -> None:
    lengths = sorted(
        (lines(path, node), f"{short(path)}: {node.name}") for path in FILES for node in functions(path)
    )
    print(f"\n{len(lengths)} functions: median {at(lengths, 0.5)} lines, p95 {at(lengths, 0.95)}")
    assert [entry for entry in lengths if entry[0] > MAX_FUNCTION_LINES] == []
    assert at(lengths, 0.95) <= P95_FUNCTION_LINES


def lines(path: Path, node: Function) -> int:
    """Of the whole function; of a command only the body, as its signature is the list of its options."""
    is_command = room_of(path) == "cli" and any("command" in ast.unparse(d) for d in node.decorator_list)
    body = node.body[1:] if ast.get_docstring(node) and is_command and len(node.body) > 1 else node.body
    assert node.end_lineno is not None
    return node.end_lineno - (body[0].lineno if is_command else node.lineno) + 1


def at(lengths: list[tuple[int, str]], share: float) -> int:
    return lengths[int(share * (len(lengths) - 1))][0]


def test_every_function_says_its_types() -> None:
    untyped = []
    for path in FILES:
        for node in functions(path):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
            bare = [a.arg for a in named if a.annotation is None and a.arg not in {"self", "cls"}]
            if bare or node.returns is None:
                untyped.append(f"{short(path)}:{node.lineno}: {node.name} {bare}")
    assert untyped == []


def test_no_pickle_is_imported() -> None:
    libraries = {"pickle", "cloudpickle", "dill", "joblib"}
    found = {
        (short(path), name)
        for path in FILES
        for name in imported(parsed(path))
        if name.split(".")[0] in libraries
    }
    assert found == {("qwenq/models/pickles.py", "pickle.UnpicklingError")}  # how torch refuses one


def test_no_remote_code_no_blind_load_no_print() -> None:
    wrong = []
    for path in FILES:
        for call in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if (
                name == "print"
                or given.get("trust_remote_code", "False") != "False"
                or (name == "torch.load" and given.get("weights_only") != "True")
            ):
                wrong.append(f"{short(path)}:{call.lineno}: {ast.unparse(call)}")
    assert wrong == []


def test_every_exception_to_a_rule_names_the_rule() -> None:
    bare = re.compile(r"#\s*type:\s*ignore(?!\[[a-z-]+)|#\s*noqa(?!:\s*[A-Z]+\d+)|#\s*ruff:\s*noqa")
    for path in [p for p in tracked() if p.suffix == ".py" and p != Path(__file__)]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not bare.search(line), f"{short(path)}:{number}"


def test_files_name_no_machine() -> None:
    """No home folder, no working folder, no package registry: the project runs anywhere."""
    folders = "|".join(("home", "root", "Users", "work", "opt"))  # the pattern must not find itself
    machine = re.compile(
        rf"""(?<![\w.$}}~-])/(?:{folders})/\w|(?:files\.pythonhosted|pypi|pypi\.python)\.org|download\.pytorch\."""
    )
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = [line for line in text.splitlines() if machine.search(line)]
        assert found == [] or path == Path(__file__), f"{short(path)}: {found}"


def test_help_is_instant() -> None:
    """CPU seconds of the child, best of five: a busy machine stretches the clock, not the work."""
    command = [sys.executable, "-m", "qwenq", "--help"]
    seconds = []
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < HELP_SECONDS, f"{min(seconds):.2f} s"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['qwenq', '--help']\n"
        "from qwenq.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(','.join({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: qwenq" in done.stdout
    assert HEAVY & set(done.stderr.strip().splitlines()[-1].split(",")) == set()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    """venv writes pyvenv.cfg first and pip last: Ctrl-C, or a Python without ensurepip, leaves no pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "hatch_build.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "qwenq" / "compute", tmp_path / "qwenq" / "compute")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").touch()

    def planned() -> str:
        command = ["make", "-n", ".venv/.demo", "PYTHON=any-python"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "any-python -m venv .venv" in planned()
    (tmp_path / ".venv" / "bin" / "pip").touch()
    assert "any-python -m venv .venv" not in planned()
