"""What the documents say is true: commands exist, links lead somewhere, figures come from reports."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from test_house import MAY_IMPORT

from qwenq.cli.app import COMMANDS, app, register
from qwenq.models import catalogue
from qwenq.recipe import QuantizeRecipe, markdown_table, read_recipe
from qwenq.workflow import steps_of

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
QUICK = ("qwenq plan", "qwenq --help", "qwenq --version")  # the rest takes minutes, a hub or a model
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block in that language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [
        (path.name, text) for path in DOCUMENTS for text in fence.findall(path.read_text(encoding="utf-8"))
    ]


COMMAND_LINES = [
    pytest.param(line, id=f"{name}: {line}")
    for name, text in blocks("sh")
    for line in text.splitlines()
    if line.strip()
]


@pytest.fixture(scope="module")
def commands() -> Any:
    register()
    return typer.main.get_command(app)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_exist(line: str, commands: Any) -> None:
    program, *arguments = shlex.split(line, comments=True)
    match program:
        case "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
        case "qwenq":
            parse(commands, arguments)
        case "torchrun":  # its own options, then -m qwenq and a command
            module = arguments.index("-m")
            assert arguments[module + 1] == "qwenq"
            parse(commands, arguments[module + 2 :])
        case "python":
            assert (ROOT / arguments[0]).is_file()
        case "cp":
            *files, folder = arguments
            assert (ROOT / folder).is_dir()
            assert all((ROOT / folder / Path(file).name).is_file() for file in files)
        case ".":
            assert arguments == [".venv/bin/activate"]
        case _:
            pytest.fail(f"nothing here checks {program}")


def parse(command: Any, arguments: list[str]) -> None:
    """Down to the command, which must take these options; recipes that are named must be there."""
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(command.name, list(arguments))
    for before, after in pairwise(arguments):
        assert before != "--recipe" or (ROOT / after).is_file(), after


FENCES = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NAMED_COMMANDS = sorted(
    {
        (path.name, " ".join(words.split()))
        for path in DOCUMENTS
        for words in re.findall(r"`(qwenq\s[^`]+)`", FENCES.sub("", path.read_text(encoding="utf-8")))
    }
)


@pytest.mark.parametrize(("name", "line"), NAMED_COMMANDS)
def test_commands_named_in_a_sentence_exist(name: str, line: str, commands: Any) -> None:
    """With these options; what has to be given beside them may be left out there."""
    try:
        parse(commands, shlex.split(line)[1:])
    except Exception as error:
        if type(error).__name__ != "MissingParameter":
            raise


@pytest.mark.parametrize("line", [p for p in COMMAND_LINES if p.values[0].startswith(QUICK)])
def test_quick_command_lines_run(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "qwenq", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_shown() -> None:
    shown = {
        shlex.split(p.values[0], comments=True)[1] for p in COMMAND_LINES if p.values[0].startswith("qwenq ")
    }
    assert shown == set(COMMANDS)


@pytest.mark.parametrize(("name", "text"), blocks("python"))
def test_python_blocks_are_python(name: str, text: str) -> None:
    ast.parse(text, name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:recipes|tests|benchmarks|docs)/[\w./-]+)`", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def readme_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_reports() -> None:
    script, shown = readme_script(), []
    for path in (script.README, script.BENCHMARKS):
        text = path.read_text(encoding="utf-8")
        assert script.filled(path, text) == text, "run python benchmarks/readme.py"
        shown += re.findall(r"<!-- (\w+) -->", text)
    assert sorted(shown) == sorted(script.BLOCKS)


def test_the_readme_is_read_in_one_go() -> None:
    assert len(README.splitlines()) <= 150


def test_lines_of_prose_are_narrow() -> None:
    """Tables, blocks of code and what is filled in from reports have lines as long as they are."""
    filled = re.compile(r"^<!-- (\w+) -->.*?^<!-- /\1 -->", re.DOTALL | re.MULTILINE)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [
        (page.name, line)
        for page in pages
        for line in filled.sub("", FENCES.sub("", page.read_text(encoding="utf-8"))).splitlines()
        if not line.lstrip().startswith(("|", "[!["))
    ]
    assert [(name, line) for name, line in lines if len(line) > 122] == []


NUMBERS = (
    "GSM8K", "Int4", "Int8", "SmolLM2-135M-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct",
    "Qwen2.5", "Qwen2", "Qwen3", "Qwen3.5", "Qwen3.6", "Qwen3.8", "Qwen (v1)", "Python 3.11", "Apache-2.0",
    "kill -9", "guessing (25 %)", "4, 8 or 16 bits", "x86-64", "AVX2", "AVX-512", "H200",
)  # fmt: skip
"""All numbers that the README has outside of tables, blocks and links: names and versions, none measured."""


def numbers_by_hand(text: str) -> list[str]:
    """Lines with a number that no table of a report, no command and none of ``NUMBERS`` accounts for."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|`(?:recipes|reports|docs|tests|benchmarks)/[^`]*`", "", text)
    for known in sorted(NUMBERS, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(known)}(?![\w]|\.\d)", "", text)
    return [line for line in text.splitlines() if re.search(r"\d", line)]


def test_no_figure_in_the_readme_is_typed_by_hand() -> None:
    assert numbers_by_hand(README) == []


def test_the_table_of_settings_is_the_one_that_the_recipe_declares() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"\n\n{markdown_table()}\n\n" in text, "paste what `qwenq recipe settings` prints"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_sound_and_say_what_they_are(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calibration.txt").touch()  # text of the user's own, which the largest ask for
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    assert steps_of(read_recipe(path), path).steps
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["qwen-1_8b-chat", "qwen-7b-chat"])
def test_released_recipes_are_qwens_settings(name: str) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml").quantize
    settings = asdict(recipe)
    assert {
        name: value for name, value in settings.items() if name not in ("dtype", "seed", "any_engine")
    } == {
        "bits": 4,
        "group_size": 128,
        "module_bits": "auto",  # a dense model has no module that this means
        "budget": None,
        "sym": True,
        "act_order": "none",
        "scale_search": "none",
        "damp": 0.01,
        "asymmetric_calibration": 0.0,
        "coordinate_descent": False,
    }


FAMILIES = (
    "qwen2.5-7b-instruct", "qwen2.5-0.5b-instruct", "qwen2.5-math-7b-instruct", "deepseek-r1-distill-qwen-7b",
    "qwen3-8b", "qwen3-0.6b", "qwen3-4b-instruct-2507", "qwen3-30b-a3b", "qwen3-next-80b-a3b", "qwen3.5-27b",
    "qwen3.5-35b-a3b", "demo",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_family_recipes_are_the_defaults(name: str) -> None:
    written = read_recipe(ROOT / "recipes" / f"{name}.toml").quantize
    assert replace(written, group_size="auto") == QuantizeRecipe()


@pytest.mark.parametrize(
    ("name", "kept"), [("qwen3.5-27b", {"attn": 16}), ("qwen3.5-35b-a3b", {"attn": 16, "shared_expert": 16})]
)
def test_published_recipes_keep_what_qwens_files_keep(name: str, kept: dict[str, int]) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}-published.toml")
    assert recipe.quantize.module_bits == kept
    assert recipe.model == read_recipe(ROOT / "recipes" / f"{name}.toml").model


def test_every_released_mixture_is_named_by_a_recipe() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in RECIPES)
    sizes = {size[1] for hub in catalogue.hub_ids() if (size := re.search(r"-([\d.]+[BT]-A\d+B)", hub))}
    assert {"30B-A3B", "122B-A10B", "2.4T-A95B"} < sizes
    assert {size for size in sizes if size not in text} == set()


def test_the_house_is_described_room_by_room() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(described) == set(MAY_IMPORT) - {"__main__"}
    assert len(described) == len(set(described))


def test_constraints_pin_every_direct_dependency() -> None:
    canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines if "==" in line and not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    names = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - {"qwenq"}
    assert names - pinned == set()
    assert "torch==2.13.0" in lines


def test_every_environment_variable_is_documented() -> None:
    """Those that anything here reads or sets; and none that nothing does."""
    places = [*(ROOT / "qwenq").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "hatch_build.py"]
    places += [*(ROOT / "benchmarks").glob("*.py"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    named = re.compile(r"\bQWENQ_[A-Z_0-9]+\b")
    used = {name for path in places for name in named.findall(path.read_text(encoding="utf-8"))}
    used -= {"QWENQ_SOURCES", "QWENQ_VARIANT", "QWENQ_INTEROP_INT"}  # of the C compiler; a part of two names
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert {name for row in rows for name in named.findall(row)} == used
