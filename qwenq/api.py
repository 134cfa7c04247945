"""Offer every command of qwenq as a function: ``import qwenq`` re-exports what is public here.

The functions have the defaults, the checks and the errors (``qwenq.errors``) of the command line.
``progress`` is True (a bar in a terminal or a notebook, notices as lines), False, or a function that receives
the events of ``qwenq.events``. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenq.events import Listener, Notice, ProgressBar, counted, silent

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from qwenq.calibration import CalibrationSet
    from qwenq.conversion import Converted
    from qwenq.distributed import Team
    from qwenq.evals.check import CheckResult
    from qwenq.models.chatml import Message
    from qwenq.models.tokenizer import Tokenizer
    from qwenq.planner.plan import Plan
    from qwenq.quantization import Quantised
    from qwenq.recipe import Recipe
    from qwenq.reporting.gate import Verdict
    from qwenq.results import Row
    from qwenq.runtime.chat import Conversation
    from qwenq.runtime.engine import Engine

Name = str | Path
Progress = bool | Listener | None
TASKS = ("mmlu", "ceval", "gsm8k", "humaneval")


@contextmanager
def _shown(progress: Progress) -> Iterator[Listener]:
    """Yield the listener that ``progress`` asks for."""
    if callable(progress):
        yield progress
    elif progress:
        with ProgressBar() as bar:
            yield bar
    else:
        yield silent


def _notify(listener: Listener, lines: Iterable[str]) -> None:
    for line in dict.fromkeys(lines):
        listener(Notice(line))


def _names(models: Name | Sequence[Name] | None) -> list[str | None]:
    """Return names as the command line has them: each once; None is the bundled model."""
    if models is None:
        return [None]
    given = [models] if isinstance(models, str | Path) else models
    return list(dict.fromkeys(str(name) for name in given))


def for_source(recipe: Recipe, source: str | None) -> Recipe:
    """Return a recipe without the settings that describe its own source of text, where another is given."""
    from qwenq.models.folders import local_path

    changes: dict[str, Any] = {}
    if source is None:
        return recipe
    if Path(source).suffix == ".safetensors":  # a saved set has its own sizes
        changes |= {"samples": "auto", "seq_len": "auto", "column": None}
    if source == "self" or local_path(source, "--calibration").is_file():
        changes["split"] = None
    if source == "self":
        changes["column"] = None
    return replace(recipe, calibration=replace(recipe.calibration, **changes))


def quantize(
    model: Name | None = None,
    *,
    out: Name | None = None,
    recipe: Recipe | Name | None = None,
    weights: str | None = None,
    calibration: Name | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    resume: bool = True,
    progress: Progress = True,
    **settings: Any,
) -> Quantised:
    """Quantise a model with GPTQ, check what was written, and return the folder and the check.

    Args:
        model: a folder or hub id; None: the recipe's, else the bundled model.
        out: the folder to make; None: named after the model, in the current folder.
        recipe: a recipe, its TOML file, or the name of one of qwenq's own; arguments replace its values.
        weights: "random": ``model`` is a catalogue name, drawn at random.
        calibration: "self" (the model writes the text), a file or folder, a saved set, or a hub dataset.
        samples, seq_len: calibration sequences, and tokens of each.
        device: "auto", "cpu", "cuda", "cuda:1", …
        resume: continue an unfinished run of the same settings.
        progress: see the module.
        **settings: keys of a recipe's ``[quantize]``: bits=4, group_size=128, damp=0.05, …

    Raises:
        QwenqError: see ``qwenq.errors``; finished layers are kept, the same call continues.
    """
    from qwenq.quantization import quantize as run
    from qwenq.recipe import Recipe, read_recipe
    from qwenq.workflow import find_recipe

    if recipe is None:
        base = Recipe()
    else:
        base = recipe if isinstance(recipe, Recipe) else read_recipe(find_recipe(Path(recipe)))
    source = None if calibration is None else str(calibration)
    text = {"source": source, "samples": samples, "seq_len": seq_len}
    top = {"model": model and str(model), "weights": weights}
    chosen = for_source(base, source).override(top, calibration=text, quantize=settings)
    with _shown(progress) as listener:
        return run(chosen, Path(out) if out else None, listener, device=device, resume=resume)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        name, precision: such as "Qwen3-8B" and "bf16" or "int4".
        engine: runs the network; ``engine.implementation`` names the kernels.
        tokenizer: of the same model.
        thinking: whether it thinks before it answers a chat.
    """

    name: str
    precision: str
    engine: Engine
    tokenizer: Tokenizer
    thinking: bool = False

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continue a text, or answer messages such as ``[{"role": "user", "content": "Hello"}]``.

        Raises:
            UsageError: messages for a base model, or a prompt that does not fit the context.
        """
        from qwenq.runtime.sampling import Sampling

        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.chat(list(prompt))
        found = self.engine.generate(
            [ids],
            max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            stop_ids=self.tokenizer.eos_ids,
        )
        return self.tokenizer.decode(found.answers[0].ids)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return float32 logits [tokens, vocabulary] after every token of ``ids``."""
        return self.engine.logits([ids])[0]

    def chat(
        self,
        system: str | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Conversation:
        """Begin a conversation; its ``ask(question)`` yields the answer piece by piece.

        Args:
            system: the system message; None: the chat template's own.
            max_new_tokens: of an answer; None: 512, or 32768 where the model thinks.
            temperature, top_p: None: 0.7 and 0.8, or 0.6 and 0.95 where the model thinks.
            seed: of the random numbers.

        Raises:
            UsageError: a base model.
        """
        from qwenq.runtime.chat import ANSWER, THOUGHTS, Conversation, Session
        from qwenq.runtime.sampling import Sampling

        tokens, heat, mass = (THOUGHTS, 0.6, 0.95) if self.thinking else (ANSWER, 0.7, 0.8)
        sampling = Sampling(
            temperature=heat if temperature is None else temperature,
            top_p=mass if top_p is None else top_p,
            seed=seed,
        )
        return Conversation(
            Session(self.engine),
            self.tokenizer,
            system=system,
            sampling=sampling,
            max_new_tokens=tokens if max_new_tokens is None else max_new_tokens,
        )


def load(
    model: Name | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    engine: Literal["fast", "transformers"] = "fast",
    kernel: str = "auto",
    attention: str = "auto",
    head: Literal["as-is", "int8"] = "as-is",
    thinking: Literal["auto", "on", "off"] = "auto",
    for_chat: bool = False,
    progress: Progress = True,
) -> LoadedModel:
    """Load a model, quantised or not, to run it; None is the bundled one. The options are `qwenq chat`'s.

    Args:
        for_chat: refuse a base model before its weights are read.

    Raises:
        QwenqError: no such model, device, kernel, …, or not enough memory.
    """
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import model_name, precision_of
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import resolve_model
    from qwenq.models.tokenizer import load_tokenizer
    from qwenq.runtime import engine as engines
    from qwenq.runtime.chat import require_chat, thinking_in_chat

    resolve_device(device)  # before a download
    given = None if model is None else str(model)
    with _shown(progress) as listener:
        resolved = resolve_model(given)
        _notify(listener, resolved.notices)
        tokenizer, thinks = load_tokenizer(resolved.folder), False
        if for_chat:
            require_chat(tokenizer)
        if tokenizer.template is not None or thinking != "auto":
            tokenizer, thinks = thinking_in_chat(tokenizer, thinking)
        checkpoint = open_checkpoint(resolved.folder)
        _notify(listener, checkpoint.notices)
        runner = engines.load(
            checkpoint,
            device=device,
            dtype=dtype,
            engine=engine,
            kernel=kernel,
            attention=attention,
            head=head,
            real_vocab=tokenizer.vocab_size,
        )
        _notify(listener, runner.notes)
    return LoadedModel(model_name(given), precision_of(checkpoint, runner.dtype), runner, tokenizer, thinks)


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

    base = None if against is None else str(against)
    options = {"samples": samples, "seq_len": seq_len, "device": device, "dtype": dtype, "seed": seed}
    with _shown(progress) as listener:
        return check_folders(str(quantised), base, text=str(text), listener=listener, **options).result  # type: ignore[arg-type]


@dataclass(frozen=True)
class Results:
    """Rows of a run folder.

    Attributes:
        rows: one for each figure, see ``qwenq.results.Row``.
        folder: the run folder; ``qwenq.report`` and ``qwenq.compare`` read it.
        kept: points of a sweep that had been measured before.
    """

    rows: list[Row] = field(default_factory=list)
    folder: Path = field(default_factory=Path)
    kept: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_pandas(self) -> pd.DataFrame:
        """Return a data frame: one line a row, its point (task, context, …) as columns."""
        import pandas as pd

        kept = ("metric", "value", "unit", "low", "high", "n", "status", "reason")
        return pd.DataFrame(
            {
                "model": row.model.name,
                "precision": row.model.precision,
                **{name: getattr(row, name) for name in kept[:1]},
                **row.point,
                **{name: getattr(row, name) for name in kept[1:]},
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
    from qwenq.evals.suite import open_and_evaluate, request_of, run_folder
    from qwenq.recipe import EvalRecipe, Recipe

    given, chosen_tasks = _names(models), (tasks,) if isinstance(tasks, str) else tuple(tasks)
    _require_alone(endpoint, models, model)
    asked: dict[str, Any] = {"tasks": chosen_tasks, "subjects": tuple(subjects)}
    asked |= {"protocol": protocol, "thinking": thinking, "dtype": dtype, "sample": sample, "limit": limit}
    asked |= {"shots": shots, "max_new_tokens": max_new_tokens, "data": None if data is None else str(data)}
    chosen = Recipe().override(eval=asked).eval or EvalRecipe()
    wanted = request_of(chosen, batch, unsafe_code=unsafe_code)
    served = None if endpoint is None else (endpoint, model)
    folder = run_folder(out, given, served and (model or "served"))
    how, team = LoadOptions(device, dtype, engine, attention, kernel, thinking), team or ALONE
    with _shown(progress if team.is_rank0 else False) as listener:
        rows = open_and_evaluate(served or given, wanted, how, folder, listener, command, team)
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
            "--endpoint is about the server's model alone",
            where="--endpoint",
            hint="name it with --model; local models can go into the same --out in another command",
        )


PRECISIONS = ("fp32", "bf16", "int8", "int4")


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
    from qwenq.profiling.spec import lengths_of, require_known, subjects_of
    from qwenq.profiling.sweep import sweep_models
    from qwenq.recipe import ProfileRecipe, Recipe
    from qwenq.storage import locked

    asked: dict[str, Any] = {"tokens": tuple(tokens), "encode": tuple(encode), "budget": budget}
    asked |= {"attention": tuple(attention), "engine": tuple(engine)}
    chosen = Recipe().override({"weights": weights}, profile=asked).profile or ProfileRecipe()
    seconds = parse_budget(chosen.budget) if chosen.budget else None
    _require_alone(endpoint, models, model)
    with _shown(progress) as listener:
        if endpoint is not None:
            named = "served" if tuple(precision) == PRECISIONS else ",".join(precision)
            load = tuple(concurrency), input, output
            return _profile_served(endpoint, model, named, load, seconds, out, listener, command)
        how: dict[str, Any] = {"attentions": chosen.attention, "engines": chosen.engine, "kernel": kernel}
        how |= {"tp": tp, "lengths": lengths_of(context, chosen.tokens, chosen.encode)}
        require_known(chosen.attention, chosen.engine, kernel)
        found = subjects_of(_names(models), precision, weights, seed)
        folder = Path("runs") / f"profile-{'-'.join(found.shapes)}" if out is None else Path(out)
        rows, kept = sweep_models(found, how, device, seconds, folder, listener, command)
        with locked(folder):
            record_checks([(each.given, each.model) for each in found.subjects], folder, listener)
    return Results(rows, folder, kept)


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


def report(
    runs: Name | Sequence[Name],
    out: Name,
    title: str | None = None,
    cards: Sequence[Name] | None = None,
) -> Path:
    """Write the model card's tables, one page and plots from run folders; return the page.

    Args:
        runs: run folders.
        out: the folder to write.
        title: of the page.
        cards: quantised folders whose model cards get the tables and plots; None: those that commands of the
            runs name, if they were made on the command line.

    Raises:
        QwenqError: a run folder cannot be read, ``out`` holds something other than a report, or a card has no
            place for it.
    """
    from qwenq.publishing.measured import fill_cards
    from qwenq.reporting.write import write_report

    folders = [Path(name) for name in _names(runs) if name]
    page = write_report(folders, Path(out), title)
    fill_cards(folders, page, None if cards is None else [Path(name) for name in cards])
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
    chosen = choose_baseline(Path(baseline), Path(new))
    sides = [[Path(run) for run in side] for side in ([chosen.folder, *more_baseline], [new, *more_new])]
    places = [run.resolve() for side in sides for run in side]
    if twice := [run for run in (*sides[0], *sides[1]) if places.count(run.resolve()) > 1]:
        raise UsageError("this run is named twice", where=twice[-1], hint="name each run folder once")
    read = []
    with _shown(progress) as listener:
        if chosen.folder != Path(baseline):
            why = "of the same machine" if chosen.same_machine else "no baseline is of this machine"
            listener(Notice(f"compared with {chosen.folder}: {why}"))
        for number, (first, *more) in enumerate(sides):
            run, turns = collect([first]), collect(more) if more else None
            for name in idle_repeats(run, turns):
                listener(Notice(f"{name} adds no repeat to {first}: {_NO_REPEAT}"))
            read.append(with_repeats(run, turns, judged=number == 1))
    return judge(compare_rows(*read), conditions, strict=fail_on is not None)


_NO_REPEAT = "it has no speed, time, memory or energy of the same weights at the same point on that machine"


def plan(
    model: Name | None = None,
    *,
    bits: Sequence[int] = (4, 8),
    context: int = 8192,
    batch: int = 1,
    gpus: Sequence[str] = ("a100-80g",),
    tensor_parallel: Sequence[int] = (1, 2, 4, 8),
    group_size: int | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
) -> Plan:
    """Compute what a model needs before anything is downloaded: bytes, memory, bounds of its speed.

    Args:
        model: a catalogue name such as "qwen3-8b", a folder or a hub id; None is the bundled model.
        samples, seq_len: of calibration; None: what `qwenq.quantize` takes there, as far as memory goes.

    Raises:
        QwenqError: no such model or GPU; the nearest names are suggested.
    """
    from qwenq.planner.estimates import gpu
    from qwenq.planner.plan import PlanOptions, find_model, make_plan

    options = PlanOptions(
        bits=tuple(bits),
        context=context,
        batch=batch,
        gpus=tuple(map(gpu, gpus)),
        tensor_parallel=tuple(tensor_parallel),
        group_size=group_size,
        samples=samples,
        seq_len=seq_len,
    )
    return make_plan(find_model(None if model is None else str(model)), options)


def convert(
    source: Name,
    target: Name,
    *,
    zeros: Literal["v1", "v2"] | None = None,
    to: Literal["compressed-tensors"] | None = None,
    store_head: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = True,
) -> Converted:
    """Rewrite a model in another layout: Qwen v1 as Qwen2, GPTQ zero points v1 ↔ v2, other shards.

    ``to`` and ``store_head`` are the options of `qwenq convert`.

    Raises:
        QwenqError: the source is damaged, or the target holds something.
    """
    from qwenq.conversion import convert as run
    from qwenq.models.opening import resolve_model

    resolved = resolve_model(str(source))
    with _shown(progress) as listener:
        for notice in resolved.notices:
            listener(Notice(notice))
        return run(
            resolved.folder,
            Path(target),
            zeros=zeros,
            to=to,
            store_head=store_head,
            max_shard_bytes=max_shard_bytes,
            listener=listener,
        )


def calibrate(
    model: Name | None = None,
    out: Name | None = None,
    *,
    source: Name = "self",
    samples: int | Literal["auto"] | None = None,
    seq_len: int | Literal["auto"] | None = None,
    held_out: int | None = None,
    seed: int = 0,
    split: str | None = None,
    column: str | None = None,
    thinking: Literal["auto", "on", "off"] = "auto",
    weights: Literal["stored", "random"] = "stored",
    device: str = "auto",
    force: bool = False,
    progress: Progress = True,
) -> CalibrationSet:
    """Make a calibration set for a model once, to share between quantisations; save it to ``out`` if given.

    Args:
        weights: "random": tokens are drawn at random, as random weights have no tokenizer.
        force: overwrite a different file. One that holds these very tokens is kept, and returned.

    Raises:
        QwenqError: no such text, or too little of it; ``out`` holds something else.
    """
    from qwenq.calibration.calibration_set import require_writable, save_or_keep
    from qwenq.calibration.load import random_set
    from qwenq.recipe import Recipe

    if out is not None:
        require_writable(Path(out))
    text: dict[str, Any] = {
        "source": str(source),
        "samples": samples,
        "seq_len": seq_len,
        "held_out": held_out,
    }
    text |= {"split": split, "column": column, "thinking": thinking}
    Recipe().override({"weights": weights}, calibration=text, quantize={"seed": seed})  # all in range
    sizes = {key: None if text[key] == "auto" else text[key] for key in ("samples", "seq_len", "held_out")}
    options: dict[str, Any] = {"seed": seed, "split": split, "column": column, **sizes}
    with _shown(progress) as listener:
        make = random_set if weights == "random" else partial(_text_tokens, thinking, device)
        made = make(None if model is None else str(model), str(source), listener, **options)
        if out is not None:
            made = save_or_keep(made, Path(out), force=force)
        for notice in made.manifest.notices:
            listener(Notice(notice))
    return made


def _text_tokens(
    thinking: str, device: str, model: str | None, source: str, listener: Listener, **options: Any
) -> CalibrationSet:
    from qwenq.calibration import load_calibration
    from qwenq.calibration.load import calibration_tokenizer
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import open_model

    device = str(resolve_device(device))
    checkpoint = open_model(model)
    tokenizer = calibration_tokenizer(checkpoint.folder, thinking)
    for notice in checkpoint.notices:
        listener(Notice(notice))
    step = "writing text" if source == "self" else "reading text"
    with counted(listener, step, "tokens") as update:
        return load_calibration(
            source, checkpoint=checkpoint, tokenizer=tokenizer, device=device, progress=update, **options
        )
