"""Benchmarks from a hub on this machine, through the real libraries, in the layouts of the published sets."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from evals.columns_data import ifeval_rows, math500_rows, mmlu_pro_rows, write_columns
from evals.dataset_hub import COMMIT, Handler, ask, serve

from qwenq.evals.task import DataSource
from qwenq.evals.tasks.registry import get_task

pytest.importorskip("datasets")
ASKED = ["mmlu:base:anatomy", "ceval:base:marxism", "gsm8k:card:", "humaneval:card:", "cmmlu:base:agronomy"]
ASKED += ["mbpp:base:", "math:base:geometry"]


def parquet(rows: Sequence[dict[str, Any]], classes: Sequence[str] = ()) -> bytes:
    """Rows as ``datasets`` stores them; ``answer`` is a class label where its names are given."""
    import datasets

    table = datasets.Dataset.from_list(list(rows))
    if classes:
        table = table.cast_column("answer", datasets.ClassLabel(names=list(classes)))
    held = io.BytesIO()
    table.to_parquet(held)
    return held.getvalue()


def card(config: str, splits: Sequence[str], folder: str) -> bytes:
    files = "".join(f"  - split: {split}\n    path: {folder}/{split}-*\n" for split in splits)
    return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n".encode()


def published(config: str, folder: str, **splits: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    data = {f"{folder}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
    return {"README.md": card(config, list(splits), folder), **data}


def mmlu() -> dict[str, bytes]:
    files = {"README.md": card("all", ("test", "dev"), "all")}
    for split, count in (("test", 135), ("dev", 5)):
        one = {"subject": "anatomy", "choices": ["None", "x", "y", "z"]}
        rows = [{"question": f"q{n}", **one, "answer": n % 4} for n in range(count)]
        rows.insert(count // 2, {**rows[0], "subject": "virology"})
        files[f"all/{split}-00000-of-00001.parquet"] = parquet(rows, classes="ABCD")
    return files


def ceval() -> dict[str, bytes]:
    row = {"question": "问", "A": "一", "B": "二", "C": "三", "D": "四", "answer": "B", "explanation": ""}
    splits = {split: [{"id": n, **row} for n in range(count)] for split, count in (("val", 19), ("dev", 5))}
    return published("marxism", "marxism", **splits)


def cmmlu() -> dict[str, bytes]:
    """A script, which nothing runs, and an archive."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, count in (("dev", 5), ("test", 101)):
            lines = (f"{n},第{n}题,None,乙,丙,丁,{'ABCD'[n % 4]}\n" for n in range(count))
            archive.writestr(f"{split}/agronomy.csv", ",Question,A,B,C,D,Answer\n" + "".join(lines))
    return {"README.md": b"CMMLU\n", "cmmlu.py": b"raise SystemExit", "cmmlu_v1_0_1.zip": held.getvalue()}


def human_eval() -> dict[str, bytes]:
    names = ("prompt", "canonical_solution", "test")
    text = ('def f():\n    """d"""\n', "    pass\n", "def check(c):\n    pass\n")
    one = {**dict(zip(names, text, strict=True)), "entry_point": "f"}
    rows = [{"task_id": f"HumanEval/{n}", **one} for n in range(164)]
    return published("openai_humaneval", "openai_humaneval", test=rows)


def mbpp_row(number: int) -> dict[str, Any]:
    code, tests = "def add(x):\n    return x + 1", ["assert add(1) == 2"] * 3
    rest = {"test_setup_code": "", "challenge_test_list": []}
    return {"task_id": number, "text": "Add one.", "code": code, "test_list": tests, **rest}


def hub_files() -> dict[str, dict[str, bytes]]:
    sums = [{"question": f"1 + {n}?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(1319)]
    prompt, test = ([mbpp_row(n) for n in numbers] for numbers in (range(1, 11), range(11, 511)))
    problem = {"problem": "1+1?", "level": "Level 1", "type": "Geometry", "solution": r"It is $\boxed{2}$."}
    return {
        "cais/mmlu": mmlu(),
        "ceval/ceval-exam": ceval(),
        "openai/gsm8k": published("main", "main", test=sums),
        "openai/openai_humaneval": human_eval(),
        "lmlmcat/cmmlu": cmmlu(),
        "google-research-datasets/mbpp": published("full", "full", prompt=prompt, test=test),
        "EleutherAI/hendrycks_math": published("geometry", "geometry", test=[problem] * 479),
    }


def test_every_set_of_the_hub_and_the_cache_when_it_is_gone(tmp_path: Path) -> None:
    with serve(hub_files()) as address:
        found, said = ask(address, tmp_path, ASKED)
    assert [one.get("items") for one in found] == [135, 19, 1319, 164, 101, 500, 479], (found, said)
    assert [one["id"] for one in found[:3]] == ["anatomy/134", "marxism/18", "test/1318"]
    assert [one["shots"] for one in found] == [5, 5, 0, 0, 5, 3, 4]
    assert found[0]["data"]["answer"] == "C" and found[0]["data"]["A"] == "None"
    assert found[4]["data"] == {
        "question": "第100题",
        **dict(zip("ABCD", ("None", *"乙丙丁"), strict=True)),
    } | {"answer": "A"}
    again, said = ask(address, tmp_path, ASKED)  # nobody serves that address any more
    assert again == found
    assert "Retrying" not in said


def lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_newer_sets_of_the_hub(tmp_path: Path) -> None:
    """MMLU-Pro is parquet, the others are their authors' files; IFEval has nulls for arguments."""
    data = write_columns(tmp_path / "data")
    keys = sorted({key for row in ifeval_rows() for found in row["kwargs"] for key in found})
    filled = [
        {**row, "kwargs": [{key: found.get(key) for key in keys} for found in row["kwargs"]]}
        for row in ifeval_rows()
    ]
    splits = {split: mmlu_pro_rows(split) for split in ("test", "validation")}
    files = {
        "TIGER-Lab/MMLU-Pro": published("default", "data", **splits),
        "Idavidrein/gpqa": {"gpqa_diamond.csv": (data / "gpqa" / "gpqa_diamond.csv").read_bytes()},
        "HuggingFaceH4/MATH-500": {"README.md": b"MATH\n", "test.jsonl": lines(math500_rows())},
        "google/IFEval": {"README.md": b"IFEval\n", "ifeval_input_data.jsonl": lines(filled)},
    }
    asked = ["mmlu-pro:base:law", "gpqa-diamond:card:", "math-500:base:"]
    asked += ["ifeval:card:"] if all(map(find_spec, ("langdetect", "punkt"))) else []
    with serve(files) as address:
        found, said = ask(address, tmp_path, asked)
    assert [one.get("items") for one in found] == [1101, 198, 500, 541][: len(asked)], (found, said)
    for request, one in zip(asked, found, strict=True):
        name, protocol, subject = request.split(":")
        local = get_task(name, protocol).items(DataSource(data), [subject] if subject else [])[-1]
        assert (one["id"], one["data"], one["shots"]) == (local.id, local.data, len(local.shots))


def test_nobody_there_is_one_error_at_once_with_both_ways_out(tmp_path: Path) -> None:
    with serve({}) as address:
        pass
    begin = time.monotonic()
    found, said = ask(address, tmp_path, ["gsm8k:card:", "cmmlu:base:agronomy"])
    for one in found:
        assert one["error"] == "DataError" and f"{address} could not be reached" in one["text"]
        assert "either connect to the hub" in one["text"] and "--data DIR" in one["text"]
    assert all("--sample" in one["text"] for one in found)
    assert "Retrying" not in said
    assert time.monotonic() - begin < 25  # six attempts of each, as downloads make, take over a minute


def test_a_set_that_is_gone_and_one_that_became_a_script(tmp_path: Path) -> None:
    with serve({"openai/gsm8k": {"README.md": b"moved\n", "gsm8k.py": b"raise SystemExit"}}) as address:
        script, gone = ask(address, tmp_path, ["gsm8k:card:", "mmlu:base:anatomy"])[0]
    assert "Dataset scripts are no longer supported" in script["text"] and "--data DIR" in script["text"]
    assert "doesn't exist on the Hub" in gone["text"] and "--data DIR" in gone["text"]


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    with serve({"lmlmcat/cmmlu": {**cmmlu(), "cmmlu_v1_0_1.zip": b"PK no more"}}) as address:
        (found,), _ = ask(address, tmp_path, ["cmmlu:base:agronomy"])
    assert found["error"] == "DataError" and "not a whole zip archive" in json.dumps(found)


def test_damaged_bytes_and_a_card_that_is_of_other_data(tmp_path: Path) -> None:
    """What datasets raises then is no error of Python's own."""
    sums = published(
        "main", "main", test=[{"question": f"1 + {n}?", "answer": "#### 1"} for n in range(1319)]
    )
    (name,) = (path for path in sums if path.endswith(".parquet"))
    damaged = {**sums, name: sums[name][:40] + bytes(360) + sums[name][400:]}
    count = (
        "---\ndataset_info:\n- config_name: openai_humaneval\n  splits:\n"
        "  - name: test\n    num_bytes: 10\n    num_examples: 7\n"
    )
    solved = human_eval()
    other = {**solved, "README.md": count.encode() + solved["README.md"].removeprefix(b"---\n")}
    with serve({"openai/gsm8k": damaged, "openai/openai_humaneval": other}) as address:
        found, _ = ask(address, tmp_path, ["gsm8k:card:", "humaneval:card:"])
    for one in found:
        assert (
            one["error"] == "DataError" and "the benchmark could not be loaded from the hub: " in one["text"]
        )
        assert "--data DIR" in one["text"]
    assert "An error occurred" not in found[0]["text"], "but which one"
    assert "num_examples=7" in found[1]["text"]


def test_a_connection_that_breaks_in_a_file_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Handler.file

    def half(self: Handler, data: bytes | None) -> None:
        if self.command == "HEAD" or data is None or not self.path.endswith((".zip", ".parquet")):
            whole(self, data)
            return
        self.head(200, len(data), {"ETag": '"x"', "X-Repo-Commit": COMMIT})
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    monkeypatch.setattr(Handler, "file", half)
    sums = [{"question": f"1 + {n}?", "answer": "#### 1"} for n in range(1319)]
    with serve({"openai/gsm8k": published("main", "main", test=sums), "lmlmcat/cmmlu": cmmlu()}) as address:
        found, _ = ask(address, tmp_path, ["gsm8k:card:", "cmmlu:base:agronomy"])
    for one in found:
        assert (
            one["error"] == "DataError"
            and "the benchmark could not be loaded from the hub: peer closed" in one["text"]
        )
        assert "--data DIR" in one["text"]
