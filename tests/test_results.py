"""Rows of a run folder: what is written comes back, kills leave traces, other lines are not trusted."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenq.errors import StorageError, UsageError
from qwenq.results import (
    ENVIRONMENT_FILE,
    RESULTS_FILE,
    Model,
    Row,
    append_row,
    each_run,
    read_environment,
    read_rows,
    write_environment,
)

MODEL = Model("SmolLM2-135M-Instruct", "sha256:0", "bf16", "smollm2-135m-instruct", nbytes=269_000_000)
ROW = Row("speed.decode", MODEL, {"tokens": 2048, "attention": "off"}, 54.09, "tokens/s", 53.0, 55.2, n=5)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
finite = st.floats(-1e18, 1e18)
flat = st.none() | st.booleans() | st.integers() | finite | text
json_values = st.recursive(flat, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=8)
models = st.builds(
    Model,
    text,
    text,
    text,
    text,
    st.none() | st.integers(0, 2**60),
    st.none() | st.sampled_from([32, 64, 128]),
)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    measured = draw(st.booleans())
    low, high = draw(st.none() | finite), draw(st.none() | finite)
    if low is not None and high is not None:
        low, high = sorted((low, high))
    return Row(
        metric=draw(text),
        model=draw(models),
        point=draw(st.dictionaries(text, flat, max_size=4)),
        value=draw(finite) if measured else None,
        unit=draw(text),
        low=low,
        high=high,
        n=draw(st.none() | st.integers(-5, 2**60)),
        status="ok" if measured else draw(st.sampled_from(["unavailable", "failed"])),
        reason=None if measured else draw(text.filter(bool)),
        implementation=draw(text),
        settings=draw(st.dictionaries(text, json_values, max_size=3)),
        details=draw(st.dictionaries(text, json_values, max_size=3)),
        date=draw(text),
    )


@settings(max_examples=100)
@given(st.lists(rows(), max_size=4, unique_by=lambda row: (row.identity, row.model.fingerprint)))
def test_what_is_written_comes_back(written: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        for row in written:
            append_row(run, row)
        if written:
            assert read_rows(run) == written


def test_of_one_measurement_the_last_counts(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        append_row(tmp_path, replace(ROW, value=value))
    append_row(tmp_path, replace(ROW, model=replace(MODEL, fingerprint="sha256:1")))
    assert [row.value for row in read_rows(tmp_path)] == [3.0, 54.09]


def test_a_line_torn_by_a_kill_is_left_out_and_never_glued_to_the_next(tmp_path: Path) -> None:
    append_row(tmp_path, ROW)
    path = tmp_path / RESULTS_FILE
    whole = path.read_bytes()
    other = replace(ROW, metric="speed.prefill")
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert read_rows(tmp_path) == [ROW]
        append_row(tmp_path, other)
        assert read_rows(tmp_path) == [ROW, other]


def test_a_row_whose_command_names_what_is_not_utf8_is_kept(tmp_path: Path) -> None:
    """Hours lie behind it, and the name of a folder may be any bytes."""
    append_row(tmp_path, replace(ROW, details={"command": "qwenq eval --out run\udcff"}))
    assert read_rows(tmp_path) == [replace(ROW, details={"command": "qwenq eval --out run?"})]


def test_a_last_row_without_its_end_is_a_row_if_it_is_whole(tmp_path: Path) -> None:
    """An editor, or a tool that joins lines, leaves the end away: that is no kill, and no row is lost."""
    other, third = replace(ROW, metric="speed.prefill"), replace(ROW, metric="speed.protocol")
    path = tmp_path / RESULTS_FILE
    for begin in (b"", b"\xef\xbb\xbf"):  # of files from an editor of Windows
        lines = [json.dumps(row.to_json()).encode() for row in (ROW, other)]
        for written in (lines[:1], lines):
            path.write_bytes(begin + b"\n".join(written))
            assert read_rows(tmp_path) == [ROW, other][: len(written)]
            append_row(tmp_path, third)
            assert read_rows(tmp_path) == [*[ROW, other][: len(written)], third]


def test_a_line_without_an_end_is_not_read_to_the_end_of_a_hole(tmp_path: Path) -> None:
    append_row(tmp_path, ROW)
    with (tmp_path / RESULTS_FILE).open("rb+") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room on the disk
    with pytest.raises(UsageError, match="a line of more than 64 MB is not a row"):
        read_rows(tmp_path)
    with pytest.raises(UsageError, match="a line of more than 64 MB is not a row"):
        append_row(tmp_path, ROW)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.timeout(60)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RESULTS_FILE)
    os.mkfifo(tmp_path / ENVIRONMENT_FILE)
    with pytest.raises(StorageError, match="it is not a file"):
        read_rows(tmp_path)
    with pytest.raises(UsageError, match="it is not a file"):
        read_environment(tmp_path)


def test_a_character_torn_in_two_is_a_torn_line_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    append_row(tmp_path, replace(ROW, implementation="模型"))
    whole = path.read_bytes()
    torn = whole[: whole.index("模".encode()) + 1]
    path.write_bytes(whole + torn)
    assert len(read_rows(tmp_path)) == 1
    path.write_bytes(torn + b"\n" + whole)
    with pytest.raises(UsageError, match="not UTF-8"):
        read_rows(tmp_path)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).touch()
    assert read_rows(tmp_path) == []


def changed(**fields: object) -> str:
    return json.dumps({**ROW.to_json(), **fields})


HOSTILE = {
    "not JSON": "{",
    "an array": "[1, 2]",
    "a number": "7",
    "another format": changed(format=2),
    "no format": json.dumps({k: v for k, v in ROW.to_json().items() if k != "format"}),
    "an unknown key": changed(surprise=1),
    "a value of text": changed(value="54"),
    "a value that is true": changed(value=True),
    "a value too large for a float": changed(value=10**400),
    "NaN": changed(value=float("nan")),
    "infinity, spelt as a number": changed(value=0).replace('"value": 0', '"value": 1e999'),
    "NaN in the details": changed(details={"values": [float("nan")]}),
    "NaN for a bound": changed(low=float("nan")),
    "a bound too large for a float": changed(high=10**400),
    "a figure beyond all measure": changed(value=1e300),
    "more bytes than there are": changed(model={**ROW.to_json()["model"], "nbytes": 10**400}),
    "half a surrogate pair": changed(implementation="\ud800"),
    "ok without a value": changed(value=None),
    "unavailable with a value": changed(status="unavailable", reason="no"),
    "unavailable without a reason": changed(status="unavailable", value=None),
    "a status of its own": changed(status="great"),
    "a status that is a list": changed(status=["ok"]),
    "a model of text": changed(model="m"),
    "a model without family": changed(model={"name": "m", "fingerprint": "f", "precision": "int4"}),
    "a model's name that is a number": changed(model={**ROW.to_json()["model"], "name": 7}),
    "bytes of text": changed(model={**ROW.to_json()["model"], "nbytes": "big"}),
    "half a repetition": changed(n=0.5),
    "a point that is a list": changed(point=[1]),
    "a nested point": changed(point={"tokens": [2048]}),
    "details of text": changed(details="x"),
    "a hundred thousand brackets": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_a_line_that_is_no_row_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    append_row(tmp_path, ROW)
    with (tmp_path / RESULTS_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UsageError, match="not a row of results") as caught:
        read_rows(tmp_path)
    assert caught.value.where is not None
    assert caught.value.where.endswith(f"{RESULTS_FILE}, line 2")
    assert caught.value.hint


@pytest.mark.parametrize(("name", "says"), [
    ("NaN", "it holds a figure that is not finite"),
    ("NaN in the details", "it holds a figure that is not finite"),
    ("infinity, spelt as a number", "it holds a figure that is not finite"),
    ("half a surrogate pair", "it holds half of a character"),
    ("an unknown key", "it has an unknown key 'surprise'"),
    ("a model without family", "the model has no 'family'"),
    ("no format", "its format is None, known is 1"),
])  # fmt: skip
def test_what_is_wrong_with_a_line_is_said_in_words(tmp_path: Path, name: str, says: str) -> None:
    """Not in those of Python's own functions."""
    (tmp_path / RESULTS_FILE).write_text(HOSTILE[name] + "\n")
    with pytest.raises(UsageError) as caught:
        read_rows(tmp_path)
    assert caught.value.what == f"not a row of results: {says}"


def test_rows_of_a_newer_qwenq_are_not_to_be_deleted(tmp_path: Path) -> None:
    (tmp_path / RESULTS_FILE).write_text(changed(format=2) + "\n")
    with pytest.raises(UsageError, match="of this qwenq: its format is 2, known is 1") as caught:
        read_rows(tmp_path)
    assert caught.value.hint == "use the qwenq that wrote it, or a newer one"


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    row = replace(ROW, implementation="a\u2028b\x85c\x0bd\ne")
    append_row(tmp_path, row)
    assert read_rows(tmp_path) == [row]


def test_no_run_folder_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results") as caught:
        read_rows(tmp_path / "nowhere")
    assert "qwenq eval" in str(caught.value.hint)


def test_a_row_that_cannot_be_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="a value belongs to status ok"):
        replace(ROW, value=None)
    with pytest.raises(ValueError, match="needs a reason"):
        replace(ROW, value=None, status="failed")
    with pytest.raises(ValueError, match="is no figure"):
        replace(ROW, value=float("inf"))
    with pytest.raises(ValueError, match=r"interval from 3\.0 down to 2\.0"):
        replace(ROW, low=3.0, high=2.0)


def test_identity_is_precision_metric_and_point_whatever_the_weights() -> None:
    assert ROW.identity == replace(ROW, model=replace(MODEL, fingerprint="x", name="y")).identity
    assert ROW.identity == replace(ROW, point=dict(reversed(ROW.point.items()))).identity
    assert ROW.identity != replace(ROW, model=replace(MODEL, precision="int4")).identity
    assert ROW.identity != replace(ROW, point={"tokens": 8192, "attention": "off"}).identity


def test_environment_comes_back_and_may_be_missing(tmp_path: Path) -> None:
    assert read_environment(tmp_path) == {}
    write_environment(tmp_path, {"cpu": {"model": "x", "cores": 2}})
    append_row(tmp_path, ROW)
    assert list(each_run([tmp_path])) == [(tmp_path, [ROW], {"cpu": {"model": "x", "cores": 2}})]


@pytest.mark.parametrize("content", ["[]", "{", "7", "\x00"])
def test_an_environment_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UsageError):
        read_environment(tmp_path)
