"""A plan as rich tables, for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from rich import box
from rich.console import RenderableType
from rich.table import Table

from qwenq.plan.memory import GIB
from qwenq.plan.plan import Plan
from qwenq.plan.published import CONTEXT

_QUANTISATION_PARTS = {
    "block": "one block's weights",
    "hessians": "Hessians of its four inputs, float32",
    "solver": "solver: largest module and two factors",
    "activations": "calibration tokens, before and after",
    "block_activations": "inside the block, one sequence",
    "embedding": "embedding (first block only)",
    "peak": "peak",
}


def plan_tables(plan: Plan, *, show_padding: bool = False) -> Iterator[RenderableType]:
    """The parts of the answer, in reading order."""
    shape = plan.shape
    yield (
        f"[bold]{plan.model}[/bold] ({plan.origin}): {plan.parameters:,} parameters, {shape.layers} layers, "
        f"hidden {shape.hidden}, {shape.heads} heads / {shape.kv_heads} key-value heads of {shape.head_dim}, "
        f"FFN {shape.ffn}, vocabulary {shape.vocab}{', tied head' if shape.tied else ''}"
    )
    if shape.context is not None and plan.wishes.context > shape.context:
        yield f"[yellow]{plan.wishes.context} tokens: the model promises {shape.context} at most[/yellow]"
    yield _disk(plan)
    yield _generation(plan)
    if plan.published_peaks:
        yield _published(plan)
    yield _quantisation(plan)
    if plan.deployments:
        yield from _deployments(plan)
    yield from _padding(plan, show_padding)


def _disk(plan: Plan) -> Table:
    table = _table("On disk (tensor bytes)", "precision", "group size", "bytes", "GiB", "published file")
    for item in plan.precisions:
        group = "" if item.group_size is None else str(item.group_size)
        published = "" if item.published_bytes is None else f"{item.published_bytes:,} (*)"
        table.add_row(item.label, group, f"{item.bytes:,}", _gib(item.bytes), published)
    notes = {item.published_note for item in plan.precisions if item.published_note}
    table.caption = "; ".join(f"(*) {note}" for note in sorted(notes)) or None
    return table


def _generation(plan: Plan) -> Table:
    wishes = plan.wishes
    table = _table(
        f"Memory, GiB: {wishes.context} tokens of context, batch {wishes.batch}",
        *("precision", "weights", "load", "KV cache", "prefill", "decode", "peak", "peak from 1 token"),
        "two-copies peak",
    )
    for label, memory in plan.generation.items():
        parts = (
            memory.weights,
            memory.load,
            memory.kv_cache,
            memory.prefill_activations,
            memory.decode_activations,
            memory.peak,
            memory.decode_peak,
            memory.two_copies_peak,
        )
        table.add_row(label, *(_gib(part) for part in parts))
    table.caption = (
        "peak: weights + one copy of the cache + activations (today's caches). "
        "two-copies peak: weights + 2 × cache, the tuple cache of the 2023 cards"
    )
    return table


def _published(plan: Plan) -> Table:
    title = f"Two-copies cache model against the published cards, {CONTEXT} tokens, GiB"
    table = _table(title, "precision", "model", "published", "deviation")
    for row in plan.published_peaks:
        table.add_row(
            row.precision, f"{row.predicted_gib:.2f}", f"{row.published_gib:.2f}", f"{row.deviation:+.1%}"
        )
    first = plan.published_peaks[0]
    table.caption = f"{first.source}; {first.hardware}"
    return table


def _quantisation(plan: Plan) -> Table:
    wishes = plan.wishes
    title = f"Memory while quantising, GiB: {wishes.samples} × {wishes.seq_len} calibration tokens"
    table = _table(title, "part", "GiB")
    for part in fields(plan.quantisation):
        size = getattr(plan.quantisation, part.name)
        table.add_row(_QUANTISATION_PARTS[part.name], _gib(size), style="bold" if part.name == "peak" else "")
    table.caption = "block by block; the rest of the model stays on disk"
    return table


def _deployments(plan: Plan) -> Iterator[Table]:
    for gpu in plan.wishes.gpus:
        table = _table(
            f"{gpu.title}: {gpu.memory_gib:g} GiB, {gpu.bandwidth_gb_s:,.0f} GB/s",
            *("precision", "GPUs", "possible", "GiB per GPU", "fits"),
            *("tok/s, empty cache", f"tok/s at {plan.wishes.context}"),
        )
        for row in plan.deployments:
            if row.speed.gpu != gpu.name:
                continue
            possible = "yes" if row.split.possible else "no: " + ", ".join(row.split.obstacles)
            figures = (
                (f"{row.speed.empty:,.0f}", f"{row.speed.full:,.0f}") if row.split.possible else ("", "")
            )
            fits = ("yes" if row.fits else "[red]no[/red]") if row.split.possible else ""
            table.add_row(row.precision, str(row.split.gpus), possible, _gib(row.memory), fits, *figures)
        table.caption = f"upper bound: bytes read per token over peak bandwidth. {gpu.source}"
        yield table


def _padding(plan: Plan, wanted: bool) -> Iterator[RenderableType]:
    found = plan.padding
    if found is None:
        if wanted:
            yield "--pad-ffn would change nothing: the MLP's groups can be shared wherever the rest can."
        return
    summary = (
        f"FFN {found.ffn} → {found.to}: {found.groups_before} → {found.groups_after} groups, "
        f"GPUs {_list(found.possible_before)} → {_list(found.possible_after)}"
    )
    if not wanted:
        yield f"--pad-ffn would help: {summary}"
        return
    table = _table(f"--pad-ffn: {summary}", "precision", "bytes", "padded", "change")
    for item in plan.precisions:
        padded = plan.padded_bytes[item.label]
        table.add_row(item.label, f"{item.bytes:,}", f"{padded:,}", f"{padded / item.bytes - 1:+.2%}")
    zeros = found.to - found.ffn
    table.caption = (
        f"one zero channel after each of the first {zeros} channels, {found.parameters:,} parameters more; "
        "the model's output stays the same"
    )
    yield table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", caption_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or column == "possible" else "right")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"
