"""Describe published sets of questions: where their rows lie, how many there are, how they become items."""

from __future__ import annotations

import difflib
import importlib.util
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import DataSource, Item
from qwenq.evals.tasks.files import AnyPath, Row, check_count, fetch_hub_file, read_hub, read_records

SAMPLE = Path(__file__).parents[1] / "sample"
"""The suite that ships with qwenq: items written for it, in the benchmarks' layouts."""


@dataclass(frozen=True)
class Dataset:
    """A published set of questions.

    A folder of ``--data`` holds it as ``files``, else as the hub's parquet files or archive. Without a folder
    it is read from the hub.
    """

    name: str  # of the benchmark
    # the checked item of a row; the subject is that of the file, None where rows name theirs. An item without
    # an id gets its subject, or the split, and its number there
    make: Callable[[Row, str | None], Item]
    # published number of scored rows by subject (None: unknown); without subjects by None
    counts: Mapping[str, int | None] | Mapping[None, int | None]
    hub: str  # id of its data set on the hub
    config: str | None = None  # configuration there; with ``{subject}`` there is one for each
    # original files, of which the first that is there counts; templates of split and subject
    files: tuple[str, ...] = ("{split}.jsonl",)
    read: Callable[[AnyPath], list[Row]] = read_records  # rows of one of these files
    split: str = "test"  # the scored one; on the hub several may be joined by ``+``
    examples: str = "dev"  # the split of the worked examples
    # a file of the hub that is read instead of its parquet files: an original, or a zip of them
    hub_file: str = ""
    package: str = ""  # Python package whose folder ``data`` holds the originals
    total: int | None = None  # of all subjects, where the numbers by subject are unknown
    numbered_as_a_whole: bool = False  # an item's number is that of its row in the file, not in its subject
    least: int = 1  # rows that every subject has; a file with fewer is truncated
    folder: str = ""  # below that of ``--data``; empty: its name

    def load(self, source: DataSource, subjects: Sequence[str], shots: int) -> list[Item]:
        """Return all items of these subjects, each with the first examples of its own."""
        items = self.items(source, subjects)
        if not shots:
            return items
        present = list(dict.fromkeys(item.subject for item in items))
        shown: dict[str | None, list[Mapping[str, str]]] = defaultdict(list)
        places: dict[str | None, str] = {}
        for subject, row in self._rows(source, self.examples, present, asked=True):
            example = self.make(row, subject)
            shown[example.subject].append(example.data)
            places[example.subject] = row.file
        for subject in present:
            if len(shown[subject]) < shots:
                raise DataError(
                    f"{len(shown[subject])} examples where {shots} are to be shown",
                    where=places.get(subject, f"{self.examples} split of {subject}"),
                    hint="get these files again, or show fewer with --shots",
                )
        return [replace(item, shots=tuple(shown[item.subject][:shots])) for item in items]

    def items(self, source: DataSource, subjects: Sequence[str] = ()) -> list[Item]:
        """Return the scored items of these subjects (none: all), without examples."""
        known = self._known(source)
        if subjects and known != [None]:
            require_subjects(self.name, subjects, [one for one in known if one is not None])
        else:
            subjects = ()
        wanted = [one for one in known if not subjects or one in subjects]
        counts, items, apart = dict.fromkeys(wanted, 0), list[Item](), False
        seen, places = dict[str, str](), dict[str | None, str]()
        rows = self._rows(source, self.split, wanted, asked=bool(subjects))
        total = 0
        for total, (subject, row) in enumerate(rows, 1):
            apart = subject is not None
            item = self.make(row, subject)
            if item.subject not in counts:
                continue
            key = f"{item.subject}, id {item.data['id']}" if "id" in item.data else item.id
            if key and key in seen:
                raise DataError(f"{key} occurs twice", where=row.where, hint=f"first: {seen[key]}")
            seen[key] = row.where
            places.setdefault(item.subject, row.file)
            number = total - 1 if self.numbered_as_a_whole else counts[item.subject]
            items.append(item if item.id else replace(item, id=f"{item.subject or self.split}/{number}"))
            counts[item.subject] += 1
        if not source.sample:
            there = {subject: count for subject, count in counts.items() if count or not apart}
            published: Mapping[Any, int | None] = self.counts
            for subject, count in there.items():
                expected = published[subject]
                where = places.get(subject, f"{self.name}, {subject}")
                check_count(count, expected or self.least, where, more=expected is None)
            if self.total is not None:
                check_count(total, self.total, self.name)
        return items

    def _known(self, source: DataSource) -> list[str | None]:
        """Return all subjects; of the sample suite those that it has."""
        folder = local_folder(source, self.folder or self.name) if source.sample else None
        template = folder and self._original(folder, self.split)
        if folder is None or not template or "{subject}" not in template:
            return list(self.counts)
        ending = f"_{self.split}.csv"
        names = (path.name.removesuffix(ending) for path in folder.glob(f"{self.split}/*{ending}"))
        return [*sorted(names)]

    def _original(self, folder: Path, split: str) -> str | None:
        """Return the template of the original files that a folder holds."""
        places = {name: name.format(split=split, subject="*") for name in self.files}
        return next((name for name, place in places.items() if any(folder.glob(place))), None)

    def _rows(
        self, source: DataSource, split: str, subjects: Sequence[str | None], *, asked: bool
    ) -> Iterator[tuple[str | None, Row]]:
        """Yield the rows of a split, each with its file's subject.

        Subjects without a file are left out where the user has not asked for them.
        """
        folder: Path | None = local_folder(source, self.folder or self.name)
        if folder is None and self.package:
            folder = _data_of(self.package)
        template = folder and self._original(folder, split)
        root: AnyPath | None = folder
        if not template and self.hub_file and (folder is None or (folder / self.hub_file).exists()):
            file = folder / self.hub_file if folder else fetch_hub_file(self.hub, self.hub_file)
            root = _opened(file) if file.suffix == ".zip" else file.parent
        elif not template and (folder is None or next(folder.rglob("*.parquet"), None)):
            yield from self._from_hub(split, subjects, folder)
            return
        name = template or self.files[0]
        if root is None or "{subject}" not in name:
            assert root is not None  # noqa: S101  (without a folder it is the hub's file)
            yield from ((None, row) for row in self.read(root / name.format(split=split)))
            return
        paths = {one: root / name.format(split=split, subject=one) for one in subjects}
        there = [one for one, path in paths.items() if asked or path.exists()] or list(subjects)[:1]
        for one in there:
            yield from ((one, row) for row in self.read(paths[one]))

    def _from_hub(
        self, split: str, subjects: Sequence[str | None], copy: Path | None
    ) -> Iterator[tuple[str | None, Row]]:
        by_subject = "{subject}" in (self.config or "")
        for subject in subjects if by_subject else [None]:
            config = self.config and self.config.format(subject=subject)
            named = f"{self.hub}, {subject}" if subject else self.hub
            for part in split.split("+"):
                where = f"{copy or f'hub dataset {named}'}, split {part}"
                records = read_hub(self.hub, config, part, copy=copy)
                yield from (
                    (subject, Row(record, f"{where}, row {number}"))
                    for number, record in enumerate(records, 1)
                )


@cache
def subjects_of(name: str) -> tuple[dict[str, int | None], dict[str, tuple[str, ...]]]:
    """Return a benchmark's subjects, with the published numbers of their questions, and its categories.

    A category without numbers overlaps the others, or sources differ in the numbers (None).
    """
    content = tomllib.loads(Path(__file__).with_name("subjects.toml").read_text(encoding="utf-8"))[name]
    by_category = dict(sorted(content.items(), key=lambda pair: isinstance(pair[1], list)))
    counts: dict[str, int | None] = {}
    for found in by_category.values():
        listed = found.items() if isinstance(found, dict) else ((subject, None) for subject in found)
        counts = {**dict(listed), **counts}
    return dict(sorted(counts.items())), {key: tuple(found) for key, found in by_category.items()}


def require_subjects(name: str, subjects: Sequence[str], known: Sequence[str]) -> None:
    """Refuse subjects that do not exist: name the first of them, and what may have been meant."""
    for subject in subjects:
        if subject not in known:
            close = difflib.get_close_matches(subject, known, n=3)
            few = f"it has {', '.join(known)}" if len(known) < 15 else f"such as {', '.join(known[:3])}"
            raise UsageError(
                f"{name} has no subject {subject!r}",
                where="--subjects",
                hint=f"did you mean {' or '.join(close)}?" if close else few,
            )


def local_folder(source: DataSource, name: str) -> Path | None:
    """Return the folder of one benchmark; None when the source is the hub."""
    if source.sample:
        if not (SAMPLE / name).is_dir():
            there = sorted(path.name for path in SAMPLE.iterdir() if path.is_dir())
            raise DataError(
                f"the sample suite has no {name}", where="--sample", hint=f"it has {', '.join(there)}"
            )
        return SAMPLE / name
    if source.folder is None:
        return None
    folder = source.folder / name
    if not folder.is_dir():
        raise DataError(
            f"no {name} data there",
            where=folder,
            hint=f"put the original {name} files in a folder {name}/ below --data, "
            "or leave --data out to load them from the hub",
        )
    return folder


def _data_of(package: str) -> Path | None:
    """Return the folder ``data`` of an installed package, of which no code is imported."""
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) / "data" for folder in (spec and spec.submodule_search_locations) or ()]
    return next((folder for folder in folders if folder.is_dir()), None)


def _opened(archive: Path) -> zipfile.Path:
    try:
        return zipfile.Path(zipfile.ZipFile(archive))
    except zipfile.BadZipFile as error:
        raise DataError(
            f"not a whole zip archive: {error}", where=archive, hint="delete it and try again"
        ) from error
