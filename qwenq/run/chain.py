"""Turn a recipe into steps: commands of qwenq in order, and what decides whether each is necessary again."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qwenq.models.bundled import NAME as BUNDLED
from qwenq.recipe import Recipe
from qwenq.results import RESULTS_FILE, plain_name
from qwenq.run.senseless import require_packages, validate_recipe
from qwenq.versions import __version__

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Step:
    """One command, or the rows of a check.

    Attributes:
        name: for people and the journal.
        arguments: of ``python -m module``; with ``records`` the arguments of ``execute.append_check``.
        makes: the file or folder that exists when it is done.
        reads: files and folders whose change makes it necessary again.
        always: run it every time: it is a verdict.
        whole: ``makes`` appears complete or not at all, under a name that holds all that decides it: the
            journal is not needed.
        alias: a link to ``makes`` under a name without that hash.
        module: ``qwenq``; another one in tests.
        records: append the check that `qwenq quantize` made to the run's rows, without a command.
    """

    name: str
    arguments: tuple[str, ...]
    makes: Path
    reads: tuple[Path, ...] = ()
    always: bool = False
    whole: bool = False
    alias: Path | None = None
    module: str = "qwenq"
    records: bool = False

    def fingerprint(self) -> str:
        """Return a hash of the command, of qwenq's version, and of sizes and times of the files it reads."""
        facts = [__version__, self.name, *self.arguments, *(state(path) for path in self.reads)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chain:
    """Steps of a recipe, and where they write.

    Attributes:
        work: run folder: rows, journal, quantised models.
        page: the report; None where nothing was measured.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    work: Path
    page: Path | None


def find_recipe(name: Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that ships with qwenq, such as ``demo``."""
    if name.exists() or name.suffix or len(name.parts) != 1:
        return name
    package = Path(str(files("qwenq")))
    shipped = (folder / "recipes" / f"{name}.toml" for folder in (package, package.parent))  # wheel, checkout
    return next((file for file in shipped if file.is_file()), name)


def chain_of(recipe: Recipe, file: Path, work: Path | None = None) -> Chain:
    """Return the steps of a recipe, in order.

    Args:
        recipe: as it was read.
        file: its file, which `qwenq quantize` reads itself.
        work: run folder; None: ``runs/NAME``.

    Raises:
        UsageError: the recipe contradicts itself, or a package that a step needs is missing.
    """
    name = recipe.report.name or file.stem
    folder = work or Path("runs") / name
    quantised = {p: folder / "models" / _model_folder(recipe, p) for p in precisions(recipe) if p in BITS}
    plain = [precision for precision in precisions(recipe) if precision in DTYPES]
    rounded = recipe.weights == "random" and recipe.profile is not None  # on the fly, by `qwenq profile`
    made = {} if rounded else {p: _quantise(recipe, file, p, out) for p, out in quantised.items()}
    steps = list(made.values())
    if (recipe.eval or recipe.profile) and recipe.weights == "stored":
        steps += [_record(precision, step, folder) for precision, step in made.items()]
    validate_recipe(recipe)
    require_packages(recipe)
    if recipe.eval is not None:
        steps += [*_evaluate(recipe, folder, plain, quantised)]
    if recipe.profile is not None:
        steps.append(_profile(recipe, folder, plain, quantised))
    page = None
    if recipe.eval is not None or recipe.profile is not None:
        page = Path(recipe.report.folder) / name / "index.html"
        steps.append(_report(recipe, folder, page))
    if recipe.gate.baseline is not None:
        steps.append(_gate(recipe.gate.baseline, folder, recipe.gate.fail_on))
    return Chain(recipe, tuple(steps), folder, page)


def precisions(recipe: Recipe) -> tuple[str, ...]:
    """Return the precisions of a recipe; by default the unquantised model in bf16, and ``quantize.bits``."""
    return tuple(dict.fromkeys(recipe.precisions)) or ("bf16", f"int{recipe.quantize.bits}")


def _quantise(recipe: Recipe, file: Path, precision: str, out: Path) -> Step:
    model = () if recipe.model is None else (recipe.model,)
    bits = str(BITS[precision])
    arguments = ("quantize", *model, "--recipe", str(file), "--bits", bits, "--out", str(out))
    alias = out.parents[1] / out.name
    return Step(f"quantise to {precision}", arguments, out, whole=True, alias=alias)


def _model_folder(recipe: Recipe, precision: str) -> Path:
    """Return ``3f2a91c0/NAME-GPTQ-Int4``: another recipe or model gets another folder."""
    content = recipe.to_json()
    parts = {key: content[key] for key in ("model", "weights", "calibration", "quantize")}
    parts["quantize"]["bits"] = BITS[precision]
    states = [state(path) for path in _local(recipe.model, recipe.calibration.source)]
    facts = json.dumps([__version__, parts, states], sort_keys=True)
    name = plain_name(Path(recipe.model).name) if recipe.model else BUNDLED
    return Path(hashlib.sha256(facts.encode()).hexdigest()[:8]) / f"{name}-GPTQ-{precision.capitalize()}"


def _record(precision: str, quantise: Step, folder: Path) -> Step:
    arguments = (str(quantise.makes), str(folder), shlex.join(["qwenq", *quantise.arguments]))
    name, rows = f"record the check of {precision}", folder / RESULTS_FILE
    return Step(name, arguments, rows, (quantise.makes,), records=True)


def _evaluate(recipe: Recipe, folder: Path, plain: list[str], quantised: dict[str, Path]) -> Iterator[Step]:
    """Yield the evaluations, the unquantised model first: the others are paired with its answers."""
    options = [*_eval_options(recipe), "--out", str(folder)]
    base = [] if recipe.model is None else [recipe.model]
    rows = folder / RESULTS_FILE
    data = recipe.eval.data if recipe.eval else None
    asked = recipe.eval.dtype if recipe.eval else "auto"
    dtype = () if asked == "auto" else ("--dtype", asked)
    for precision in plain:
        arguments = ("eval", *base, "--dtype", DTYPES[precision], *options)
        yield Step(f"evaluate {precision}", arguments, rows, _local(recipe.model, data))
    for precision, model in quantised.items():
        arguments = ("eval", str(model), *dtype, *options)
        yield Step(f"evaluate {precision}", arguments, rows, (model, *_local(data)))


def _eval_options(recipe: Recipe) -> Iterator[str]:
    wanted = recipe.eval
    if wanted is None:
        return
    yield from ("--tasks", ",".join(wanted.tasks), "--protocol", wanted.protocol)
    if wanted.subjects:
        yield from ("--subjects", ",".join(wanted.subjects))
    data = None if wanted.data is None else Path(wanted.data).expanduser()  # no shell does it for a step
    for option, value in (
        ("--limit", _by_task(wanted.limit)),
        ("--shots", wanted.shots),
        ("--thinking", None if wanted.thinking == "auto" else wanted.thinking),
        ("--max-new-tokens", _by_task(wanted.max_new_tokens)),
        ("--data", data),
    ):
        if value is not None:
            yield from (option, str(value))
    if wanted.sample:
        yield "--sample"


def _by_task(number: int | dict[str, int] | None) -> str | None:
    """Return a number of all tasks, or of each, as the command line takes it."""
    if not isinstance(number, dict):
        return None if number is None else str(number)
    return ",".join(f"{task}={count}" for task, count in number.items())


def _profile(recipe: Recipe, folder: Path, plain: list[str], quantised: dict[str, Path]) -> Step:
    """Return one command for all models; it keeps what it has measured, and continues there."""
    wanted = recipe.profile
    assert wanted is not None  # noqa: S101 - the caller has looked
    random = recipe.weights == "random"
    names = [recipe.model or "bundled"]
    if random:  # int8 and int4 of random weights are rounded on the fly: no folder of theirs is made
        shown = [*plain, *quantised]
    else:
        names, shown = [*(names if plain else []), *map(str, quantised.values())], plain
    options = {
        "--precision": ",".join(shown),
        "--tokens": ",".join(map(str, wanted.tokens)) or "0",
        "--encode": ",".join(map(str, wanted.encode)) or "0",
        "--attention": ",".join(wanted.attention),
        "--engine": ",".join(wanted.engine),
        "--weights": "random" if random else "",
        "--budget": wanted.budget or "",
        "--out": str(folder),
    }
    arguments = [text for option, value in options.items() if value for text in (option, value)]
    reads = (*_local(recipe.model), *(() if random else quantised.values()))
    return Step("profile", ("profile", *names, *arguments), folder / RESULTS_FILE, reads)


def _report(recipe: Recipe, folder: Path, page: Path) -> Step:
    title = () if recipe.report.title is None else ("--title", recipe.report.title)
    arguments = ("report", str(folder), "--out", str(page.parent), *title)
    return Step("report", arguments, page, (folder / RESULTS_FILE,))


def _gate(baseline: str, folder: Path, fail_on: str | None) -> Step:
    """Return the comparison; it names conditions only if the recipe does: those named must judge a row."""
    conditions = () if fail_on is None else ("--fail-on", fail_on)
    return Step("gate", ("compare", baseline, str(folder), *conditions), folder / RESULTS_FILE, always=True)


def _local(*names: str | None) -> tuple[Path, ...]:
    """Return the names that are files or folders here; hub ids and the bundled model are not."""
    paths = (Path(name).expanduser() for name in names if name is not None)
    return tuple(path for path in paths if path.exists())


def state(path: Path) -> str:
    """Return names, sizes and times of a file, or of the files of a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return json.dumps(found)
