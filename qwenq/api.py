"""Offer every command of qwenq as a function: ``import qwenq`` re-exports what is public here.

The functions have the defaults, the checks and the errors (``qwenq.errors``) of the command line.
``progress`` is True (a bar in a terminal or a notebook, notices as lines), False, or a function that receives
the events of ``qwenq.events``. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwenq.events import Listener, Notice, ProgressBar, counted, silent

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from qwenq.calibration import CalibrationSet
    from qwenq.conversion import Converted
    from qwenq.evals.check import CheckResult
    from qwenq.models.chatml import Message
    from qwenq.models.tokenizer import Tokenizer
    from qwenq.planner.plan import Plan
    from qwenq.profiling.spec import Subjects
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


def _names(models: Name | Sequence[Name] | None) -> list[str | None]:
    """Return names as the command line has them: each once; None is the bundled model."""
    if models is None:
        return [None]
    given = [models] if isinstance(models, str | Path) else models
    return list(dict.fromkeys(str(name) for name in given))


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
    text = {"source": calibration and str(calibration), "samples": samples, "seq_len": seq_len}
    top = {"model": model and str(model), "weights": weights}
    chosen = base.override(top, calibration=text, quantize=settings)
    with _shown(progress) as listener:
        return run(chosen, Path(out) if out else None, listener, device=device, resume=resume)


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        engine: runs the network; ``engine.implementation`` names the kernels.
        tokenizer: of the same model.
        thinking: whether it thinks before it answers, by its chat template's default.
    """

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
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.8,
        seed: int = 0,
    ) -> Conversation:
        """Begin a conversation; its ``ask(question)`` yields the answer piece by piece.

        Raises:
            UsageError: a base model.
        """
        from qwenq.runtime.chat import Conversation, Session
        from qwenq.runtime.sampling import Sampling

        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        session = Session(self.engine)
        return Conversation(
            session, self.tokenizer, system=system, sampling=sampling, max_new_tokens=max_new_tokens
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
    progress: Progress = True,
) -> LoadedModel:
    """Load a model, quantised or not, to run it; None is the bundled one. The options are `qwenq chat`'s.

    Raises:
        QwenqError: no such model, device, kernel, …, or not enough memory.
    """
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import resolve_model
    from qwenq.models.tokenizer import load_tokenizer
    from qwenq.runtime import engine as engines
    from qwenq.runtime.chat import thinking_in_chat

    resolve_device(device)  # before a download
    resolved = resolve_model(None if model is None else str(model))
    tokenizer, thinks = load_tokenizer(resolved.folder), False
    if tokenizer.template is not None or thinking != "auto":
        tokenizer, thinks = thinking_in_chat(tokenizer, thinking)
    checkpoint = open_checkpoint(resolved.folder)
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
    with _shown(progress) as listener:
        for notice in (*resolved.notices, *checkpoint.notices, *runner.notes):
            listener(Notice(notice))
    return LoadedModel(runner, tokenizer, thinks)


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
    protocol: Literal["card", "base", "lm-eval"] | None = None,
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
    out: Name | None = None,
    progress: Progress = True,
) -> Results:
    """Evaluate models on benchmarks; quantised ones are compared with their base where it is among them.

    The options are those of `qwenq eval`. Answers are recorded in ``out`` (default: runs/NAME): the same call
    continues where it was stopped, and asks nothing twice.

    Raises:
        QwenqError: an unknown task, missing data, no sandbox, a model that cannot be read.
    """
    from qwenq.errors import UsageError
    from qwenq.evals.model import LoadOptions, open_eval_model
    from qwenq.evals.suite import EvalRequest
    from qwenq.evals.suite import evaluate as run
    from qwenq.evals.task import DataSource
    from qwenq.models.identity import model_name

    if data is not None and sample:
        raise UsageError("data and sample exclude each other", hint="give one of them")
    given = _names(models)
    wanted = EvalRequest(
        tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks),
        protocol=protocol,
        subjects=tuple(subjects),
        shots=shots,
        limit=limit,
        max_new_tokens=max_new_tokens,
        source=DataSource(None if data is None else Path(data), sample),
        batch=batch,
        unsafe_code=unsafe_code,
    )
    folder = Path("runs") / model_name(given[0]) if out is None else Path(out)
    how = LoadOptions(device, dtype, engine, attention, kernel, thinking)
    with _shown(progress) as listener:
        opened = [open_eval_model(name, how) for name in given]
        for notice in dict.fromkeys(notice for one in opened for notice in one.notices):
            listener(Notice(notice))
        return Results(run(opened, wanted, folder, listener, "qwenq.evaluate"), folder)


def profile(
    models: Name | Sequence[Name] | None = None,
    *,
    tokens: Sequence[int] = (2048,),
    context: Sequence[int] = (1,),
    encode: Sequence[int] = (2048,),
    precision: Sequence[str] = ("fp32", "bf16", "int8", "int4"),
    attention: Sequence[str] = ("auto",),
    engine: Sequence[str] = ("fast",),
    kernel: str = "auto",
    device: str = "auto",
    weights: Literal["stored", "random"] = "stored",
    seed: int = 0,
    budget: str | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    concurrency: Sequence[int] = (1, 4, 16, 64),
    input: int = 512,
    output: int = 128,
    out: Name | None = None,
    progress: Progress = True,
) -> Results:
    """Measure speed and memory, each point in a process of its own. The options are `qwenq profile`'s.

    Args:
        endpoint: an OpenAI-compatible server, whose ``model`` is measured instead, by streamed requests at
            each ``concurrency``; a single ``precision`` names what it computes in. Other options of models
            that are measured here have no effect then.

    Raises:
        QwenqError: an unknown model, precision, attention or engine; nothing to measure.
    """
    from qwenq.profiling.planning import parse_budget
    from qwenq.profiling.spec import lengths_of, require_known, subjects_of

    seconds = parse_budget(budget) if budget else None
    if endpoint is not None:
        load = tuple(concurrency), input, output
        named = "served" if len(precision) != 1 else precision[0]
        return _profile_served(models, endpoint, model, named, load, seconds, out, progress)
    lengths = lengths_of(context, tokens, encode)
    require_known(attention, engine, kernel)
    found = subjects_of(_names(models), precision, weights, seed)
    folder = Path("runs") / f"profile-{'-'.join(found.shapes)}" if out is None else Path(out)
    choices = {"attentions": attention, "engines": engine, "lengths": lengths, "kernel": kernel}
    return _profile_here(found, choices, device, seconds, folder, progress)


def _profile_here(
    found: Subjects,
    choices: dict[str, Any],
    device: str,
    seconds: float | None,
    folder: Path,
    progress: Progress,
) -> Results:
    from qwenq.environment import environment
    from qwenq.profiling.child import probe
    from qwenq.profiling.planning import plan, read_device
    from qwenq.profiling.spec import sweep
    from qwenq.profiling.sweep import run_sweep
    from qwenq.results import read_rows
    from qwenq.storage import locked

    with _shown(progress) as listener, locked(folder):
        for notice in found.notices:
            listener(Notice(notice))
        place = read_device(probe(device))
        points = sweep(found.subjects, device=place.device, **choices)
        planned = plan(points, found.shapes, place)
        run_sweep(
            planned, folder, listener, budget=seconds, environment=environment(), command="qwenq.profile"
        )
    wanted = [(each.point.place, each.point.subject.model) for each in planned]
    return Results([row for row in read_rows(folder) if (row.point, row.model) in wanted], folder)


def _profile_served(
    models: Name | Sequence[Name] | None,
    endpoint: str,
    model: str | None,
    precision: str,
    load: tuple[tuple[int, ...], int, int],
    budget: float | None,
    out: Name | None,
    progress: Progress,
) -> Results:
    from qwenq.environment import environment
    from qwenq.errors import UsageError
    from qwenq.profiling.served import Load, find_target, profile_served
    from qwenq.storage import locked

    if models is not None:
        raise UsageError("endpoint measures the server's model alone", hint="name it with model=")
    with _shown(progress) as listener:
        target = find_target(endpoint, model, os.environ.get("OPENAI_API_KEY"), listener, precision=precision)
        folder = Path("runs") / f"served-{target.model.name}" if out is None else Path(out)
        facts, command = environment(), "qwenq.profile"
        with locked(folder):
            rows = profile_served(
                target, Load(*load), folder, listener, environment=facts, budget=budget, command=command
            )
    return Results(rows, folder)


def report(runs: Name | Sequence[Name], out: Name, title: str | None = None) -> Path:
    """Write the model card's tables, one page and plots from run folders; return the page.

    Raises:
        QwenqError: a run folder cannot be read, or ``out`` holds something other than a report.
    """
    from qwenq.reporting.write import write_report

    return write_report([Path(name) for name in _names(runs) if name], Path(out), title)


def compare(baseline: Name, new: Name, *, fail_on: str | None = None) -> Verdict:
    """Say which differences between two run folders are real.

    Args:
        baseline, new: run folders.
        fail_on: conditions as in "accuracy:significant, speed:<0.95"; None: the default of `qwenq compare`.

    Returns:
        The verdict: ``headline`` in a sentence, ``exit_code`` 0 where nothing got worse.

    Raises:
        UsageError: a condition or a run folder cannot be read.
    """
    from qwenq.errors import UsageError
    from qwenq.reporting.collect import collect
    from qwenq.reporting.compare import compare as compare_rows
    from qwenq.reporting.gate import asked_by, judge

    if Path(baseline).resolve() == Path(new).resolve():
        raise UsageError("this run is named twice", where=new, hint="name each run folder once")
    conditions = asked_by(fail_on)
    rows = compare_rows(collect([Path(baseline)]), collect([Path(new)]))
    return judge(rows, conditions, strict=fail_on is not None)


def plan(
    model: Name | None = None,
    *,
    bits: Sequence[int] = (4, 8),
    context: int = 8192,
    batch: int = 1,
    gpus: Sequence[str] = ("a100-80g",),
    tensor_parallel: Sequence[int] = (1, 2, 4, 8),
    group_size: int | None = None,
    samples: int = 48,
    seq_len: int = 256,
) -> Plan:
    """Compute what a model needs before anything is downloaded: bytes, memory, bounds of its speed.

    Args:
        model: a catalogue name such as "qwen3-8b", a folder or a hub id; None is the bundled model.

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
    samples: int | None = None,
    seq_len: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    split: str | None = None,
    column: str | None = None,
    thinking: Literal["auto", "on", "off"] = "auto",
    device: str = "auto",
    progress: Progress = True,
) -> CalibrationSet:
    """Make a calibration set for a model once, to share between quantisations; save it to ``out`` if given.

    Raises:
        QwenqError: no such text, or too little of it.
    """
    from qwenq.calibration import load_calibration
    from qwenq.calibration.load import calibration_tokenizer
    from qwenq.models.machine import resolve_device
    from qwenq.models.opening import open_model

    place = str(resolve_device(device))
    checkpoint = open_model(None if model is None else str(model))
    with _shown(progress) as listener:
        for notice in checkpoint.notices:
            listener(Notice(notice))
        label = "writing text" if str(source) == "self" else "reading text"
        with counted(listener, label, "tokens") as update:
            made = load_calibration(
                str(source),
                checkpoint=checkpoint,
                tokenizer=calibration_tokenizer(checkpoint.folder, thinking),
                samples=samples,
                seq_len=seq_len,
                held_out=held_out,
                seed=seed,
                split=split,
                column=column,
                device=place,
                progress=update,
            )
        for notice in made.manifest.notices:
            listener(Notice(notice))
    if out is not None:
        made.save(Path(out))
    return made
