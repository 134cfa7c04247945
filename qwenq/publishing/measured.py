"""Fill the measured section of model cards from a report: tables, plots, scores of the model-index."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwenq.errors import ModelError, QwenqError, UsageError
from qwenq.events import Listener, Notice, silent
from qwenq.models.folders import CARD, CARD_PLOTS, MANIFEST
from qwenq.publishing.model_card import Measured, require_place, score, write_model_card
from qwenq.reporting.card import TASKS
from qwenq.reporting.collect import Collection, collect
from qwenq.reporting.losses import WORDS
from qwenq.reporting.report import Section, make_report
from qwenq.reporting.tables import Table
from qwenq.reporting.text import clean, markdown
from qwenq.reporting.write import PLOTS, environment_markdown, tables_markdown
from qwenq.storage import atomic_write_bytes

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_PLOT = re.compile(rf'<img src="{CARD_PLOTS}/([\w.-]+\.png)"')


def fill_cards(
    runs: Sequence[Path], page: Path, folders: Sequence[Path] | None = None, listener: Listener = silent
) -> list[Path]:
    """Write what a report shows into the cards of the quantised folders that its rows describe; return those.

    Args:
        runs, page: of the report, with its plots beside the page.
        folders: whose cards are filled; None: those that the rows' commands name, as far as they are there
            and their cards can be written.
        listener: receives a notice for each folder of a command whose card is left as it is.
    """
    collection = collect(list(runs))
    if folders is not None:
        return [_fill_card(folder, collection, page.parent / PLOTS) for folder in folders]
    written = []
    for folder in _named_folders(collection):
        try:
            written.append(_fill_card(folder, collection, page.parent / PLOTS))
        except (ModelError, UsageError) as error:  # a card that was edited; a full disk ends the command
            why = f"{error.what}; {error.hint}" if error.hint else error.what
            listener(Notice(f"the card of {folder} is left as it is: {why}"))
    return written


def _named_folders(collection: Collection) -> Iterator[Path]:
    """Yield folders that the rows' commands name and whose model the rows are of."""
    models = {(item.row.model.name, item.row.model.fingerprint) for item in collection.measured}
    commands = {str(item.row.details.get("command", "")) for item in collection.measured}
    words = set[str]()
    for command in commands:
        with suppress(ValueError):  # a quote that is not closed
            words |= set(shlex.split(command))
    for folder in sorted(Path(word) for word in words):
        with suppress(OSError, ValueError, QwenqError):
            if (folder / MANIFEST).is_file() and _identity(folder) in models:
                yield folder


def _identity(folder: Path) -> tuple[str, str]:
    """Return name and fingerprint of a folder's model, as its rows have them."""
    import torch

    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.identity import result_model

    found = result_model(open_checkpoint(folder), torch.float32, str(folder))
    return found.name, found.fingerprint


def _fill_card(folder: Path, collection: Collection, plots: Path) -> Path:
    """Write the card of one folder, and its plots beside it; plots that it showed before are removed."""
    require_place(folder)
    fingerprint = _identity(folder)[1]
    rows = [item for item in collection.measured if item.row.model.fingerprint == fingerprint]
    if not rows:
        raise UsageError(
            "none of these runs measured this model",
            where=folder,
            hint="name the run folders of its `qwenq eval` or `qwenq profile`",
        )
    model = rows[0].row.model
    family = tuple(item for item in collection.measured if item.row.model.family == model.family)
    runs = tuple(run for run in collection.runs if any(item.run is run for item in family))
    mine = Collection(runs, family)
    report = make_report(collection, "")
    section = report.sections[collection.families.index(model.family)]
    shown = [f"{section.slug}-{figure.key}.png" for figure in section.figures]
    before = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else ""
    text = _text(mine, section, collection.label(model), report.date)
    written = write_model_card(folder, measured=Measured(text, tuple(_scores(mine, fingerprint))))
    for name in shown:
        atomic_write_bytes(folder / CARD_PLOTS / name, (plots / name).read_bytes())
    for name in set(_PLOT.findall(before)) - set(_PLOT.findall(written.read_text(encoding="utf-8"))):
        (folder / CARD_PLOTS / name).unlink(missing_ok=True)
    return written


def _text(collection: Collection, section: Section, label: str, date: str) -> str:
    measured = f"Measured {date} with qwenq" if date else "Measured with qwenq"
    return "\n\n".join(
        [
            f"{measured}. In these tables this model is {markdown(label)}.",
            *tables_markdown(replace(section, tables=tuple(map(_narrow, section.tables))), "###"),
            *_plots(section),
            *environment_markdown(collection, "###"),
        ]
    )


def _narrow(table: Table) -> Table:
    """Return a table without the column of sentences: the summary has them, and a card is narrow."""
    kept = [index for index, header in enumerate(table.headers) if header != WORDS]
    labels = sum(index < table.labels for index in kept)
    lines = (replace(line, cells=tuple(line.cells[index] for index in kept)) for line in table.lines)
    headers = tuple(table.headers[index] for index in kept)
    return replace(table, headers=headers, labels=labels, lines=tuple(lines))


def _plots(section: Section) -> Iterator[str]:
    """Yield the plots, two beside each other: Markdown has no widths, so they are HTML."""
    if section.figures:
        yield "### Plots"
        yield "\n".join(
            f'<img src="{CARD_PLOTS}/{section.slug}-{figure.key}.png" width="49%" '
            f'alt="{html.escape(clean(figure.title))}">'
            for figure in section.figures
        )


def _scores(collection: Collection, fingerprint: str) -> Iterator[EvalResult]:
    """Yield the accuracies of one model; of several at one point the last."""
    found: dict[tuple[str, str, str], EvalResult] = {}
    for item in collection.measured:
        row = item.row
        if row.metric != "accuracy" or row.model.fingerprint != fingerprint or row.value is None:
            continue
        point = {key: value for key, value in row.point.items() if value is not None}
        task = clean(point.pop("task", "unknown"))
        name = ", ".join([TASKS.get(task, task), *([clean(point["data"])] if "data" in point else [])])
        config = clean(", ".join(f"{key} {value}" for key, value in point.items()))
        title = f"accuracy, percent of {row.n} items" if row.n else "accuracy, percent"
        dataset = task, name, config
        found[dataset] = score(dataset, ("accuracy", title), round(100 * row.value, 2))
    yield from found.values()
