"""Measure models and judge the figures: check, evaluate, perplexity, profile, report, compare."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenq.events import Listener, Notice, counted, notify
from qwenq.progress import Progress, shown
from qwenq.recipe import EvalRecipe, ProfileRecipe, Recipe

if TYPE_CHECKING:
    import pandas as pd

    from qwenq.distributed import Team
    from qwenq.evals.check import CheckResult
    from qwenq.evals.model import LocalModel
    from qwenq.evals.perplexity import ScoredText, Switches
    from qwenq.reporting.gate import Verdict
    from qwenq.results import Row

Name = str | Path
TASKS = EvalRecipe().tasks
PRECISIONS = ("fp32", "bf16", "int8", "int4")


def each_once(models: Name | Sequence[Name] | None) -> list[str | None]:
    """Return names as the command line has them: each once; None is the bundled model."""
    if models is None:
        return [None]
    given = [models] if isinstance(models, str | Path) else models
    return list(dict.fromkeys(str(name) for name in given))


def check(
    quantised: Name,
    against: Name | None = None,
    *,
    text: Name = "self",
    samples: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = True,
) -> CheckResult:
    """Compare a quantised model with its base: KL divergence, same top token, perplexity, error by module.

    ``result.verdict`` sums it up, ``result.broken`` is the command's exit code. The arguments are those of
    ``checking.check_folders``.

    Raises:
        QwenqError: not a quantised model and its base, or one of them cannot be read.
    """
    from qwenq.checking import check_folders

    with shown(progress) as listener:
        return check_folders(
            str(quantised),
            None if against is None else str(against),
            text=str(text),
            samples=samples,
            seq_len=seq_len,
            device=device,
            dtype=dtype,
            seed=seed,
            listener=listener,
        ).result


@dataclass(frozen=True)
class Results:
    """Rows of a run folder.

    Attributes:
        rows: one for each figure, see ``qwenq.results.Row``.
        folder: the run folder; ``qwenq.report`` and ``qwenq.compare`` read it.
    """

    rows: list[Row] = field(default_factory=list)
    folder: Path = field(default_factory=Path)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame: one line a row, its point (task, context, …) as columns."""
        import pandas as pd

        behind = ("value", "unit", "low", "high", "n", "status", "reason")
        return pd.DataFrame(
            {
                "model": row.model.name,
                "precision": row.model.precision,
                "metric": row.metric,
                **row.point,
                **{name: getattr(row, name) for name in behind},
            }
            for row in self.rows
        )

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(index=False))


def evaluate(
    models: Name | Sequence[Name] | None = None,
    tasks: str | Sequence[str] = TASKS,
    *,
    protocol: Literal["auto", "card", "base", "lm-eval"] | None = None,
    subjects: Sequence[str] = (),
    limit: int | Mapping[str, int] | None = None,
    shots: int | None = None,
    max_new_tokens: int | Mapping[str, int] | None = None,
    thinking: Literal["auto", "on", "off"] = "auto",
    data: Name | None = None,
    sample: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    engine: Literal["fast", "transformers"] = "fast",
    attention: str = "auto",
    kernel: str = "auto",
    batch: int | None = None,
    unsafe_code: bool = False,
    endpoint: str | None = None,
    model: str | None = None,
    out: Name | None = None,
    progress: Progress = True,
    team: Team | None = None,
    command: str = "qwenq.evaluate",
) -> Results:
    """Evaluate models on benchmarks; quantised ones are compared with their base where it is among them.

    The options are those of `qwenq eval`. Answers are recorded in ``out`` (default: runs/NAME): the same call
    continues where it was stopped, and asks nothing twice.

    Args:
        batch: prompts at once, or requests at once to an endpoint; None: as many as fit.
        endpoint: an OpenAI-compatible server, whose ``model`` is evaluated instead.
        team: processes that share the items; only rank 0 returns rows. command: recorded with each row.

    Raises:
        QwenqError: an unknown task, missing data, no sandbox, a model that cannot be read.
    """
    from qwenq.distributed import ALONE
    from qwenq.evals.model import LoadOptions
    from qwenq.evals.suite import open_and_evaluate, run_folder

    given = each_once(models)
    _require_alone(endpoint, models, model)
    asked: dict[str, Any] = {"tasks": (tasks,) if isinstance(tasks, str) else tuple(tasks)}
    asked |= {"subjects": tuple(subjects), "protocol": protocol, "thinking": thinking, "dtype": dtype}
    asked |= {"sample": sample, "limit": limit, "shots": shots, "max_new_tokens": max_new_tokens}
    asked |= {"data": None if data is None else str(data)}
    chosen = Recipe().override(eval=asked).eval or EvalRecipe()
    served = None if endpoint is None else (endpoint, model)
    folder = run_folder(out, given, served and (model or "served"))
    how, team = LoadOptions(device, dtype, engine, attention, kernel, thinking), team or ALONE
    with shown(progress if team.is_rank0 else False) as listener:
        rows = open_and_evaluate(
            served or given, chosen, how, folder, listener, command, team, batch, unsafe_code=unsafe_code
        )
    return Results(rows, folder)


def _require_alone(endpoint: str | None, models: object, model: str | None) -> None:
    """Refuse models beside an endpoint, and the name of a served one without."""
    from qwenq.errors import UsageError

    if endpoint is None and model is not None:
        raise UsageError(
            "--model is the name of a model behind --endpoint", hint="name local models without --model"
        )
    if endpoint is not None and models:
        raise UsageError(
            "with --endpoint only the server's model is measured",
            where="--endpoint",
            hint="name it with --model; local models can go into the same --out in another command",
        )


def profile(
    models: Name | Sequence[Name] | None = None,
    *,
    tokens: Sequence[int] = (2048,),
    context: Sequence[int] = (1,),
    encode: Sequence[int] = (2048,),
    precision: Sequence[str] = PRECISIONS,
    attention: Sequence[str] = ("auto",),
    engine: Sequence[str] = ("fast",),
    kernel: str = "auto",
    device: str = "auto",
    weights: Literal["stored", "random"] = "stored",
    seed: int = 0,
    budget: str | None = None,
    tp: int = 1,
    endpoint: str | None = None,
    model: str | None = None,
    concurrency: Sequence[int] = (1, 4, 16, 64),
    input: int = 512,
    output: int = 128,
    out: Name | None = None,
    progress: Progress = True,
    command: str = "qwenq.profile",
) -> Results:
    """Measure speed and memory, each point in a process of its own. The options are `qwenq profile`'s.

    Args:
        endpoint: an OpenAI-compatible server, whose ``model`` is measured instead, by streamed requests at
            each ``concurrency``; ``precision`` then names what it computes in. Rows record ``command``.

    Raises:
        QwenqError: an unknown model, precision, attention or engine; nothing to measure.
    """
    from qwenq.evals.rows import record_checks
    from qwenq.profiling.planning import parse_budget
    from qwenq.profiling.spec import lengths_of, require_kernel, subjects_of
    from qwenq.profiling.sweep import sweep_models
    from qwenq.storage import locked

    asked: dict[str, Any] = {"tokens": tuple(tokens), "encode": tuple(encode), "budget": budget}
    asked |= {"attention": tuple(attention), "engine": tuple(engine)}
    chosen = Recipe().override({"weights": weights}, profile=asked).profile or ProfileRecipe()
    seconds = parse_budget(chosen.budget) if chosen.budget else None
    _require_alone(endpoint, models, model)
    with shown(progress) as listener:
        if endpoint is not None:
            named = "served" if tuple(precision) == PRECISIONS else ",".join(precision)
            load = tuple(concurrency), input, output
            return _profile_served(endpoint, model, named, load, seconds, out, listener, command)
        require_kernel(kernel)
        how: dict[str, Any] = {"attentions": chosen.attention, "engines": chosen.engine, "kernel": kernel}
        how |= {"tp": tp, "lengths": lengths_of(context, chosen.tokens, chosen.encode)}
        found = subjects_of(each_once(models), precision, weights, seed)
        folder = Path("runs") / f"profile-{'-'.join(found.shapes)}" if out is None else Path(out)
        rows = sweep_models(found, how, device, seconds, folder, listener, command)
        with locked(folder):
            record_checks([(each.given, each.model) for each in found.subjects], folder, listener)
    return Results(rows, folder)


def _profile_served(
    endpoint: str,
    model: str | None,
    precision: str,
    load: tuple[tuple[int, ...], int, int],
    budget: float | None,
    out: Name | None,
    listener: Listener,
    command: str,
) -> Results:
    from qwenq.environment import environment
    from qwenq.profiling.served import Load, find_target, profile_served
    from qwenq.storage import locked

    target = find_target(endpoint, model, os.environ.get("OPENAI_API_KEY"), listener, precision=precision)
    folder = Path("runs") / f"served-{target.model.name}" if out is None else Path(out)
    with locked(folder):
        facts = environment()
        rows = profile_served(
            target, Load(*load), folder, listener, environment=facts, budget=budget, command=command
        )
    return Results(rows, folder)


def perplexity(
    models: Name | Sequence[Name] | None,
    text: Name,
    *,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    samples: int = 4,
    ntk: bool | None = None,
    logn: bool | None = None,
    device: str = "auto",
    dtype: str = "auto",
    engine: Literal["fast", "transformers"] = "fast",
    attention: str = "auto",
    kernel: str = "auto",
    out: Name | None = None,
    progress: Progress = True,
    command: str = "qwenq.perplexity",
) -> Results:
    """Measure perplexity by context length. Lengths that the run folder has are not measured again.

    Args:
        models: None is the bundled one.
        text: a file of text, JSON, CSV or parquet.
        lengths: in tokens; each divides the longest.
        samples: windows of the longest length; shorter ones are cut from these.
        ntk, logn: Qwen v1's dynamic NTK and logn attention; None: both on and off.

    Raises:
        QwenqError: the text is too short, a model has no such switch, or cannot be read.
    """
    from qwenq.evals.model import LoadOptions, open_eval_model
    from qwenq.evals.perplexity import combinations, require_lengths
    from qwenq.models.folders import local_path
    from qwenq.models.identity import model_name

    path, wanted, names = local_path(text, "--text"), sorted(lengths), each_once(models)
    run = local_path(out if out is not None else Path("runs") / model_name(names[0]), "--out")
    opened = [open_eval_model(one, LoadOptions(device, dtype, engine, attention, kernel)) for one in names]
    switches = [combinations(one.checkpoint.config, ntk, logn, one.model.name) for one in opened]
    texts = [_scored_text(path, one, samples, max(wanted)) for one in opened]
    for made in texts:
        require_lengths(wanted, made)
    rows: list[Row] = []
    with shown(progress) as listener:
        notify(listener, (notice for one in opened for notice in one.notices))
        for eval_model, found, tokens in zip(opened, switches, texts, strict=True):
            rows += _perplexities(eval_model, tokens, wanted, found, run, listener, command)
            eval_model.unload()
    return Results(rows, run)


def _perplexities(
    eval_model: LocalModel,
    text: ScoredText,
    lengths: Sequence[int],
    switches: Sequence[Switches | None],
    run: Path,
    listener: Listener,
    command: str,
) -> Iterator[Row]:
    """Yield every row: those that the run folder has, and new ones, appended to it as they are made."""
    from qwenq.environment import MACHINE, environment, machine
    from qwenq.evals.perplexity import perplexities
    from qwenq.results import append_row, read_rows, write_environment
    from qwenq.storage import locked

    with locked(run), counted(listener, eval_model.model.label, "tokens") as update:
        known = read_rows(run) if (run / "results.jsonl").exists() else []
        found = environment()
        write_environment(run, found)
        for row in perplexities(
            eval_model, text, lengths, switches, command=command, progress=update, known=known
        ):
            if any(row is one for one in known):
                yield row
                continue
            made = replace(row, settings={**row.settings, MACHINE: machine(found)})
            append_row(run, made)
            yield made


def _scored_text(path: Path, eval_model: LocalModel, windows: int, longest: int) -> ScoredText:
    """Return the first ``windows * longest`` tokens of a file."""
    import torch

    from qwenq.calibration.files import read_file
    from qwenq.calibration.self_text import separator_of
    from qwenq.calibration.sequences import check_vocabulary, ids_of
    from qwenq.errors import UsageError
    from qwenq.evals.perplexity import ScoredText

    tokenizer = eval_model.tokenizer
    end = separator_of(tokenizer) if path.suffix.lower() != ".txt" else None  # passages of one text have none
    ids: list[int] = []
    for document in read_file(path):
        ids += ids_of(document, tokenizer, special=False) + ([end] if end is not None else [])
        if len(ids) >= windows * longest:
            break
    if len(ids) < windows * longest:
        fit = len(ids) // longest
        raise UsageError(
            f"{windows} windows of {longest:,} tokens are needed, but the text has {len(ids):,} tokens",
            where=path,
            hint=f"lower --samples to {fit}" if fit else "give a longer text, or shorter --lengths",
        )
    tokens = torch.tensor(ids[: windows * longest], dtype=torch.int64).view(windows, longest)
    check_vocabulary(tokens, int(eval_model.checkpoint.config["vocab_size"]), str(path))
    return ScoredText(path.name, tokens)


def report(
    runs: Name | Sequence[Name],
    out: Name | None = None,
    title: str | None = None,
    cards: Sequence[Name] | None = None,
    progress: Progress = True,
) -> Path:
    """Write the model card's tables, one page and plots from run folders; return the page.

    Args:
        runs: run folders.
        out: the folder to write; None: reports/NAME of the first run folder.
        title: of the page.
        cards: quantised folders whose model cards get the tables and plots; None: those that commands of the
            runs name, if they were made on the command line.
        progress: receives a notice for each card that was written, or left as it is.

    Raises:
        QwenqError: a run folder cannot be read, ``out`` holds something other than a report, or a card of
            ``cards`` has no place for it.
    """
    from qwenq.errors import visible
    from qwenq.publishing.measured import fill_cards
    from qwenq.reporting.write import write_report

    folders = [Path(name) for name in ([runs] if isinstance(runs, str | Path) else runs)]
    page = write_report(folders, Path(out or Path("reports") / folders[0].resolve().name), title)
    with shown(progress) as listener:
        named = None if cards is None else [Path(name) for name in cards]
        for written in fill_cards(folders, page, named, listener):
            listener(Notice(f"card: {visible(str(written))}"))
    return page


def compare(
    baseline: Name,
    new: Name,
    *,
    more_baseline: Sequence[Name] = (),
    more_new: Sequence[Name] = (),
    fail_on: str | None = None,
    progress: Progress = True,
) -> Verdict:
    """Say which differences between two run folders are real.

    Args:
        baseline, new: run folders; the first may be a folder of several, of which the one of the new run's
            machine is taken.
        more_baseline, more_new: further repeats: speed and memory are taken over all of them.
        fail_on: conditions as in "accuracy:significant, speed:<0.95"; None: the default of `qwenq compare`.

    Returns:
        The verdict: ``headline`` in a sentence, ``exit_code`` 0 where nothing got worse.

    Raises:
        UsageError: a condition or a run folder cannot be read, or a run is named twice.
    """
    from qwenq.errors import UsageError
    from qwenq.reporting.collect import choose_baseline, collect
    from qwenq.reporting.compare import compare as compare_rows
    from qwenq.reporting.compare import idle_repeats, with_repeats
    from qwenq.reporting.gate import asked_by, judge

    conditions = asked_by(fail_on)
    chosen, why = choose_baseline(Path(baseline), Path(new))
    sides = [[Path(run) for run in side] for side in ([chosen, *more_baseline], [new, *more_new])]
    places = [run.resolve() for side in sides for run in side]
    if twice := [run for run in (*sides[0], *sides[1]) if places.count(run.resolve()) > 1]:
        raise UsageError("this run is named twice", where=twice[-1], hint="name each run folder once")
    read = []
    with shown(progress) as listener:
        if why:
            listener(Notice(f"compared with {chosen}: {why}"))
        for number, (first, *more) in enumerate(sides):
            run, turns = collect([first]), collect(more) if more else None
            for name in idle_repeats(run, turns):
                listener(Notice(f"{name} adds no repeat to {first}: {_NO_REPEAT}"))
            read.append(with_repeats(run, turns, judged=number == 1))
    return judge(compare_rows(*read), conditions, strict=fail_on is not None)


_NO_REPEAT = "it has no speed, time, memory or energy of the same weights at the same point on that machine"
