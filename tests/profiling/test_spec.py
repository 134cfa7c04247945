"""What a sweep consists of, and when a point is done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_families import write_family

from qwenq.errors import UsageError
from qwenq.models.bundled import NAME
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.identity import result_model
from qwenq.profiling.spec import Point, Subjects, is_done, subjects_of, sweep


def test_a_sweep_is_every_combination_with_short_lengths_first(subjects: Subjects) -> None:
    lengths = [(1, 8192), (1, 2048), (2048, 1)]
    made = sweep(subjects.subjects, attentions=["v2", "off"], engines=["fast"], lengths=lengths, device="cpu")
    assert len(made) == len(set(made)) == 2 * 2 * 3
    assert [(p.context, p.tokens) for p in made[::4]] == [(2048, 1), (1, 2048), (1, 8192)]
    assert {p.subject.model.precision for p in made} == {"fp32", "int4"}


def test_auto_is_what_an_engine_takes_and_no_point_is_measured_twice(subjects: Subjects) -> None:
    points = sweep(
        subjects.subjects,
        attentions=["auto", "grouped", "off"],
        engines=["fast", "transformers"],
        lengths=[(1, 8)],
        device="cpu",
    )
    (first, *_) = subjects.subjects
    assert [(point.attention, point.engine) for point in points if point.subject == first] == [
        ("grouped", "fast"),
        ("sdpa", "transformers"),
        ("grouped", "transformers"),
        ("off", "fast"),
        ("off", "transformers"),
    ]


def test_a_point_survives_its_way_to_the_child(points: list[Point]) -> None:
    for point in points:
        assert Point.from_json(point.to_json()) == point


def test_a_point_is_done_when_every_metric_has_its_row(points: list[Point]) -> None:
    point = points[0]
    rows = [point.row(metric, 1.0) for metric in point.metrics]
    assert is_done(point, rows)
    assert not is_done(point, rows[:-1])
    assert not is_done(points[1], rows)
    other = replace(point.subject.model, fingerprint="another")
    assert not is_done(replace(point, subject=replace(point.subject, model=other)), rows)


def test_a_row_marked_again_leaves_its_point_unfinished(points: list[Point]) -> None:
    point = points[0]
    rows = [point.row(metric, 1.0) for metric in point.metrics]
    assert is_done(
        point, [*rows[:-1], *point.without("unavailable", "no such kernel", list(point.metrics)[-1:])]
    )
    late = point.without("unavailable", "the budget was over", list(point.metrics)[-1:], again=True)
    assert not is_done(point, [*rows[:-1], *late])


def test_subjects_of_a_plain_model(tiny: Path, subjects: Subjects) -> None:
    fp32, int4 = (each.model for each in subjects.subjects)
    assert (fp32.precision, int4.precision) == ("fp32", "int4")
    assert fp32.family == int4.family == tiny.name
    assert int4.fingerprint.endswith(fp32.fingerprint)
    assert int4.fingerprint != fp32.fingerprint
    assert int4.nbytes < fp32.nbytes
    assert subjects.subjects[1].rounded == 4


def test_a_quantised_folder_is_of_the_family_of_its_base_whatever_that_is_called_now(
    tiny: Path, tmp_path: Path
) -> None:
    """By the fingerprint in its manifest, as evaluations have it: else the report has two families."""
    renamed, mine = tmp_path / "renamed", tmp_path / "mine"
    shutil.copytree(tiny, renamed)
    quantised(tiny, mine, {"model": "/elsewhere/Old-Name", "fingerprint": open_checkpoint(tiny).fingerprint})
    found = subjects_of([str(mine), str(renamed)], ["int4", "bf16"])
    assert [(each.model.precision, each.model.family) for each in found.subjects] == [
        ("int4", "renamed"),
        ("int4", "renamed"),
        ("bf16", "renamed"),
    ]
    shutil.rmtree(mine)
    quantised(tiny, mine, {"model": "/elsewhere/Old-Name", "fingerprint": "of other weights"})
    found = subjects_of([str(mine), str(renamed)], ["bf16"])
    assert [each.model.family for each in found.subjects] == ["Old-Name", "renamed"]


def quantised(base: Path, out: Path, origin: dict[str, str]) -> None:
    """A folder that says it is quantised, and from what; its weights are not looked at here."""
    shutil.copytree(base, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (out / "config.json").write_text(json.dumps(config))
    (out / "qwenq.json").write_text(json.dumps({"base": origin}))


def test_the_bundled_model_has_one_name_by_any_path(tmp_path: Path) -> None:
    """By its folder in the cache, too, and for what was made from that: as in evaluations."""
    cached = write_family(tmp_path / NAME)
    quantised(cached, tmp_path / "mine", {"model": str(cached)})
    found = subjects_of([str(cached), str(tmp_path / "mine")], ["bf16", "int4"])
    assert {each.model.family for each in found.subjects} == {NAME}
    assert {each.model.name for each in found.subjects} == {NAME, "mine"}
    evaluated = result_model(open_checkpoint(cached), torch.bfloat16, str(cached))
    assert evaluated == found.subjects[0].model


def test_random_weights_of_a_catalogue_shape_are_not_made_to_list_them() -> None:
    found = subjects_of(["qwen-7b-chat"], ["bf16", "int4"], "random", seed=3)
    assert found.shapes["qwen-7b-chat"].parameters == 7_721_324_544
    assert all("random:3:qwen-7b-chat" in each.model.fingerprint for each in found.subjects)


def test_an_unknown_precision_or_a_model_named_twice_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="no precision 'int3'"):
        subjects_of([str(tiny)], ["int3"])
    with pytest.raises(UsageError, match="two models are called tiny"):
        subjects_of([str(tiny), str(tiny)], ["fp32"])
