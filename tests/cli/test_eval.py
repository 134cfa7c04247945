"""How far an evaluation is: running accuracy and time left, by a clock that goes on when it is told to."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qwenq import progress
from qwenq.cli import eval
from qwenq.comparison import Paired
from qwenq.events import Advance, Start
from qwenq.progress import StepListener
from qwenq.results import Model, Row


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def begin(shown: StepListener, items: int, recorded: int = 0) -> None:
    shown(Start("Tiny int4, mmlu", items, "items", recorded))


def judged(shown: StepListener, correct: bool | None) -> None:
    shown(Advance("Tiny int4, mmlu", result=correct))


def test_a_log_has_a_line_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StepListener() as shown:
        begin(shown, 40)
        for number in range(40):
            clock.now += 1
            judged(shown, number % 4 != 0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Tiny int4, mmlu: 40 items",
        "Tiny int4, mmlu: 10 of 40 items, 70.0% correct, 30 s left",
        "Tiny int4, mmlu: 20 of 40 items, 75.0% correct, 20 s left",
        "Tiny int4, mmlu: 30 of 40 items, 73.3% correct, 10 s left",
        "Tiny int4, mmlu: 40 of 40 items, 75.0% correct, 40 s",
    ]


def test_what_was_known_from_records_took_no_time(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with StepListener() as shown:
        begin(shown, 100, recorded=80)
        for _ in range(5):
            clock.now += 3
            judged(shown, True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Tiny int4, mmlu: 100 items, 80 answered earlier"
    assert lines[1] == "Tiny int4, mmlu: 84 of 100 items, 100.0% correct of the new answers, 48 s left"


def test_answers_whose_programs_have_not_run_count_in_no_accuracy(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with StepListener() as shown:
        begin(shown, 2)
        judged(shown, None)
        judged(shown, None)
        shown(Start("Tiny int4, mmlu: running programs", 2, "programs"))
        clock.now += 4
        judged(shown, True)
        judged(shown, False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["Tiny int4, mmlu: running programs: 2 of 2 programs, 50.0% correct, 4 s"]


def test_a_terminal_shows_the_accuracy_and_the_time_left(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = bar_of(clock, monkeypatch)
    with StepListener() as shown:
        begin(shown, 40)
        for number in range(20):
            clock.now += 2
            judged(shown, number % 4 != 0)
        line = line_of(bar)
    assert "Tiny int4, mmlu" in line
    assert "20/40 75.0% correct 0:00:40 left" in line


def test_the_time_left_goes_on_while_an_answer_is_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rich's own column it stands still until the next item, for minutes."""
    bar = bar_of(clock, monkeypatch)
    with StepListener() as shown:
        begin(shown, 10, recorded=5)
        seen = [line_of(bar)]
        for seconds in (3600, 600, 300, 17100, 1000):
            clock.now += seconds
            if seconds == 3600:
                judged(shown, True)
            seen.append(line_of(bar))
        judged(shown, True)
        seen.append(line_of(bar))
    times = [line.partition(" left")[0].rpartition(" ")[2] for line in seen]
    assert times == ["-:--:--", "4:00:00", "3:50:00", "3:45:00", "0:00:00", "0:00:00", "9:25:00"]


def bar_of(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bar that a terminal gets, by this clock."""
    bar = progress._bar("items")
    bar.live.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar.get_time = clock.monotonic
    monkeypatch.setattr(progress, "_bar", lambda unit: bar)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    return bar


def line_of(bar: Any) -> str:
    """What it shows now."""
    bar.refresh()
    text = Console(file=io.StringIO(), width=120)
    text.print(bar.get_renderable())
    return text.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def row(precision: str, **details: Any) -> Row:
    point = {"task": "mmlu", "protocol": "base"}
    model = Model("Tiny", f"sha256:{precision}", precision, "Tiny")
    return Row("accuracy", model, point, 0.5, "share", 0.4, 0.6, 60, details=details)


def test_a_model_beside_its_base_is_shown_by_its_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Subjects that count alike moved the score by +0.3 points, though more items were lost than won."""
    found = {**Paired(500, 40, 15).to_json(0.003), "base": "fp32"}
    why = "other items: 1 of 61 are in one of the two only"
    eval.print_table(tmp_path, [row("fp32"), row("int8", paired=found), row("int4", unpaired=why)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["mmlu", "Tiny", name, "50.0%"] for name in ("fp32", "int8", "int4")
    ]
    assert lines[4] == "protocol: base"  # the same in all rows, as are the columns without a figure
    said = f"change +0.3 points, lost / won 40 / 15, p 0.001; fp32: {found['sentence']}"
    assert lines[5:7] == [f"mmlu, Tiny int8: {said}", f"mmlu, Tiny int4: {why}"]


def test_scores_at_guessing_level_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guessed = replace(row("fp32"), value=0.3, low=0.2, point={"task": "mmlu", "protocol": "card"})
    none_right = replace(row("fp32"), value=0.0, low=0.0, point={"task": "gsm8k", "protocol": "base"})
    eval.print_table(tmp_path, [guessed, replace(guessed, model=row("int8").model), none_right])
    shown = capsys.readouterr().out
    says_nothing = "this score cannot show what quantising cost"
    remedy = "; a small model may do better with --protocol base"
    assert f"mmlu, Tiny fp32, Tiny int8: at guessing level (25%): {says_nothing}{remedy}\n" in shown
    assert f"gsm8k, Tiny fp32: no item answered correctly: {says_nothing}\n" in shown


def test_a_narrow_terminal_has_room_for_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    narrow = partial(Console, file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("rich.console.Console", narrow)
    eval.print_table(tmp_path, [row("fp32"), row("int8", unpaired="why")])
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines[:3])) <= 80
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["mmlu", "Tiny", name, "50.0%"] for name in ("fp32", "int8")
    ]


NAME = "Tiny[red]:bug:[/b]"


def test_a_name_is_shown_as_it_is(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What looks like a style, its end or a picture in rich's own language is a name here."""
    named = row("fp32", unpaired=NAME)
    eval.print_table(tmp_path / NAME, [replace(named, model=replace(named.model, name=NAME))])
    _, line, _, compared, folder = capsys.readouterr().out.splitlines()
    assert f"{NAME} fp32" in line and compared.endswith(NAME)
    assert folder.endswith(NAME)
    bar = bar_of(clock, monkeypatch)
    with StepListener() as shown:
        shown(Start(f"{NAME} int4, mmlu", 2, "items"))
        assert f"{NAME} int4, mmlu" in line_of(bar)


def test_one_item_and_no_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A split without answers has no table; a single item is no items."""
    with StepListener() as shown:
        begin(shown, 1)
    assert capsys.readouterr().err.splitlines() == ["Tiny int4, mmlu: 1 item"]
    eval.print_table(tmp_path, [])
    assert capsys.readouterr().out == f"run folder: {tmp_path}\n"


def test_what_was_limited_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit above the number of a task's items is none of that task's."""
    whole, other = row("fp32"), row("fp32")
    cut = replace(other, point={**other.point, "task": "gsm8k", "limit": 5})
    more = replace(other, point={**other.point, "task": "mmlu", "limit": 8})
    line = "limited to the first 5 items of each subject or task"
    both = [f"gsm8k: {line}", f"mmlu: {line.replace('5', '8')}"]
    for rows, said in (([whole], []), ([cut], [line]), ([whole, cut], both[:1]), ([cut, more], both)):
        eval.print_table(tmp_path, rows)
        assert [one for one in capsys.readouterr().out.splitlines() if "limited to" in one] == said


def compared(task: str, lost: int, won: int, *, cut: int = 0) -> Row:
    """A row of an Int4 with its comparison, as an evaluation records it."""
    change = (won - lost) / 100
    details = {"paired": {**Paired(100, lost, won).to_json(change), "base": "fp32"}}
    details |= {"cut": {"answers": cut, "of": 100}}
    return replace(
        row("int4", **details), point={"task": task, "protocol": "card"}, value=0.5 + change, n=100
    )


def printed(rows: list[Row], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    eval.print_table(folder, rows)
    return capsys.readouterr().out


def test_the_last_line_has_the_largest_drop_what_could_be_seen_and_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of the first report: 6 of 100 items lost in one of four tasks, significant only alone."""
    rows = [compared("gsm8k", 6, 0), *(compared(task, 1, 1) for task in ("mmlu", "ceval", "humaneval"))]
    out = printed(rows, tmp_path, capsys)
    assert "Tiny int4 beside its base: gsm8k fell most: 50.0 → 44.0 % (−6.0 points, 95 % interval" in out
    assert "p = 0.031, 0.125 after Holm's correction for 4 tests); its 100 items show a drop of" in out
    assert "points 4 times in 5, but not one of 2; verdict: inconclusive (TOST excludes a change of 2" in out
    assert "(p = 0.031), which one of 4 tests may show by chance" in out
    assert "no loss" not in out


def test_a_loss_is_called_one_and_a_gain_by_chance_is_not_sold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed([compared("gsm8k", 20, 1), compared("mmlu", 1, 10)], tmp_path, capsys)
    assert "verdict: a loss in 1 of 2 tasks (gsm8k)" in out
    assert "gain: +9.0 points" in out and "mmlu" not in out.rpartition("beside its base")[2]
    out = printed([compared("mmlu", 0, 6), *(compared(f"t{n}", 0, 0) for n in range(3))], tmp_path, capsys)
    assert "which one of 4 tests may show by chance" in out


def test_tasks_that_could_not_be_compared_are_counted_in_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = replace(row("int4", unpaired="other items"), point={"task": "ceval", "protocol": "card"})
    out = printed([compared("mmlu", 0, 0), apart], tmp_path, capsys)
    assert "in 0 of 1 task; 1 not compared item by item)" in out


def test_a_score_at_guessing_level_is_said_to_show_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = replace(compared("mmlu", 1, 1), value=0.28, low=0.24)
    none = replace(compared("humaneval", 1, 1), value=0.0, low=0.0)
    out = printed([near, none, replace(compared("gsm8k", 1, 1), low=0.2)], tmp_path, capsys)
    said = "this score cannot show what quantising cost"
    assert f"mmlu, Tiny int4: at guessing level (25%): {said}" in out
    assert f"humaneval, Tiny int4: no item answered correctly: {said}" in out
    assert out.count(said) == 2


@pytest.mark.parametrize(("cut", "warned"), [(0, False), (2, False), (3, True)])
def test_more_than_two_percent_of_answers_cut_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: int, warned: bool
) -> None:
    out = printed([compared("gsm8k", 1, 1, cut=cut)], tmp_path, capsys)
    line = f"warning: gsm8k, Tiny int4: {cut} of 100 answers ({cut}.0%) were cut at their limit of tokens"
    assert (line in out) is warned
    assert f"{cut}.0%" in out, "the share is a column"
