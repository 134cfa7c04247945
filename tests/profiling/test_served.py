"""`qwenq profile --endpoint` against a server on loopback that misbehaves in the ways of real ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listening import notices_to
from profiling.streaming_server import Body, Server

from qwenq import api
from qwenq.cli import main
from qwenq.environment import environment
from qwenq.errors import QwenqError, UsageError
from qwenq.http import ATTEMPTS, Again
from qwenq.profiling.served import METRICS, Load, closed_loop, find_target, profile_served
from qwenq.profiling.stream import Answer
from qwenq.reporting.collect import collect
from qwenq.reporting.report import make_report
from qwenq.reporting.write import write_report
from qwenq.results import Row, append_row, read_environment, read_rows

SMALL = Load((1, 3), 20, 6)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenq.profiling.served.SECONDS", 1.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def measure(
    server: Server, out: Path, load: Load = SMALL, said: list[str] | None = None, timeout: float = 0.5
) -> dict[tuple[Any, str], Row]:
    listener = notices_to([] if said is None else said)
    target = find_target(server.url, None, None, listener, timeout=timeout)
    target = replace(target, server=replace(target.server, pause=0.001))
    rows = profile_served(target, load, out, listener, environment={})
    return {(row.point["concurrency"], row.metric): row for row in rows}


def test_each_concurrency_has_every_figure(server: Server, tmp_path: Path) -> None:
    server.first, server.between = 0.03, 0.004
    said: list[str] = []
    rows = measure(server, tmp_path, said=said)
    assert set(rows) == {(number, metric) for number in (1, 3) for metric in METRICS}
    assert all(row.status == "ok" and row.unit == METRICS[row.metric] for row in rows.values())
    for number in (1, 3):
        # The server sleeps so long: a clock that is read wrongly would show less, a busy machine only more.
        first, gap, speed = (
            rows[number, name].value
            for name in ("time.first_token.p50", "time.inter_token.p50", "speed.served")
        )
        assert first is not None and gap is not None and speed is not None
        assert first >= 0.03
        assert gap >= 0.004
        assert speed <= number * 6 / (0.03 + 5 * 0.004)
        assert rows[number, "failed.served"].value == 0
        assert rows[number, "time.inter_token.p99"].value >= gap
    assert server.most_busy == 3, "as many requests at once as were asked for"
    assert said == []


def test_prompts_have_the_tokens_asked_for_and_none_is_sent_twice(server: Server, tmp_path: Path) -> None:
    server.beginning = 3
    row = measure(server, tmp_path, Load((2,), 20, 6))[2, "speed.served"]
    assert row.details["prompt_tokens"] == 20
    assert {len(body["prompt"].split()) for body in server.streamed} == {17}
    assert len({body["prompt"] for body in server.streamed}) == len(server.streamed), "it would be cached"
    assert all(body["max_tokens"] in (6,) and body["ignore_eos"] for body in server.streamed)
    assert row.settings["ignore_eos"] == "sent"


def test_requests_of_the_warm_up_are_not_counted(server: Server, tmp_path: Path) -> None:
    rows = measure(server, tmp_path, Load((2,), 8, 4))
    assert rows[2, "failed.served"].n == len(server.streamed) - 1 - 2  # the first request, and two at once


def test_options_that_the_server_refuses_are_left_out(server: Server, tmp_path: Path) -> None:
    server.refuses, server.ends_at = ("ignore_eos", "stream_options"), 3
    said: list[str] = []
    row = measure(server, tmp_path, Load((2,), 8, 6), said)[2, "speed.served"]
    assert row.settings["ignore_eos"] == "refused"
    assert row.details["tokens_per_answer"] == 3
    assert set(row.details["counted_by"]) == {"chunks"}
    assert sum("refuses the option" in text for text in said) == 2
    assert any("fewer than 6 tokens; tokens/s counts those that came" in text for text in said)
    assert any("the server streams no usage" in text for text in said)


def test_a_server_that_passes_over_ignore_eos_is_found_out(server: Server, tmp_path: Path) -> None:
    server.ends_at, server.ignores_eos = 3, False
    said: list[str] = []
    row = measure(server, tmp_path, Load((1,), 8, 6), said)[1, "speed.served"]
    assert row.details["counted_by"] == {"usage": row.details["requests"]}
    assert row.details["tokens_per_answer"] == 3
    assert any("fewer than 6 tokens" in text for text in said)


def nothing(prompt: int, tokens: int) -> Body | None:
    return None


def test_a_server_without_usage_is_counted_by_chunks(server: Server, tmp_path: Path) -> None:
    server.usage = nothing
    said: list[str] = []
    row = measure(server, tmp_path, Load((1,), 8, 6), said)[1, "speed.served"]
    assert row.details["prompt_tokens"] is None
    assert row.details["tokens_per_answer"] == 6
    assert any("a prompt is 8 words" in text for text in said)
    assert any("counted by chunks: the server streams no usage" in text for text in said)


@pytest.mark.parametrize("told", [600, 2, -1, True, "6", 6.5])
def test_usage_that_contradicts_the_stream_is_not_believed(server: Server, tmp_path: Path, told: Any) -> None:
    """More tokens than were asked for, or fewer than chunks."""
    server.usage = lambda prompt, tokens: {"prompt_tokens": 10**6, "completion_tokens": told}
    said: list[str] = []
    row = measure(server, tmp_path, Load((1,), 8, 6), said)[1, "speed.served"]
    assert set(row.details["counted_by"]) == {"contradicted"}
    assert row.details["tokens_per_answer"] == 6
    assert row.details["prompt_tokens"] is None
    assert any("contradicts what was streamed" in text for text in said)


def test_chunks_of_several_tokens_are_reported(server: Server, tmp_path: Path) -> None:
    server.ends_at, server.ignores_eos = 3, False
    server.usage = lambda prompt, tokens: {"prompt_tokens": prompt, "completion_tokens": 2 * tokens}
    said: list[str] = []
    row = measure(server, tmp_path, Load((1,), 8, 6), said)[1, "speed.served"]
    assert row.details["tokens_per_chunk"] == 2
    assert any("a chunk holds 2.0 tokens" in text for text in said)


@pytest.mark.parametrize(("trouble", "reason"), [
    ("stall", "nothing came for 0.5 s"), ("drop", "the stream breaks off after 2 chunks"),
    ("error", "an error within the stream: out of memory"), ("garbage", "a chunk is not JSON"),
    ("hang up", "Remote end closed connection"), ("forever", "more than the 6 tokens"), ("500", "status 500"),
])  # fmt: skip
def test_a_request_that_fails_is_counted_with_its_reason(
    server: Server, tmp_path: Path, trouble: str, reason: str
) -> None:
    server.trouble = ["", "", trouble]  # after the first request and the warm-up
    said: list[str] = []
    rows = measure(server, tmp_path, Load((1,), 8, 6), said)
    failed, speed = rows[1, "failed.served"], rows[1, "speed.served"]
    assert failed.value == pytest.approx(1 / failed.n)
    assert failed.low < failed.value < failed.high
    (found,) = speed.details["failed"]
    assert reason in found
    assert any("1 of" in text and reason in text for text in said)
    assert speed.status == "ok"


def test_a_busy_server_is_asked_again_and_that_is_counted(server: Server, tmp_path: Path) -> None:
    server.trouble = ["", "", "429", "429", "503"]
    said: list[str] = []
    rows = measure(server, tmp_path, Load((1,), 8, 6), said)
    assert rows[1, "failed.served"].value == 0
    assert rows[1, "speed.served"].details["refused_busy"] == 3
    assert any("too busy 3 times" in text for text in said)


def test_a_concurrency_that_the_server_refuses_is_counted(server: Server, tmp_path: Path) -> None:
    server.first, server.at_once = 0.01, 2
    said: list[str] = []
    rows = measure(server, tmp_path, Load((4,), 8, 6), said)
    assert rows[4, "speed.served"].status == "ok"
    assert rows[4, "speed.served"].details["refused_busy"] > 0
    assert any("the server was too busy" in text and "sent again later" in text for text in said)


def test_where_every_request_fails_there_is_an_error_and_rows_with_the_reason(
    server: Server, tmp_path: Path
) -> None:
    server.trouble = ["", *["drop"] * 500]
    with pytest.raises(QwenqError, match="no request was answered: all 5 requests failed"):
        measure(server, tmp_path, Load((1,), 8, 6))
    rows = {row.metric: row for row in read_rows(tmp_path)}
    assert rows["speed.served"].status == "failed"
    assert rows["failed.served"].value == 1
    assert len(server.streamed) < 10, "a server that always fails is left alone"
    server.trouble = []
    assert measure(server, tmp_path, Load((1,), 8, 6))[1, "speed.served"].status == "ok"


def test_a_server_that_refuses_every_request_is_left_alone(server: Server, tmp_path: Path) -> None:
    """Each request is sent again with backoff, and counted as failed in the end."""
    server.trouble = ["", "429", "…"]
    with pytest.raises(QwenqError, match=r"all \d requests failed, \d of them: status 429"):
        measure(server, tmp_path, Load((1,), 8, 6))
    (failed,) = (row for row in read_rows(tmp_path) if row.metric == "failed.served")
    assert failed.value == 1
    ((reason, count),) = failed.details["failed"].items()
    assert reason.startswith("status 429") and count == failed.n <= 5
    assert len(server.streamed) <= 1 + ATTEMPTS * (1 + 5)


@pytest.mark.parametrize(("trouble", "match"), [
    ("json", "does not stream: it sends application/json"), ("400", "status 400"), ("404", "status 404"),
    ("drop", "warm-up request failed three times, the last: the stream breaks off"),
    ("429", "warm-up request failed three times, the last: status 429"),
])  # fmt: skip
def test_a_server_that_cannot_be_measured_is_an_error_at_once(
    server: Server, tmp_path: Path, trouble: str, match: str
) -> None:
    server.trouble = [trouble, "…"]
    with pytest.raises(QwenqError, match=match):
        measure(server, tmp_path)
    assert not list(tmp_path.glob("results*"))


def test_neither_a_wrong_address_nor_a_wrong_model_is_measured(server: Server) -> None:
    with pytest.raises(UsageError, match="small is not served there"):
        find_target(server.url, "small", None)
    with pytest.raises(UsageError, match="not an address"):
        find_target("localhost", None, None)
    with pytest.raises(QwenqError, match="no server answers"):
        find_target("http://127.0.0.1:9/v1", "m", None)
    with pytest.raises(UsageError, match="not the precision of one model"):
        find_target(server.url, None, None, precision="fp32,bf16")


@pytest.mark.parametrize("wrong", [
    {"concurrency": ()}, {"concurrency": (0,)}, {"concurrency": (5000,)}, {"input": 0}, {"output": 1},
])  # fmt: skip
def test_a_load_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="out of range") as caught:
        Load(**wrong)
    assert caught.value.where == f"--{next(iter(wrong))}"


def test_what_is_measured_is_kept_and_not_measured_again(server: Server, tmp_path: Path) -> None:
    first = measure(server, tmp_path, Load((1,), 8, 6))
    asked = len(server.streamed)
    said: list[str] = []
    assert measure(server, tmp_path, Load((1,), 8, 6), said) == first
    assert len(server.streamed) == asked
    assert said == ["1 of 1 points were measured earlier"]
    assert set(measure(server, tmp_path, Load((1, 2), 8, 6))) == {
        (n, name) for n in (1, 2) for name in METRICS
    }


def test_no_request_is_sent_after_the_time() -> None:
    sent: list[int] = []

    def send(stop: threading.Event, number: int) -> Answer:
        sent.append(number)
        time.sleep(0.05)
        return Answer(0.01, (0.01,), 2, "usage", 5)

    found = closed_loop(send, 2, 100, 0.12)
    assert found.cut
    assert len(found.answers) == len(sent) < 10
    assert len(closed_loop(send, 4, 100, 0.0).answers) == 4, "each client's first request is sent"


def test_a_loop_whose_requests_all_fail_ends() -> None:
    def send(stop: threading.Event, number: int) -> Answer:
        raise Again("broken")

    found = closed_loop(send, 2, 1000, 60.0)
    assert not found.answers
    assert len(found.failures) == 6, "three by each client"


def test_an_error_of_this_program_is_no_failed_request() -> None:
    def send(stop: threading.Event, number: int) -> Answer:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        closed_loop(send, 2, 10, 1.0)


def shell(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["qwenq", "profile", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_prints_a_table_and_records_where_it_ran(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options = ("--endpoint", server.url, "--concurrency", "1,2", "--input", "8", "--output", "6")
    assert shell(monkeypatch, *options, "--precision", "int4") == 0
    said = capsys.readouterr()
    assert "model: Speed as served" in said.out
    shown = " ".join(said.out.split())
    assert "TTFT" in shown and "p99" in shown and "Int4" in shown
    assert "context: 8 tokens" in shown and "tokens: 6 of an answer" in shown
    assert "1 of 2: model-GPTQ-Int4, concurrency 1" in said.err
    run = Path("runs/served-model-GPTQ-Int4")
    rows = read_rows(run)
    assert rows[0].details["command"].startswith("qwenq profile --endpoint")
    assert rows[0].model.family == "model"
    assert rows[0].settings["machine"]["cpu"] == read_environment(run)["cpu"] == environment()["cpu"]
    assert server.keys == {"Bearer secret"}
    assert "secret" not in (run / "results.jsonl").read_text()
    assert shell(monkeypatch, *options, "--precision", "int4", "--json") == 0
    assert capsys.readouterr().out == "", "nothing is measured twice"


@pytest.mark.parametrize(("options", "match"), [
    (["bundled", "--endpoint", "URL"], "only the server's model"),
    (["--endpoint", "URL", "--device", "cpu"], "the server decides how it runs its model"),
    (["--endpoint", "URL", "--tokens", "8"], "the server decides how it runs its model"),
    (["--endpoint", "URL", "--concurrency", "many"], "not a list of whole numbers"),
    (["--endpoint", "URL", "--output", "1"], "out of range"),
    (["--concurrency", "4"], "--concurrency is of a served model"),
    (["--model", "m"], "--model is of a served model"),
])  # fmt: skip
def test_options_that_exclude_each_other_are_refused(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    match: str,
) -> None:
    given = [server.url if option == "URL" else option for option in options]
    assert shell(monkeypatch, *given) == 2
    assert match in capsys.readouterr().err
    assert server.streamed == []


def test_ctrl_c_keeps_what_is_measured(server: Server, tmp_path: Path) -> None:
    """A real process: it is interrupted in the second concurrency, and its first is complete."""
    server.first = 0.02
    command = [sys.executable, "-m", "qwenq", "profile", "--endpoint", server.url, "--concurrency", "1,2"]
    options = ["--input", "8", "--output", "6", "--budget", "40s", "--out", tmp_path / "run"]
    found = tmp_path / "run" / "results.jsonl"
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (found.exists() and server.most_busy == 2):
            time.sleep(0.05)
        server.first = 0.2  # a repetition takes 0.8 s: some are complete, and the point is not
        time.sleep(2.0)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGINT, said
    assert "what is measured is kept" in said
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    assert {row["metric"] for row in rows} == set(METRICS)
    assert {row["point"]["concurrency"] for row in rows} == {1}


def test_from_python(server: Server, tmp_path: Path) -> None:
    load = {"concurrency": [1], "input": 8, "output": 6, "precision": ["int4"]}
    found = api.profile(endpoint=server.url, out=tmp_path / "run", progress=False, **load)
    assert found.rows[0].model.precision == "int4"
    assert {row.metric for row in found.rows} == set(METRICS)
    with pytest.raises(UsageError, match="only the server's model"):
        api.profile("bundled", endpoint=server.url)


def of(row: Row, precision: str, speed: float, out: Path) -> None:
    """Append rows like this one's, of another model."""
    model = replace(row.model, precision=precision, fingerprint=precision, name=f"model-{precision}")
    for concurrency, factor in ((1, 1.0), (4, 3.0), (16, 6.0)):
        place = {**row.point, "concurrency": concurrency}
        speeds = speed * factor * (0.5 if precision == "int4" and concurrency == 16 else 1)
        common = replace(row, model=model, point=place, low=None, high=None)
        append_row(out, replace(common, metric="speed.served", value=speeds, unit="tokens/s"))
        for kind in ("first_token", "inter_token"):
            seconds = concurrency / speeds
            append_row(out, replace(common, metric=f"time.{kind}.p50", value=seconds, unit="seconds"))


def test_a_report_shows_where_two_precisions_cross(server: Server, tmp_path: Path) -> None:
    row = measure(server, tmp_path / "one", Load((1,), 8, 6))[1, "speed.served"]
    of(row, "bf16", 20.0, tmp_path / "two")
    of(row, "int4", 30.0, tmp_path / "two")
    (section,) = make_report(collect([tmp_path / "two"]), "t").sections
    (table,) = [table for table in section.tables if table.key == "served"]
    assert [line.cells[1].text for line in table.lines] == ["1", "4", "16"] * 2
    assert section.summary == (
        "As served, BF16 and Int4 cross: BF16 has the higher throughput at concurrency 16, Int4 at 1, 4.",
    )
    assert any("tokens counted by the server's usage" in text for text in table.caption)
    figures = {figure.key: figure for figure in section.figures}
    lines = {series.name: series for series in figures["served_inter_token"].series}
    assert set(lines) == {"BF16", "Int4"}
    assert [point.label for point in lines["Int4"].points] == [f"concurrency {n}" for n in (1, 4, 16)]
    assert lines["BF16"].points[0].x == pytest.approx(50.0)
    write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "report", None)
    assert any((tmp_path / "report" / "plots").glob("*served_first_token.png"))
    assert "Speed as served" in (tmp_path / "report" / "index.html").read_text()


def served_run(server: Server, out: Path, precision: str = "bf16") -> Path:
    target = find_target(server.url, None, None, precision=precision)
    profile_served(target, Load((1,), 8, 6), out, environment=environment())
    return out


def test_runs_of_one_kind_of_server_on_one_machine_are_compared(server: Server, tmp_path: Path) -> None:
    """Whatever the port, which is another one at each start."""
    before = served_run(server, tmp_path / "before")
    with Server() as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        after = served_run(other, tmp_path / "after")
        other.shutdown()
    verdict = api.compare(before, after, fail_on="speed:<0.01, time:>10, failed:>0.5")
    assert verdict.exit_code == 0, verdict.headline
    assert len(verdict.of("passed")) == len(METRICS)
    slow = tmp_path / "slow"
    for row in read_rows(after):
        figures = (
            {"value": 0.001, "low": 0.001, "high": 0.001, "n": 9} if row.metric == "speed.served" else {}
        )
        append_row(slow, replace(row, **figures))
    assert api.compare(before, slow, fail_on="speed:<0.5").exit_code == 1


@pytest.mark.parametrize(("change", "why"), [
    ({"kind": "sglang"}, "another server: sglang instead of vllm"),
    ({"kind": None}, "another server: unknown instead of vllm"),
    ({"place": "0123"}, "a server on another machine"),
    (None, "a run does not record its server"),
])  # fmt: skip
def test_other_servers_are_not_compared(
    server: Server, tmp_path: Path, change: dict[str, Any] | None, why: str
) -> None:
    before, after = served_run(server, tmp_path / "before"), tmp_path / "after"
    for row in read_rows(before):
        found = None if change is None else {**row.settings["server"], **change}
        append_row(after, replace(row, settings={**row.settings, "server": found}))
    verdict = api.compare(before, after, fail_on="speed:<0.5")
    assert verdict.exit_code == 3
    assert verdict.of("not comparable")[0].reason == why


def test_a_server_on_another_processor_is_not_compared(server: Server, tmp_path: Path) -> None:
    before, after = served_run(server, tmp_path / "before"), tmp_path / "after"
    for row in read_rows(before):
        machine = {**row.settings["machine"], "cpu": {**row.settings["machine"]["cpu"], "model": "Other"}}
        append_row(after, replace(row, settings={**row.settings, "machine": machine}))
    verdict = api.compare(before, after, fail_on="speed:<0.5")
    assert "another machine: processor Other instead of" in verdict.of("not comparable")[0].reason


def test_a_report_says_where_the_server_ran(server: Server, tmp_path: Path) -> None:
    (section,) = make_report(collect([served_run(server, tmp_path / "run")]), "t").sections
    (table,) = [table for table in section.tables if table.key == "served"]
    caption = "; ".join(table.caption)
    assert "list of models: vllm; the server's address is the machine below" in caption
