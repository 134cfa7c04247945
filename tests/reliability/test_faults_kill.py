"""kill -9 and SIGTERM from outside, at moments that nobody chose: nothing that was finished is lost."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from answers import Answers, answers, assert_same
from evals.benchmark_data import write_mmlu
from starter import KILLS, Record, Starter
from tiny_families import write_calibration, write_family
from tiny_model import write_tiny_model

from qwenq.results import read_rows


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    modules = ("qwenq.evals.suite", "qwenq.evals.check", "qwenq.gptq.pipeline", "qwenq.runtime.engine")
    starter = Starter(tmp_path_factory.mktemp("kill"), *modules, "transformers.models.llama.modeling_llama")
    yield starter
    starter.close()


def evaluating(start: Starter, out: Path) -> list[object]:
    model, data = start.folder / "Tiny", start.folder / "data"
    if not data.exists():
        write_tiny_model(model, max_position_embeddings=2048)
        write_mmlu(data)
    asked = ["--tasks", "mmlu", "--protocol", "base", "--subjects", "abstract_algebra,astronomy"]
    how = ["--limit", 60, "--batch", 2, "--dtype", "float32", "--device", "cpu"]
    return ["eval", model, *asked, "--data", data, *how, "--out", out]


@pytest.mark.slow
def test_eval_survives_kill_9_at_random_moments(
    start: Starter, tmp_path: Path, record_property: Record
) -> None:
    status, _, shown = start(*evaluating(start, tmp_path / "warm"))
    assert status == 0, shown
    status, seconds, shown = start(*evaluating(start, tmp_path / "whole"))
    assert status == 0, shown
    expected, scores = answers(tmp_path / "whole"), values(tmp_path / "whole")
    assert len(expected) == 120
    draw, kills, folder, lost = random.Random(7), 0, 0, 0
    while kills < KILLS:
        folder += 1
        out = tmp_path / f"run{folder}"
        before: Answers = {}
        for _ in range(5):
            status, _, shown = start(*evaluating(start, out), after=draw.uniform(0.1, 0.9) * seconds)
            kills += status == -signal.SIGKILL
            now = answers(out)
            lost += len(before.keys() - now.keys())
            before = now
        status, _, shown = start(*evaluating(start, out))
        assert status == 0, shown
        lost += len(expected.keys() - answers(out).keys())
        assert_same(answers(out), expected)
        assert values(out) == scores
    record_property("faults", kills)
    record_property("lost", lost)
    assert lost == 0


def values(run: Path) -> list[tuple[str, float | None, int | None]]:
    return [(row.metric, row.value, row.n) for row in read_rows(run)]


@pytest.mark.slow
def test_eval_stops_at_sigterm_with_143_and_says_how_to_go_on(
    start: Starter, tmp_path: Path, record_property: Record
) -> None:
    status, _, shown = start(*evaluating(start, tmp_path / "whole"))
    assert status == 0, shown
    out, stops = tmp_path / "stopped", 0
    for more in (5, 15, 20, 20):  # of 120
        status, _, shown = start(*evaluating(start, out), at=(out, more), number=signal.SIGTERM)
        if status == 0:  # whoever looks at the lines got no turn until it was over
            break
        assert status == 143, shown
        assert "Traceback" not in shown
        assert "the same command goes on where it stopped" in shown
        stops += 1
    assert stops
    assert start(*evaluating(start, out))[0] == 0
    assert_same(answers(out), answers(tmp_path / "whole"))
    record_property("faults", stops)


@pytest.mark.slow
def test_quantize_survives_kill_9_at_random_moments(
    start: Starter, tmp_path: Path, record_property: Record
) -> None:
    model = write_family(tmp_path / "tiny", num_hidden_layers=4)
    calibration = write_calibration(model, tmp_path / "calibration.safetensors")

    def quantising(out: Path) -> list[object]:
        return ["quantize", model, "--calibration", calibration, "--out", out]

    status, _, shown = start(*quantising(tmp_path / "warm"))
    assert status == 0, shown
    status, seconds, shown = start(*quantising(tmp_path / "whole"))
    assert status == 0, shown
    draw, kills, folder, lost = random.Random(8), 0, 0, 0
    while kills < KILLS:
        folder += 1
        out, reached = tmp_path / f"q{folder}", 0
        for _ in range(4):
            status, _, shown = start(*quantising(out), after=draw.uniform(0.1, 1.0) * seconds)
            kills += status == -signal.SIGKILL
            said = re.search(r"resuming: (\d+) of 4 layers", shown)
            lost += max(0, reached - int(said[1])) if said else 0
            layers = list((tmp_path / f"q{folder}.partial" / "layers").glob("*.json"))
            reached = max(reached, len(layers)) if not out.exists() else reached
            assert status in (0, 2, -signal.SIGKILL), shown  # 2: it is there already
        status, _, shown = start(*quantising(out))
        assert status in (0, 2), shown
        for file in (tmp_path / "whole").iterdir():
            if file.name not in ("qwenq.json", "README.md"):  # times; the folder's name
                assert (out / file.name).read_bytes() == file.read_bytes()
    record_property("faults", kills)
    record_property("lost", lost)
    assert lost == 0
