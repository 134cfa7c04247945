"""Print a plan: the answer in a sentence for each GPU, then rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwenq.planner.estimates import GIB, Gpu
from qwenq.planner.plan import Deployment, Plan, Quantisation

_QUANTISATION_PARTS = {
    "process": "libraries",
    "block": "one block's weights",
    "file": "pages of the file that they are read from",
    "hessians": "Hessian, its factors and asymmetric calibration, float32",
    "weights": "weights that share an input, float32, twice",
    "activations": "calibration tokens between blocks",
    "block_activations": "calibration tokens inside the block",
    "embedding": "embedding (first block only)",
    "peak": "peak",
}


def plan_tables(plan: Plan) -> Iterator[RenderableType]:
    """Yield the parts of the answer, in reading order."""
    shape = plan.shape
    yield from (Text(line, style="bold") for line in answer(plan))
    yield ""
    yield f"[bold]{escape(plan.model)}[/bold] ({escape(plan.origin)}): {_sizes(plan)}"
    if shape.context is not None and plan.options.context > shape.context:
        yield f"[yellow]{plan.options.context} tokens: the model is made for {shape.context}[/yellow]"
    yield _disk(plan)
    yield _generation(plan)
    yield from (_quantisation(each) for each in plan.quantisation)
    if plan.deployments:
        yield from _deployments(plan)


def _sizes(plan: Plan) -> str:
    """Return the sizes of a model in words."""
    shape = plan.shape
    parts = [f"{plan.parameters:,} parameters"]
    if plan.active_parameters != plan.parameters:
        parts[0] += f", {plan.active_parameters:,} of them active"
    attending = sum(len(block.layers) for block in shape.blocks if block.attends)
    attention = f"{shape.heads} heads / {shape.kv_heads} key-value heads of {shape.head_dim}"
    if (linear := shape.linear_attention) is not None:
        attention += f" in {attending} layers, linear attention of {linear.value_heads} heads in the others"
    parts += [f"{shape.layers} layers", f"hidden {shape.hidden}", attention]
    if (experts := shape.experts) is not None:
        parts.append(f"{experts.active} of {experts.count} experts of {experts.width}")
        if experts.shared_width:
            parts.append(f"a shared one of {experts.shared_width}")
    if shape.ffn and (experts is None or experts.dense_layers):
        parts.append(f"FFN {shape.ffn}")
    return ", ".join([*parts, f"vocabulary {shape.vocab}{', tied head' if shape.tied else ''}"])


def _disk(plan: Plan) -> RenderableType:
    rows = []
    for item in plan.precisions:
        group = "" if item.group_size is None else str(item.group_size)
        published = "" if item.published_bytes is None else f"{item.published_bytes:,} (*)"
        rows.append((item.label, group, f"{item.bytes:,}", _gib(item.bytes), published))
    notes = {f"(*) {item.published_note}" for item in plan.precisions if item.published_note}
    if plan.copied_note:
        size = f"{_gib(plan.copied_bytes)} GiB " if plan.copied_bytes else ""
        notes.add(f"{size}{plan.copied_note}")
    if plan.shape.linear_attention is not None and any(item.label == "Int4" for item in plan.precisions):
        notes.add("linear attention has 8 bits in Int4, too")
    columns = ("precision", "group size", "bytes", "GiB", "published file")
    return _section("On disk (tensor bytes)", columns, rows, "; ".join(sorted(notes)))


def _generation(plan: Plan) -> RenderableType:
    options = plan.options
    cache = "cache" if plan.shape.linear_attention else "KV cache"
    columns = ("precision", "weights", "load", cache, "prefill", "decode", "peak", "peak from 1 token")
    rows = []
    for label, memory in plan.generation.items():
        parts = (
            memory.weights,
            memory.load,
            memory.kv_cache + memory.states,
            memory.prefill_activations,
            memory.decode_activations,
            memory.peak,
            memory.decode_peak,
        )
        rows.append((label, *map(_gib, parts)))
    note = "peak: weights, one copy of the cache, activations"
    if plan.shape.linear_attention is not None:
        memory = plan.generation[plan.precisions[-1].label]
        states = f"{_gib(memory.states)} GiB are recurrent states"
        note += f"; of the cache, {states}, which do not grow with the context"
    if plan.shape.experts is not None and not plan.deployments:  # else each GPU's table says so
        note += f". {_active(plan)}"
    title = f"Memory, GiB: {options.context} tokens of context, batch {options.batch}"
    return _section(title, columns, rows, note)


def answer(plan: Plan) -> Iterator[str]:
    """Yield a sentence whether the model can be quantised, and one whether it runs in the fewest bits."""
    smallest = plan.precisions[-1].label
    for each in plan.quantisation:
        if each.gpu is None:
            yield f"Quantising on this machine's CPU: {_quantising(each, 'RAM')}. Name a GPU with --gpu."
            memory = plan.generation[smallest].peak / GIB
            yield f"Running {smallest}: {memory:.1f} GiB of memory at {plan.options.context} tokens."
            continue
        gpu = next(gpu for gpu in plan.options.gpus if gpu.name == each.gpu)
        yield f"Quantising on {gpu.title}: {_quantising(each, 'GPU memory', gpu)}."
        for row in plan.deployments:
            if (row.speed.gpu, row.precision) == (gpu.name, smallest):
                yield _running(row, gpu, plan.options.context)


def _time(quantisation: Quantisation, gpu: Gpu | None) -> str:
    """Return the estimated time of quantising and what it rests on, or why there is none."""
    if (hours := quantisation.hours) is None:
        measured = gpu is not None and gpu.quantising_tflops is not None
        why = "on this GPU only dense models were timed" if measured else "this GPU was not timed"
        return f"; no time estimate: {why}"
    length = f"{hours:.1f} hours" if hours >= 1.5 else f"{max(1, round(60 * hours))} min"
    basis = (
        " on two cores of an AMD EPYC" if quantisation.gpu is None else ", from a 7B model timed on this GPU"
    )
    return f"; estimated time: {length}{basis}"


def _quantising(each: Quantisation, kind: str, gpu: Gpu | None = None) -> str:
    """Return what quantising takes, of how much, and whether that fits."""
    size, of = each.size, f"GiB of {kind}"
    if size.limit is not None:
        of = f"of {round(size.limit / GIB, 1):g} {of}"
    needs = f"{size.memory.peak / GIB:.1f} {of} with {size.tokens}"
    if each.fits is None:
        return f"{needs}{_time(each, gpu)}"
    if each.fits:
        usual = size.usual
        more = f"; the usual {usual.tokens} need {usual.memory.peak / GIB:.1f}" if usual else ""
        return f"{needs}: fits{more}{_time(each, gpu)}"
    if each.fitting is None:
        return f"{needs}: does not fit, with any number of samples"
    samples, needed = each.fitting
    return f"{needs}: does not fit; `--samples {samples}` needs {needed / GIB:.1f} GiB"


def _running(row: Deployment, gpu: Gpu, context: int) -> str:
    count = row.split.gpus
    name = f"Running {row.precision}" + (f" on {count} GPUs" if count > 1 else "")
    if not row.split.possible:
        return f"{name}: not possible, as {', '.join(row.split.obstacles)} cannot be shared evenly."
    each = " each" if count > 1 else ""
    size = f"{row.memory / GIB:.1f} of {gpu.memory_gib:g} GiB{each}"
    if not row.fits:
        return f"{name}: {size}: does not fit at {context} tokens."
    return f"{name}: fits, {size}, at most {row.speed.full:,.0f} tokens/s at {context} tokens."


def _active(plan: Plan) -> str:
    """Return what a token reads of a mixture's weights, in each precision."""
    active = ", ".join(f"{item.label} {_gib(item.active)}" for item in plan.precisions)
    return f"Weights that a token reads, GiB: {active}"


def _quantisation(quantisation: Quantisation) -> RenderableType:
    kind = "RAM" if quantisation.gpu is None else "GPU memory"
    title = f"{kind} while quantising, GiB: calibration with {quantisation.size.tokens}"
    sizes = asdict(quantisation.size.memory)
    rows = [(_QUANTISATION_PARTS[part], _gib(size)) for part, size in sizes.items() if size or part != "file"]
    return _section(title, ("part", "GiB"), rows, "block by block; the rest of the model stays on disk")


def _deployments(plan: Plan) -> Iterator[RenderableType]:
    for gpu in plan.options.gpus:
        rates = ("tok/s, empty cache", f"tok/s at {plan.options.context}")
        columns = ("precision", "GPUs", "possible", "GiB per GPU", "fits", *rates)
        rows = []
        refused: dict[str, list[str]] = {}
        for row in plan.deployments:
            if row.speed.gpu != gpu.name:
                continue
            possible = "yes" if row.split.possible else "no"
            if not row.split.possible:
                why = f"{row.split.gpus} GPUs cannot share {', '.join(row.split.obstacles)} evenly"
                refused.setdefault(why, []).append(row.precision)
            figures = (
                (f"{row.speed.empty:,.0f}", f"{row.speed.full:,.0f}") if row.split.possible else ("", "")
            )
            fits = ("yes" if row.fits else "[red]no[/red]") if row.split.possible else ""
            rows.append((row.precision, str(row.split.gpus), possible, _gib(row.memory), fits, *figures))
        reasons = "".join(f"{', '.join(labels)}: {why}.\n" for why, labels in refused.items())
        note = f"{reasons}upper bound: bytes read per token over peak bandwidth. {gpu.source}"
        if plan.shape.experts is not None:
            note += f". {_active(plan)}"
        title = f"{gpu.title}: {gpu.memory_gib:g} GiB, {gpu.bandwidth_gb_s:,.0f} GB/s"
        yield _section(title, columns, rows, note)


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> RenderableType:
    """Return a table with a title above and a note below, which wrap at the width of the screen."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "possible" else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == "peak" else "")
    below = [Text(note + "\n", style="dim")] if note else []
    return Group(Text(title, style="bold"), table, *below)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"
