"""CMMLU: read from its own layout, asked and averaged as C-Eval is."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenq.errors import DataError
from qwenq.evals.task import Choose, DataSource, Judgement
from qwenq.evals.tasks.cmmlu import CATEGORIES, SUBJECTS
from qwenq.evals.tasks.registry import get_task

CARD, BASE = (get_task("cmmlu", protocol) for protocol in ("card", "base"))


def write_cmmlu(data: Path, subject: str = "agronomy", rows: int = 101) -> DataSource:
    """As the original archive has it: a column of row numbers without a name, capital letters."""
    for split, count in (("dev", 5), ("test", rows)):
        path = data / "cmmlu" / split / f"{subject}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (f"{n},第{n}题,None,乙,丙,丁,{'ABCD'[n % 4]}\n" for n in range(count))
        path.write_text(",Question,A,B,C,D,Answer\n" + "".join(lines), encoding="utf-8")
    return DataSource(data)


def test_the_base_prompt_is_that_of_ceval(tmp_path: Path) -> None:
    items = BASE.items(write_cmmlu(tmp_path))
    assert (len(items), items[100].id, items[100].subject) == (101, "agronomy/100", "agronomy")
    request = BASE.request(items[0])
    assert isinstance(request, Choose) and request.choices == ("A", "B", "C", "D")
    assert isinstance(request.prompt, str)
    assert request.prompt.startswith("问题：第0题\nA. None\nB. 乙\nC. 丙\nD. 丁\n答案：A\n\n问题：第1题")
    assert request.prompt.endswith("答案：A\n\n问题：第0题\nA. None\nB. 乙\nC. 丙\nD. 丁\n答案：")
    assert BASE.notes(items) == [
        "1 of the 67 subjects of cmmlu: not comparable with a score over all of them"
    ]


def test_the_chat_protocol_has_no_examples(tmp_path: Path) -> None:
    item = CARD.items(write_cmmlu(tmp_path))[1]
    assert item.shots == ()
    assert str(CARD.request(item).prompt[1]["content"]) == "第1题\n\nA. None\nB. 乙\nC. 丙\nD. 丁\n"  # type: ignore[index]


def test_subjects_count_alike() -> None:
    judged = []
    for subject, right, of in (("virology", 1, 4), ("marketing", 1, 1)):
        items = [SimpleNamespace(subject=subject) for _ in range(of)]
        judged += [(item, Judgement(n < right, "A")) for n, item in enumerate(items)]
    (score,) = BASE.scores(judged)  # type: ignore[arg-type]
    assert score.macro and score.value == pytest.approx(0.625)
    assert score.categories == {"stem": 0.25, "social science": 1.0}


def test_every_subject_has_one_category_and_may_be_of_china_besides() -> None:
    *areas, china = CATEGORIES.values()
    assert [len(area) for area in areas] == [17, 13, 22, 15]
    assert sorted(name for area in areas for name in area) == list(SUBJECTS)
    assert len(china) == 15 and set(china) < set(SUBJECTS)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="99 rows where the published set has 100 or more"):
        CARD.items(write_cmmlu(tmp_path, rows=99))


def test_the_hubs_archive_gives_the_same_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, archive = write_cmmlu(tmp_path), tmp_path / "cmmlu.zip"
    with zipfile.ZipFile(archive, "w") as held:
        for path in (tmp_path / "cmmlu").rglob("*.csv"):
            held.write(path, path.relative_to(tmp_path / "cmmlu"))
    monkeypatch.setattr("qwenq.evals.tasks.data.fetch_hub_file", lambda *_, **__: archive)
    assert BASE.items(DataSource(), ["agronomy"]) == BASE.items(source, ["agronomy"])
    with pytest.raises(DataError, match="no such benchmark file") as caught:
        BASE.items(DataSource(), ["virology"])
    assert str(caught.value.where).endswith("cmmlu.zip/test/virology.csv")
    assert caught.value.hint == "the folder holds agronomy.csv"


def test_offline_without_the_archive_both_ways_out_are_named() -> None:
    with pytest.raises(DataError, match="the benchmark could not be loaded from the hub") as caught:
        BASE.items(DataSource(), ["agronomy"])
    assert "either connect to the hub" in str(caught.value) and "--data DIR" in str(caught.value)


@pytest.mark.parametrize("name", ["mbpp", "math"])
def test_sets_that_the_sample_suite_lacks_are_not_asked_from_it(name: str) -> None:
    with pytest.raises(DataError, match="could not be loaded from the hub") as caught:
        get_task(name, "base").items(DataSource())
    assert "--data DIR" in str(caught.value)
    assert "--sample has a few questions in the form of mmlu, ceval, gsm8k and humaneval" in str(caught.value)
    with pytest.raises(DataError, match=f"the sample suite has no {name}") as caught:
        get_task(name, "base").items(DataSource(sample=True))
    assert caught.value.hint == "it has ceval, gsm8k, humaneval, mmlu"
