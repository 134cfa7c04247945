"""Which rows of two runs can be compared, and which differences are real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_runs import BYTES, ENVIRONMENT, accuracy, model, rows, speed, write_run

from qwenq.reporting.collect import Collection, collect
from qwenq.reporting.compare import Comparison, compare
from qwenq.results import Row

Compare = Callable[..., list[Comparison]]


@pytest.fixture
def compared(tmp_path: Path) -> Compare:
    """Write both runs, read them back, compare."""

    number = 0

    def run(old: list[Row], new: list[Row], **environment: Any) -> list[Comparison]:
        nonlocal number
        number += 1
        before: Collection = collect([write_run(tmp_path / f"old{number}", old)])
        return compare(before, collect([write_run(tmp_path / f"new{number}", new, **environment)]))

    return run


def decode(precision: str = "int4", factor: float = 1.0) -> Row:
    return next(row for row in speed(precision, 2048, factor=factor) if row.metric == "speed.decode")


def kept(found: list[Comparison], metric: str) -> Comparison:
    (one,) = (item for item in found if item.row.metric == metric)
    return one


def test_a_run_is_the_same_as_itself(compared: Compare) -> None:
    found = compared(list(rows()), list(rows()))
    assert not any(item.worse for item in found)
    measured = [item for item in found if item.before and item.before.status == "ok"]
    assert all(item.comparable for item in measured)
    assert {item.row.metric for item in measured} > {
        "accuracy",
        "kl",
        "speed.decode",
        "memory.generate",
        "size",
    }


def test_speed_is_a_ratio_and_real_where_intervals_are_apart(compared: Compare) -> None:
    slower = kept(compared([decode()], [decode(factor=0.8)]), "speed.decode")
    assert slower.change == pytest.approx(0.8)
    assert (slower.worse, slower.real) == (True, True)


def test_intervals_that_overlap_are_no_difference(compared: Compare) -> None:
    assert kept(compared([decode()], [decode(factor=0.99)]), "speed.decode").real is False


@pytest.mark.parametrize(("old", "new", "why"), [
    (0.0, 5.0, "the baseline's figure is 0: there is no ratio to it"),
    (5.0, 0.0, "the new run's figure is 0: there is no ratio to it"),
    (-5.0, -5.0, "the baseline's figure is -5: there is no ratio to it"),
    (0.0, 0.0, "the baseline's figure is 0: there is no ratio to it"),
])  # fmt: skip
def test_a_figure_without_a_ratio_is_not_compared(
    old: float, new: float, why: str, compared: Compare
) -> None:
    """Nothing is infinitely faster, nor a pass, as no speed is zero."""
    before, after = (replace(decode(), value=value, low=None, high=None) for value in (old, new))
    found = kept(compared([before], [after]), "speed.decode")
    assert (found.comparable, found.why) == (False, why)


def test_a_speed_measured_once_says_that_nobody_can_tell(compared: Compare) -> None:
    once = replace(decode(), low=None, high=None)
    found = kept(compared([once], [replace(once, value=1.0)]), "speed.decode")
    assert found.real is None
    assert "measured once" in found.why


def test_a_speed_whose_interval_reaches_zero_is_no_base_of_a_ratio(compared: Compare) -> None:
    wide = replace(decode(), low=0.0)
    into = kept(compared([decode()], [wide]), "speed.decode")
    assert into.kindest == pytest.approx((wide.high or 0) / (decode().low or 1))
    assert kept(compared([wide], [decode()]), "speed.decode").kindest is None


def test_accuracies_are_paired_by_item(compared: Compare) -> None:
    found = kept(compared([accuracy("int4")], [accuracy("int4", flips=20)]), "accuracy")
    assert found.change == pytest.approx(-0.04)
    assert found.pairing
    assert (found.pairing.lost, found.pairing.won, found.real) == (20, 0, True)


def test_many_tests_are_corrected(compared: Compare) -> None:
    """Six items lost and none won is p = 0.031: real alone, no more than chance among ten tests."""
    tasks = [f"task{number}" for number in range(10)]
    assert kept(compared([accuracy("int4")], [accuracy("int4", flips=6)]), "accuracy").real is True
    new = [accuracy("int4", task, flips=6 if task == "task3" else 0) for task in tasks]
    found = compared([accuracy("int4", task) for task in tasks], new)
    assert [item.real for item in found if item.row.metric == "accuracy"] == [False] * 10


def test_weights_of_the_rows_are_compared_where_no_row_has_their_size(compared: Compare) -> None:
    larger = replace(accuracy("int4"), model=model("int4", nbytes=BYTES["int4"] + 1))
    found = kept(compared([accuracy("int4")], [larger]), "size")
    assert found.worse
    assert found.real


def test_two_models_of_one_precision_find_their_own(compared: Compare) -> None:
    coarse = replace(decode(), model=model("int4", group_size=128))
    fine = replace(decode(factor=0.9), model=replace(model("int4", group_size=64), fingerprint="sha256:fine"))
    new = [
        replace(row, model=replace(row.model, fingerprint=f"{row.model.fingerprint}2"))
        for row in (fine, coarse)
    ]
    found = [item for item in compared([coarse, fine], new) if item.row.metric == "speed.decode"]
    assert [item.change for item in found] == [1.0, 1.0]


def test_rows_of_an_earlier_model_in_the_same_folder_are_said_to_be_in_the_way(compared: Compare) -> None:
    earlier = [replace(row, model=replace(row.model, fingerprint=f"sha256:{n}")) for n, row in
               enumerate([decode(), decode()])]  # fmt: skip
    found = kept(compared([decode()], earlier), "speed.decode")
    assert not found.comparable
    assert found.why == "2 models of the new run could be the same model: start each run in an empty folder"


def at(**changes: Any) -> Callable[[Row], Row]:
    return lambda row: replace(row, point=row.point | changes)


def computed(dtype: str | None) -> Callable[[Row], Row]:
    return lambda row: replace(row, settings={} if dtype is None else {"dtype": dtype})


CHANGED: dict[str, tuple[Callable[[Row], Row], str]] = {
    "protocol": (at(protocol="base"), "another protocol: base instead of card"),
    "version": (at(version=2), "another version: 2 instead of 1"),
    "limit": (at(limit=None), "another limit: None instead of 500"),
    "family": (lambda row: replace(row, model=replace(row.model, family="other")), "another model: other"),
    "status": (
        lambda row: replace(row, value=None, low=None, high=None, status="failed", reason="killed"),
        "failed in the new run: killed",
    ),
    "dtype": (computed("bfloat16"), "another dtype: bfloat16 instead of float32"),
    "no dtype": (computed(None), "another dtype: unknown instead of float32"),
    "unit": (lambda row: replace(row, unit="percent"), "another unit: percent instead of share"),
    "precision": (lambda row: replace(row, model=model("int8")), "missing in the new run"),
}


@pytest.mark.parametrize(("change", "why"), CHANGED.values(), ids=CHANGED)
def test_what_is_not_the_same_measurement_says_so(
    compared: Compare, change: Callable[[Row], Row], why: str
) -> None:
    old = computed("float32")(accuracy("int4"))
    found = compared([old], [change(old)])[0]
    assert not found.comparable
    assert found.why.startswith(why)


def on_the_fly(row: Row, base: str = "sha256:base", **changes: Any) -> Row:
    """The same, of a model that was rounded when it was loaded."""
    rounded = replace(row.model, name=row.model.family, fingerprint=f"rounded-4-128:{base}", **changes)
    return replace(row, model=rounded)


def test_a_model_rounded_on_the_fly_is_no_folder(compared: Compare) -> None:
    """Its speed is one, and its memory at work; its bytes are those of no file."""
    folder = [row for row in speed("int4", 2048) if row.metric != "speed.protocol"]
    found = compared(folder, [on_the_fly(row, nbytes=BYTES["int4"] // 2) for row in folder])
    assert kept(found, "speed.decode").comparable
    assert kept(found, "memory.generate").comparable
    why = "another way to make it: rounding on the fly instead of a quantised folder"
    for metric in ("size", "memory.unreset"):
        assert (kept(found, metric).comparable, kept(found, metric).why) == (False, why)
    back = compared([on_the_fly(row) for row in folder], folder)
    why = "another way to make it: a quantised folder instead of rounding on the fly"
    assert kept(back, "size").why == why
    coarse = compared([decode()], [on_the_fly(decode(), group_size=64)])
    assert kept(coarse, "speed.decode").why == "another model: groups of 64 instead of 128"


def test_models_rounded_on_the_fly_are_alike_if_their_base_is(compared: Compare) -> None:
    old = on_the_fly(decode())
    assert all(item.comparable for item in compared([old], [old]))
    other = compared([old], [on_the_fly(decode(), "sha256:other")])
    assert {item.why for item in other} == {"another model: other weights under the same name"}


def test_of_a_folder_and_one_rounded_on_the_fly_the_same_kind_is_meant(compared: Compare) -> None:
    """Also when the folder's weights are new, and its name too."""
    folder = decode()
    anew = replace(folder, model=replace(folder.model, name="anew", fingerprint="sha256:new"))
    found = compared([folder, on_the_fly(folder)], [on_the_fly(folder), anew])
    pairs = [(item.before, item.after) for item in found if item.row.metric == "speed.decode"]
    assert [(old.model.name, new.model.name) for old, new in pairs if old and new] == [
        (folder.model.name, "anew"),
        (folder.model.family, folder.model.family),
    ]


def test_speed_of_another_machine_is_not_comparable_but_accuracy_is(compared: Compare) -> None:
    rows_ = [decode(), accuracy("int4")]
    other = {"cpu": {"model": "Faster CPU", "cores": 2, "threads": 2}}
    found = compared(rows_, rows_, **other)
    assert (
        kept(found, "speed.decode").why == "another machine: processor Faster CPU instead of Imaginary CPU, "
        "instruction sets unknown instead of avx2 avx512f"
    )
    assert kept(found, "accuracy").comparable


CPU = ENVIRONMENT["cpu"]
H100 = {"name": "H100", "memory_bytes": 85 * 10**9}
OTHER_MACHINES: dict[str, tuple[str, dict[str, Any], str]] = {
    "cores": ("cpu", {"cpu": CPU | {"cores": 4}}, "cores 4 instead of 2"),
    "threads": ("cpu", {"cpu": CPU | {"threads": 1}}, "threads 1 instead of 2"),
    "features": (
        "cpu",
        {"cpu": CPU | {"features": ["avx2", "avx512f", "avx512_vnni"]}},
        "instruction sets avx2 avx512_vnni avx512f instead of avx2 avx512f",
    ),
    "a GPU": ("cuda", {"gpus": [H100]}, "GPUs H100 of 85000000000 bytes instead of none"),
}


@pytest.mark.parametrize(("device", "facts", "says"), OTHER_MACHINES.values(), ids=OTHER_MACHINES)
@pytest.mark.parametrize("metric", ["speed.decode", "memory.generate"])
def test_what_decides_a_speed_is_compared_fact_by_fact(
    compared: Compare, metric: str, device: str, facts: dict[str, Any], says: str
) -> None:
    """The label that tables show, processor and cores, says none of it."""
    (row,) = (row for row in speed("int4", 2048) if row.metric == metric)
    rows_ = [at(device=device)(row), accuracy("int4")]
    found = compared(rows_, rows_, **facts)
    assert kept(found, metric).why == f"another machine: {says}"
    assert kept(found, "accuracy").comparable
    assert kept(found, "size").comparable


def test_a_gpu_beside_a_processor_that_computed_decides_nothing(compared: Compare) -> None:
    assert kept(compared([decode()], [decode()], gpus=[H100]), "speed.decode").comparable


def test_the_threads_of_a_row_win_over_those_of_its_folder(compared: Compare) -> None:
    """The folder's are those of the command that wrote to it last."""
    two = replace(decode(), settings={"threads": 2})
    assert kept(compared([two], [two], cpu=CPU | {"threads": None}), "speed.decode").comparable
    one = replace(two, settings={"threads": 1})
    assert kept(compared([two], [one]), "speed.decode").why == "another machine: threads 1 instead of 2"


def reweighed(row: Row) -> Row:
    return replace(row, model=replace(row.model, fingerprint=f"{row.model.fingerprint}, trained on"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_unquantised_weights_are_the_same_or_another_model(compared: Compare, precision: str) -> None:
    """A folder of the same name may hold another fine-tune; no figure of it is a figure of the baseline's."""
    old = [accuracy(precision), decode(precision)]
    found = compared(old, [reweighed(row) for row in old])
    assert [item.comparable for item in found] == [False] * 3
    assert {item.why for item in found} == {"another model: other weights under the same name"}


def test_what_was_made_of_other_weights_is_another_model_too(compared: Compare) -> None:
    old = [accuracy("bf16"), accuracy("int4")]
    int4 = next(item for item in compared(old, [reweighed(old[0]), old[1]]) if "Int4" in item.name)
    assert int4.why == "another model: other weights under the same name"
    again = next(item for item in compared(old, [old[0], reweighed(old[1])]) if "Int4" in item.name)
    assert again.comparable  # quantised anew is what a gate is for


def test_speed_of_an_unknown_machine_is_not_comparable(compared: Compare) -> None:
    assert (
        kept(compared([decode()], [decode()], cpu=None), "speed.decode").why
        == "a run does not record its hardware"
    )


def test_a_row_that_the_baseline_lacks_is_new(compared: Compare) -> None:
    found = compared([accuracy("int4")], [accuracy("int4"), decode()])
    assert [item.row.metric for item in found if item.before is None] == ["speed.decode"]


def made_of(base: str, row: Row) -> Row:
    return replace(row, details=row.details | {"base": base})


def test_what_a_quantised_row_says_it_was_made_of_is_looked_at(compared: Compare) -> None:
    """Though neither run has a row of the unquantised model."""
    old = made_of("sha256:one", accuracy("int4"))
    assert kept(compared([old], [old]), "accuracy").comparable
    found = compared([old, decode()], [made_of("sha256:two", accuracy("int4")), decode()])
    assert {item.why for item in found} == {"another model: other weights under the same name"}
    assert kept(compared([old], [accuracy("int4")]), "accuracy").comparable  # an older row does not say


@pytest.mark.parametrize("record", [True, False])
def test_accuracies_of_other_items_are_not_comparable(compared: Compare, record: bool) -> None:
    """Of the same task and limits by what the rows say, and still another data set."""
    old = accuracy("int4")
    items = {f"other/{name}": correct for name, correct in list(old.details["items"].items())[:400]}
    found = kept(
        compared([old], [replace(old, n=400, details={"items": items} if record else {})]), "accuracy"
    )
    assert not found.comparable
    assert found.why.startswith("other items: ")
