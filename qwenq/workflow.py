"""Run a recipe from quantisation to report: turn it into steps, and run those that are not done.

Each step is a command of qwenq in a child process: its memory and crashes stay there. A journal beside the
results lists the steps that ended, under a fingerprint of all that decides them.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from types import FrameType

from qwenq.environment import __version__
from qwenq.errors import UsageError
from qwenq.events import Listener, Notice, Start, silent
from qwenq.models.bundled import NAME as BUNDLED
from qwenq.models.bundled import is_bundled, require_bundled
from qwenq.models.folders import CARD, CARD_PLOTS, PARTIAL
from qwenq.recipe import EvalRecipe, ProfileRecipe, Recipe, options_of
from qwenq.results import RESULTS_FILE
from qwenq.stopping import with_parent
from qwenq.storage import append_line, guard_storage, locked

# Refuse at once what a later step of a recipe would refuse after hours.


def _require_sound(recipe: Recipe, file: Path) -> None:
    """Require conditions and tasks that there are, files that are there, and no contradiction."""
    from qwenq.evals.tasks.registry import get_task, protocol_names
    from qwenq.reporting.gate import asked_by

    for what, hint in _contradictions(recipe):
        raise UsageError(what, where=file, hint=hint)
    key, tasks = "gate.fail_on", recipe.eval.tasks if recipe.eval else ()
    protocol = recipe.eval.protocol if recipe.eval else "auto"
    try:
        asked_by(recipe.gate.fail_on)
        key = "eval.tasks"
        for task in tasks:
            get_task(task, protocol_names(task)[0] if protocol == "auto" else protocol)
    except UsageError as error:
        error.where = f"{file}, {key}"
        raise
    if "ifeval" in tasks:
        from qwenq.evals.tasks.ifeval import require_packages

        require_packages()  # they are no ordinary dependencies of qwenq


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what contradicts itself in a recipe or names no file, and what it may be."""
    data = recipe.eval.data if recipe.eval else None
    for key, path in (("calibration.source", recipe.calibration.source), ("eval.data", data)):
        if path is not None and _is_path(path) and not Path(path).expanduser().exists():
            hint = "paths in a recipe are taken from the folder that qwenq is started in"
            yield f"{key} = {path!r}: no such file or folder", hint
    for key, name in (("model", recipe.model), ("gate.baseline", recipe.gate.baseline)):
        if name is not None and name.startswith("-"):  # a step would take it for an option of its own
            yield f"{key} = {name!r} is an option, not a name", f"write ./{name}, if that is its folder"
    if recipe.eval is not None and recipe.weights == "random":
        yield "[eval] of random weights would measure chance", "leave [eval] out"
    if recipe.eval is not None:
        yield from _contradictory_evaluation(recipe.eval)
    if recipe.profile is not None:
        yield from _contradictory_points(recipe.profile)


def _contradictory_evaluation(wanted: EvalRecipe) -> Iterator[tuple[str, str]]:
    if not wanted.tasks:
        yield "eval.tasks is empty: there is nothing to evaluate", "name a task, or leave [eval] out"
    if wanted.data is not None and wanted.sample:
        yield "eval.data and eval.sample exclude each other", "leave one of them out"
    for key, numbers in {"limit": wanted.limit, "max_new_tokens": wanted.max_new_tokens}.items():
        for task in numbers if isinstance(numbers, dict) else ():
            if task not in wanted.tasks:
                yield f"eval.{key}: {task!r} is not asked for", f"eval.tasks are {', '.join(wanted.tasks)}"


def _is_path(name: str) -> bool:
    """Return whether it is a path, not a word such as ``self`` or the ``owner/name`` of a hub dataset."""
    return name.startswith((".", "/", "~")) or Path(name).suffix != "" or name.count("/") > 1


def _contradictory_points(wanted: ProfileRecipe) -> Iterator[tuple[str, str]]:
    from qwenq.profiling.planning import parse_budget

    if 1 in wanted.tokens:
        yield "profile.tokens = 1: a generation has 2 new tokens or more", "encode measures prompts alone"
    if not wanted.tokens and not wanted.encode:
        yield "profile.tokens and profile.encode are empty", "name a length, or leave [profile] out"
    if wanted.budget is not None:
        try:
            parse_budget(wanted.budget)
        except UsageError as error:
            yield f"profile.budget: {error.what}", str(error.hint)


# Turn a recipe into steps: commands of qwenq in order, and what decides whether each is necessary again.


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str  # for people and the journal
    arguments: tuple[str, ...]  # of ``python -m module``
    makes: Path  # the file or folder that exists when it is done
    reads: tuple[Path, ...] = ()  # files and folders whose change makes it necessary again
    always: bool = False  # run it every time: it is a verdict
    # ``makes`` appears complete or not at all, under a name that holds all that decides it: no journal is
    # needed
    whole: bool = False
    alias: Path | None = None  # a link to ``makes`` under a name without that hash
    module: str = "qwenq"  # another one in tests

    def fingerprint(self) -> str:
        """Return a hash of the command, of qwenq's version, and of sizes and times of the files it reads."""
        facts = [__version__, self.name, *self.arguments, *(state(path) for path in self.reads)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Chain:
    """Steps of a recipe, and where they write."""

    recipe: Recipe
    steps: tuple[Step, ...]
    work: Path  # run folder: rows, journal, quantised models
    page: Path | None  # the report; None where nothing was measured


def find_recipe(name: Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that ships with qwenq, such as ``demo``."""
    if name.is_file():
        return name
    shipped = shipped_recipes()
    if str(name) not in shipped and not name.exists():
        names = ", ".join(sorted(shipped))
        raise UsageError("no such recipe", where=name, hint=f"name a TOML file, or one of qwenq's: {names}")
    return shipped.get(str(name), name)


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that ship with qwenq, by name."""
    package = Path(str(files("qwenq")))
    folders = (folder / "recipes" for folder in (package.parent, package))  # a checkout's, a wheel's
    return {file.stem: file for folder in folders for file in folder.glob("*.toml")}


def steps_of(recipe: Recipe, file: Path, work: Path | None = None) -> Chain:
    """Return the steps of a recipe, in order.

    Args:
        recipe: as it was read.
        file: its file, which `qwenq quantize` reads itself.
        work: run folder; None: ``runs/NAME``.

    Raises:
        QwenqError: the recipe contradicts itself, or a package that a step needs is missing.
    """
    name = recipe.report.name or file.stem
    folder = work or Path("runs") / name
    quantised = {p: folder / "models" / _model_folder(recipe, p) for p in precisions(recipe) if p in BITS}
    plain = [precision for precision in precisions(recipe) if precision in DTYPES]
    rounded = recipe.weights == "random" and recipe.profile is not None  # on the fly, by `qwenq profile`
    made = {} if rounded else {p: _quantise(recipe, file, p, out) for p, out in quantised.items()}
    steps = list(made.values())
    _require_sound(recipe, file)
    if recipe.eval is not None:
        steps += _evaluate(recipe, recipe.eval, folder, plain, quantised)
    if recipe.profile is not None:
        steps.append(_profile(recipe, recipe.profile, folder, plain, quantised))
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
    model = recipe.model or "bundled"
    bits = str(BITS[precision])
    shipped = shipped_recipes().get(file.stem) == file  # by its name: its folder is nothing to record
    word = file.stem if shipped else str(file)
    arguments = ("quantize", model, "--recipe", word, "--bits", bits, "--out", str(out))
    alias = out.parents[1] / out.name
    return Step(f"quantise to {precision}", arguments, out, whole=True, alias=alias)


def _model_folder(recipe: Recipe, precision: str) -> Path:
    """Return ``3f2a91c0/NAME-GPTQ-Int4``: another recipe or model gets another folder."""
    content = recipe.to_json()
    parts = {key: content[key] for key in ("model", "weights", "calibration", "quantize")}
    parts["quantize"]["bits"] = BITS[precision]
    states = [state(path) for path in _local(recipe.model, recipe.calibration.source)]
    facts = json.dumps([__version__, parts, states], sort_keys=True)
    name = Path(recipe.model).name if recipe.model else BUNDLED
    return Path(hashlib.sha256(facts.encode()).hexdigest()[:8]) / f"{name}-GPTQ-{precision.capitalize()}"


def _evaluate(
    recipe: Recipe, wanted: EvalRecipe, folder: Path, plain: list[str], quantised: dict[str, Path]
) -> Iterator[Step]:
    """Yield the evaluations, the unquantised model first: the others are paired with its answers."""
    base, rows = recipe.model or "bundled", folder / RESULTS_FILE
    data = None if wanted.data is None else Path(wanted.data).expanduser()  # no shell does it for a step
    for precision in (*plain, *quantised):
        made = quantised.get(precision)
        own = {"data": data, "dtype": DTYPES.get(precision, wanted.dtype)}
        options = options_of("eval", {**vars(wanted), **own})
        reads = (made, *_local(wanted.data)) if made else _local(recipe.model, wanted.data)
        arguments = ("eval", str(made or base), *options, "--out", str(folder))
        yield Step(f"evaluate {precision}", arguments, rows, reads)


def _profile(
    recipe: Recipe, wanted: ProfileRecipe, folder: Path, plain: list[str], quantised: dict[str, Path]
) -> Step:
    """Return one command for all models; it keeps what it has measured, and continues there."""
    random = recipe.weights == "random"
    names = [recipe.model or "bundled"]
    if random:  # int8 and int4 of random weights are rounded on the fly: no folder of theirs is made
        shown = [*plain, *quantised]
    else:
        names, shown = [*(names if plain else []), *map(str, quantised.values())], plain
    options = ("--precision", ",".join(shown)) if shown else ()
    drawn = ("--weights", "random") if random else ()
    arguments = (*names, *options, *options_of("profile", vars(wanted)), *drawn, "--out", str(folder))
    reads = (*_local(recipe.model), *(() if random else quantised.values()))
    return Step("profile", ("profile", *arguments), folder / RESULTS_FILE, reads)


def _report(recipe: Recipe, folder: Path, page: Path) -> Step:
    """Return the report; it finds the models' cards by the commands of the rows, and skips edited ones."""
    title = () if recipe.report.title is None else ("--title", recipe.report.title)
    arguments = ("report", str(folder), "--out", str(page.parent), *title)
    return Step("report", arguments, page, (folder / RESULTS_FILE,))


def _gate(baseline: str, folder: Path, fail_on: str | None) -> Step:
    """Return the comparison; it names conditions only if the recipe does: those named must judge a row."""
    conditions = () if fail_on is None else ("--fail-on", fail_on)
    forms = ("--markdown", str(folder / f"{VERDICT}.md"), "--junit", str(folder / f"{VERDICT}.xml"))
    arguments = ("compare", baseline, str(folder), *conditions, *forms)
    return Step("gate", arguments, folder / RESULTS_FILE, always=True)


def _local(*names: str | None) -> tuple[Path, ...]:
    """Return the names that are files or folders here; hub ids and the bundled model are not."""
    paths = (Path(name).expanduser() for name in names if name is not None)
    return tuple(path for path in paths if path.exists())


def state(path: Path) -> str:
    """Return names, sizes and times of a file, or of the files of a folder but for its model card."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    card = (path / CARD, path / CARD_PLOTS)  # the report writes it, which makes no step necessary again
    files = [file for file in files if not {file, *file.parents}.intersection(card)]
    found = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return json.dumps(found)


# Run the steps of a recipe, each in a child process, and none of them twice.


JOURNAL, VERDICT = "journal.jsonl", "gate"
LOCK = "run.lock"
"""Not the steps' own, which they hold in the same folder."""


def is_done(chain: Chain, step: Step) -> bool:
    """Return whether what the step makes exists, and by the journal was made by this very step."""
    if step.always or not step.makes.exists():
        return False
    if step.whole:
        return True
    fingerprint, rows = _journal(chain.work).get(step.name, ("", 0))
    return fingerprint == step.fingerprint() and rows <= _rows(chain.work)


def run_steps(chain: Chain, listener: Listener = silent) -> int:
    """Run the steps that are not done; stop at the first that fails, and return its exit code, else 0.

    Raises:
        UsageError: another `qwenq run` works in this run folder.
        StorageError: the disk refused.
    """
    require_machine(chain)
    with locked(chain.work, LOCK):
        return _run_steps(chain, listener)


def require_machine(chain: Chain) -> None:
    """Require what steps that are still to come need here: the bundled model, a sandbox, all benchmarks.

    Benchmarks of the hub are downloaded, which the evaluation would do hours later.

    Raises:
        QwenqError: it is not there; says how to get it.
    """
    recipe = chain.recipe
    waiting = [step for step in chain.steps if not is_done(chain, step) and step.module == "qwenq"]
    if waiting and recipe.weights == "stored" and is_bundled(recipe.model):
        require_bundled()
    if recipe.eval is not None and any(step.arguments[:1] == ("eval",) for step in waiting):
        _require_benchmarks(recipe.eval)


def _require_benchmarks(wanted: EvalRecipe) -> None:
    from qwenq.evals.sandbox.run import find_sandbox
    from qwenq.evals.task import DataSource
    from qwenq.evals.tasks.registry import get_task, protocol_names

    folder = None if wanted.data is None else Path(wanted.data).expanduser()
    known = wanted.protocol != "auto"  # else the model decides it, and with it what examples there can be
    for name in wanted.tasks:
        task = get_task(name, wanted.protocol if known else protocol_names(name)[0])
        if task.needs_sandbox:
            find_sandbox()
        task.items(DataSource(folder, wanted.sample), wanted.subjects, wanted.shots if known else None)


def _run_steps(chain: Chain, listener: Listener) -> int:
    fresh = len(chain.steps) == 1
    for number, step in enumerate(chain.steps, 1):
        if is_done(chain, step):
            _discard_leftover(step)
            _link(step)
            if step.name not in _journal(chain.work):  # a kill came after its last write
                _append_to_journal(chain.work, step, None)
            continue
        listener(Start(step.name, len(chain.steps), "steps", number - 1))
        if step.always and not fresh:
            listener(Notice("it judges earlier results; after a change of the code, use an empty folder"))
        fresh = True
        started = time.monotonic()
        code, stopped = _execute(step)
        if code != 0:
            listener(Notice(f"{step.name} ended with exit code {code}; the same command goes on here"))
            return code
        _link(step)
        _append_to_journal(chain.work, step, time.monotonic() - started)
        if stopped:  # it came when the step had done its work, and still applies
            signal.raise_signal(signal.SIGTERM)
    return 0


def _link(step: Step) -> None:
    """Point the step's alias at what it made, in one move; a file or folder of that name stays."""
    if step.alias is None or not step.makes.exists():
        return
    alias, target = step.alias, os.path.relpath(step.makes, step.alias.parent)
    if alias.is_symlink() and str(alias.readlink()) == target:
        return
    if alias.exists() and not alias.is_symlink():
        return
    fresh = alias.with_name(f".{alias.name}.{os.getpid()}")
    with guard_storage(alias):
        fresh.unlink(missing_ok=True)  # of a process of that number that was killed here
        fresh.symlink_to(target, target_is_directory=True)
        fresh.replace(alias)


def _discard_leftover(step: Step) -> None:
    """Remove the work folder of a model that was killed just after the model got its name."""
    leftover = step.makes.with_name(f"{step.makes.name}{PARTIAL}")
    if step.whole and leftover.is_dir():
        from qwenq.models.quantized_folder import discard_leftover

        discard_leftover(leftover)


def _execute(step: Step) -> tuple[int, bool]:
    """Run a step's command; Ctrl-C and SIGTERM reach it, and it may save its work; it dies with this one.

    Returns:
        Its exit code, and whether SIGTERM came.
    """
    command = [sys.executable, "-m", step.module, *step.arguments]
    running: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        for child in running:
            child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)  # first, or one that comes now would be lost
    try:
        with subprocess.Popen(command, env=with_parent()) as child:
            running.append(child)
            if received:
                child.send_signal(signal.SIGTERM)
            try:
                code = child.wait()
            except KeyboardInterrupt:
                child.wait()  # a terminal sends the signal to both
                raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code, bool(received)


def _rows(work: Path) -> int:
    """Return the bytes of the run's rows; fewer than a step left there: the file was begun anew since."""
    path = work / RESULTS_FILE
    return path.stat().st_size if path.exists() else 0


def _journal(work: Path) -> dict[str, tuple[str, int]]:
    """Return the last entry of each step: its fingerprint, and the bytes of rows then, which only grow.

    A line that a kill cut off is skipped.
    """
    try:
        lines = (work / JOURNAL).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return {}
    ends: dict[str, tuple[str, int]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            ends[entry["step"]] = entry["fingerprint"], int(entry.get("rows", 0))
        except (ValueError, TypeError, KeyError):
            continue
    return ends


def _append_to_journal(work: Path, step: Step, seconds: float | None) -> None:
    """Append a finished step, flushed to the disk; without seconds where nobody saw its end."""
    entry = {
        "step": step.name,
        "fingerprint": step.fingerprint(),
        "rows": _rows(work),
        "command": [step.module, *step.arguments],
        "seconds": None if seconds is None else round(seconds, 1),
        "date": date.today().isoformat(),
    }
    append_line(work / JOURNAL, json.dumps(entry, ensure_ascii=False))
