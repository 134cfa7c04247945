from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from qwenq.errors import StorageError, UsageError
from qwenq.evals.answer_log import FOLDER, AnswerLog, AnswerRecord, read_answer_log
from qwenq.evals.run import _all, cost
from qwenq.evals.task import Choose, Write
from qwenq.storage import locked

KEY = {"model": "abc", "task": "mmlu", "version": 1}


def record(number: int, **changes: object) -> AnswerRecord:
    values: dict[str, object] = {
        "id": f"subject/{number}",
        "subject": "subject",
        "asked": "hash",
        "prompt_tokens": 7,
        "output": "das ist 答案",
        "correct": True,
        "also": {"published": False},
    }
    return AnswerRecord(**(values | changes))  # type: ignore[arg-type]


def test_appended_records_are_found_again(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "model mmlu", KEY) as records:
        records.append(record(1))
        records.append(record(2, correct=None))
        records.append(record(2, correct=False, note="timeout"))
    with AnswerLog(tmp_path, "model mmlu", KEY) as records:
        assert records.find("subject/1", "hash") == record(1)
        assert records.find("subject/2", "hash") == record(2, correct=False, note="timeout")
        assert records.find("subject/1", "another question") is None
        assert records.find("subject/3", "hash") is None
    assert [one.id for one in read_answer_log(records.path)] == ["subject/1", "subject/2"]


def test_records_of_other_data_under_the_same_id_are_kept(tmp_path: Path) -> None:
    """Both are on the disk, and each is answered for by its own."""
    first, other = record(1), record(1, asked="of other data", correct=False)
    with AnswerLog(tmp_path, "m", KEY) as records:
        records.append(first)
        records.append(other)
        assert records.find(first.id, first.asked) == first
    with AnswerLog(tmp_path, "m", KEY) as again:
        assert again.find(first.id, first.asked) == first
        assert again.find(other.id, other.asked) == other
    assert read_answer_log(records.path) == [first, other]


def test_lines_are_plain_json(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "m", KEY) as records:
        records.append(record(1, output="a\u2028b", logprobs=(-1.5, -2.0)))
    head, line = records.path.read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(head) == {"format": 1, "key": KEY}
    assert json.loads(line)["logprobs"] == [-1.5, -2.0]
    assert read_answer_log(records.path)[0].logprobs == (-1.5, -2.0)


def test_another_key_is_another_file(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "m", KEY) as first:
        first.append(record(1))
    with AnswerLog(tmp_path, "m", {**KEY, "version": 2}) as second:
        assert second.find("subject/1", "hash") is None
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


@pytest.mark.parametrize("title", ["../../etc/x", ".hidden", "a b/ü", "x" * 500])
def test_any_title_makes_a_file_in_the_folder(title: str, tmp_path: Path) -> None:
    with AnswerLog(tmp_path, title, KEY) as records:
        assert records.path.resolve().parent == tmp_path / FOLDER


def test_at_every_torn_end_whole_lines_are_kept(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "m", KEY) as records:
        records.append(record(1))
        records.append(record(2))
    whole = records.path.read_bytes()
    for length in range(len(whole)):
        records.path.write_bytes(whole[:length])
        with AnswerLog(tmp_path, "m", KEY) as again:
            kept = [number for number in (1, 2) if again.find(f"subject/{number}", "hash")]
            assert kept == [1, 2][: max(0, whole[:length].count(b"\n") - 1)]
            again.append(record(3))
        with AnswerLog(tmp_path, "m", KEY) as again:
            assert again.find("subject/3", "hash")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "m", KEY) as records:
        records.append(record(1))
    with records.path.open("a") as file:
        file.write('{"id": 3}\n')
    with pytest.raises(StorageError, match="not a record") as caught:
        AnswerLog(tmp_path, "m", KEY)
    assert caught.value.where and caught.value.where.endswith("line 3")


@pytest.mark.parametrize("change", [
    {"implementation": 5}, {"sandbox": 5}, {"output": ["x"]}, {"note": 1}, {"tokens": "7"},
    {"prompt_tokens": None}, {"logprobs": ["x"]}, {"also": {"published": "yes"}}, {"also": [1]},
    {"correct": 1}, {"extracted": {}},
])  # fmt: skip
def test_a_record_with_values_of_other_kinds_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    """Scores are made of them, and rows of results."""
    with AnswerLog(tmp_path, "m", KEY) as records:
        records.append(record(1))
    line = json.loads(records.path.read_text().splitlines()[1]) | change
    with records.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(StorageError, match="not a record") as caught:
        AnswerLog(tmp_path, "m", KEY)
    assert caught.value.where and caught.value.where.endswith("line 3")


def test_after_kill_9_what_was_recorded_is_there(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        records = AnswerLog(tmp_path, "m", {"k": 1})
        for n in range(50):
            records.append(AnswerRecord(str(n), None, "h", 1, correct=True))
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    with AnswerLog(tmp_path, "m", {"k": 1}) as again:
        assert all(again.find(str(number), "h") for number in range(50))


def test_what_append_has_taken_is_on_the_disk_when_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was in the file at the last fsync."""
    synced: list[int] = []
    real = os.fsync

    def counted(number: int) -> None:
        real(number)
        synced.append(os.fstat(number).st_size)

    monkeypatch.setattr("qwenq.evals.answer_log.os.fsync", counted)
    with AnswerLog(tmp_path, "m", KEY) as records:
        for number in range(5):
            before = len(synced)
            records.append(record(number))
            assert synced[before:] == [records.path.stat().st_size], "once for an answer"
        before = len(synced)
        records.append(*(record(number) for number in range(5, 105)))
        assert synced[before:] == [records.path.stat().st_size], "once for a batch"


def test_two_commands_cannot_write_one_run(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(UsageError, match="another qwenq"), locked(tmp_path / "run"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_text_that_no_utf8_can_hold_is_replaced(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "m", KEY) as records:
        records.append(record(1, output="a\ud800b"))
    assert read_answer_log(records.path)[0].output == "a?b"


# Items dealt out to several processes, and their records made one again.


def test_generation_costs_more_than_scoring() -> None:
    assert cost(Write("x" * 400, 100)) > cost(Choose("x" * 400, ("A", "B", "C", "D"))) > 100
    assert cost(Choose(({"role": "user", "content": "x" * 400},), ("A",))) > 100


def test_records_of_other_ranks_are_taken_over_once(tmp_path: Path) -> None:
    for rank in (1, 2, 11):
        with AnswerLog(tmp_path, "a.b", KEY, rank) as part:
            part.append(AnswerRecord(f"item{rank}", None, "asked", 0))
            part.append(AnswerRecord("known", None, "asked", 0))
    with (
        AnswerLog(tmp_path, "a.c", KEY, 1) as other,
        AnswerLog(tmp_path, "a.b", KEY) as whole,
        AnswerLog(tmp_path, "a.b", {"model": "other"}) as another,
    ):
        other.append(AnswerRecord("of another model", None, "asked", 0))
        whole.append(AnswerRecord("known", None, "asked", 0, note="first"))
        assert another.merge_ranks() == []
        assert {record.id for record in whole.merge_ranks()} == {"item1", "item2", "item11"}
        assert whole.find("known", "asked") == AnswerRecord("known", None, "asked", 0, note="first")
        assert whole.merge_ranks() == []
    assert len(list((tmp_path / "records").iterdir())) == 3, "the parts are gone, other models' are not"


def test_a_run_folder_that_ranks_do_not_share_is_an_error(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "a.b", KEY) as log:
        log.append(AnswerRecord("mine", None, "asked", 0))
        asked = dict.fromkeys(("mine", "yours", "theirs", "hers"), "asked")
        with pytest.raises(StorageError, match="3 answers of other processes are missing"):
            _all(log, asked, tmp_path)
