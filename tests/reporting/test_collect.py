"""Which machine a figure is of, and that no table or plot mixes two that share a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from example_runs import ENVIRONMENT, accuracy, speed, write_run

from qwenq.environment import MACHINE, machine
from qwenq.reporting.collect import Collection, at_one_point, collect, hardware_names, machine_difference
from qwenq.reporting.report import make_report
from qwenq.reporting.tables import Table
from qwenq.reporting.write import environment_lines, report_page
from qwenq.results import Row

CPU = ENVIRONMENT["cpu"]
H100 = {"name": "H100", "memory_bytes": 85 * 10**9, "driver": "580.1"}
PLAIN = {"cpu": CPU | {"features": ["avx2"]}}
"""A machine of the same label as ENVIRONMENT's, with fewer instruction sets."""

Runs = Callable[..., Collection]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Run folders of rows, each with what it changes of the environment."""

    numbers = count()

    def made(*folders: tuple[list[Row], dict[str, Any]]) -> Collection:
        return collect(
            [write_run(tmp_path / f"run{next(numbers)}", rows, **changed) for rows, changed in folders]
        )

    return made


def rows_of(*precisions: str, device: str = "cpu", factor: float = 1.0, **settings: Any) -> list[Row]:
    """Speeds and memory at one point."""
    return [
        replace(row, point=row.point | {"device": device}, settings=settings)
        for precision in precisions
        for row in speed(precision, 2048, factor=factor)
    ]


def table(collection: Collection, key: str) -> Table:
    (section,) = make_report(collection, "t").sections
    return next(table for table in section.tables if table.key == key)


def test_two_machines_of_one_label_are_two_lines_that_say_what_differs(runs: Runs) -> None:
    found = runs((rows_of("int4"), {}), (rows_of("int4", factor=0.5), PLAIN))
    made = table(found, "speed")
    assert made.headers[:3] == ("Quantization", "Attention", "Hardware")
    shown = {line.cells[2].text: line.cells[3].value for line in made.lines if not line.published}
    assert shown == {
        "Imaginary CPU, 2 cores, AVX-512": 52.5,
        "Imaginary CPU, 2 cores, AVX2": 26.25,
    }
    page = report_page(make_report(found, "t"))
    assert all(name in page for name in shown)


def test_one_machine_is_its_label(runs: Runs) -> None:
    found = runs((rows_of("int4"), {}), (rows_of("int8"), {}))
    assert "hardware: Imaginary CPU, 2 cores, AVX-512" in table(found, "speed").caption


def test_a_plot_has_one_machine_though_two_share_the_label(runs: Runs) -> None:
    """That on which most models were measured, as for any other part of the point."""
    found = runs((rows_of("bf16", "int4"), {}), (rows_of("int8", factor=9.0), PLAIN))
    chosen = at_one_point(found.of("Qwen/Qwen-1_8B-Chat", "speed.decode"))
    assert [item.row.model.precision for item in chosen] == ["bf16", "int4"]


def test_threads_tell_speeds_apart_but_no_accuracies(runs: Runs) -> None:
    one = CPU | {"threads": None}
    rows = [*rows_of("int4", threads=2), *rows_of("int8", threads=1), accuracy("int4"), accuracy("int8")]
    found = runs((rows, {"cpu": one}))
    assert {line.cells[2].text for line in table(found, "speed").lines if not line.published} == {
        "Imaginary CPU, 2 cores, AVX-512 (threads 2)",
        "Imaginary CPU, 2 cores, AVX-512 (threads 1)",
    }
    assert "hardware: Imaginary CPU, 2 cores" in table(found, "accuracy").caption


@pytest.mark.parametrize(("device", "says"), [
    ("cpu", "Imaginary CPU, 2 cores"),
    ("cuda:0", "H100"),
    (None, "H100"),  # an older row does not say
    ("unknown", "unknown hardware"),  # a server answered, wherever that is
])  # fmt: skip
def test_an_accuracy_is_of_the_device_that_computed_it(runs: Runs, device: str | None, says: str) -> None:
    """Not of the best one that the machine has."""
    settings = {} if device is None else {"device": device}
    found = runs(([replace(accuracy("int4"), settings=settings)], {"gpus": [H100]}))
    assert f"hardware: {says}" in table(found, "accuracy").caption
    assert [item.hardware for item in found.measured] == [says]


def test_a_row_without_a_figure_makes_no_second_machine(runs: Runs) -> None:
    """An older one does not say its threads."""
    absent = [
        replace(row, value=None, low=None, high=None, status="unavailable", reason="no kernel")
        for row in rows_of("int8")
    ]
    found = runs(([*rows_of("int4", threads=2), *absent], {"cpu": CPU | {"threads": None}}))
    assert "Hardware" not in table(found, "speed").headers


def test_a_point_that_was_never_begun_has_the_instructions_of_the_others(runs: Runs) -> None:
    """Where a budget was used up before, no kernel was chosen that it could name."""
    measured = [replace(row, implementation="fast, prompts: C for avx512-bf16") for row in rows_of("int4")]
    absent = [
        replace(
            row, value=None, low=None, high=None, status="unavailable", reason="too late", implementation=""
        )
        for row in rows_of("int8")
    ]
    features = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"]
    found = runs(([*measured, *absent], {"cpu": CPU | {"features": features}}))
    assert {item.hardware for item in found.measured} == {"Imaginary CPU, 2 cores, AVX-512 BF16"}


def test_the_machine_of_a_row_wins_over_that_of_its_folder(runs: Runs) -> None:
    """An H100's profile, and then `qwenq eval` from a laptop into the same folder."""
    server = machine(ENVIRONMENT | {"gpus": [H100]})
    laptop = {"cpu": {"model": "Laptop CPU", "cores": 4, "threads": 4, "features": ["avx2"]}, "gpus": []}
    profiled = rows_of("int4", device="cuda", **{MACHINE: server})
    found = runs(([*profiled, accuracy("int4")], laptop))
    name = hardware_names(found.measured)
    assert {name(item) for item in found.measured if "device" in item.row.point} == {"H100"}
    assert {name(item) for item in found.measured if "task" in item.row.point} == {"Laptop CPU, 4 cores"}
    before = runs((rows_of("int4", device="cuda"), {"gpus": [H100]}))
    assert machine_difference(before.measured[0], found.measured[0]) == "", "older rows are their folder's"
    lines = dict(environment_lines(found))
    assert lines["GPUs"] == "H100, 79.2 GiB, driver 580.1 and none"
    assert lines["processor"] == "Imaginary CPU, 2 cores, 2 threads and Laptop CPU, 4 cores, 4 threads"


def test_eight_gpus_of_one_kind_are_named_once(runs: Runs) -> None:
    found = runs((rows_of("int4", device="cuda"), {"gpus": [*[H100] * 8, {"name": "L4"}]}))
    assert {item.hardware for item in found.measured} == {"8 × H100 + L4"}


@pytest.mark.parametrize("said", [7, [], {}, {"cpu": 7}, {"gpus": "x"}, {"cpu": {"features": [[]]}}])
def test_a_machine_that_is_none_is_no_traceback(runs: Runs, said: object) -> None:
    found = runs((rows_of("int4", **{MACHINE: said}), {}), (rows_of("int4"), {}))
    assert report_page(make_report(found, "t"))
