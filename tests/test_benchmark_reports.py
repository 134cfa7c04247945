"""Reports of the benchmark scripts: rows say when and with what they were measured, whatever day it is."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_docs import ROOT

REPORTS = ROOT / "reports" / "benchmarks"
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def report(name: str) -> Any:
    return json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))


TABLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "decode_cpu": ("decode_vs_peers", ("rows", "ratios", "environment")),
    "eval": ("eval_vs_lm_eval", ("rows", "ratios", "cpu_ratios", "environment")),
    "memory": ("quantize_memory", ("rows", "environment")),
    "moe_decode": ("decode_moe", ("rows", "environment")),
    "moe_quantize": ("quantize_moe_shape", ("rows", "environment")),
    "quantize": ("_quantize_report", ("rows", "ratios", "environment")),
    **{
        file.stem: ("quantize_moe", ("mixture", "peers", "policies", "environment"))
        for file in sorted(REPORTS.glob("quantize_moe*.json"))
    },
    "quantize_qwen": ("_quantize_report", ("rows", "ratios", "environment")),
    "quantize_xeon": ("_quantize_report", ("rows", "ratios", "environment")),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_committed_for_people_is_made_of_the_committed_rows(load: Load, name: str) -> None:
    script, parts = TABLES[name]
    text = load(script).table(*(report(name)[part] for part in parts))
    assert (REPORTS / f"{name}.md").read_text(encoding="utf-8") == text


def test_a_mixture_of_another_model_is_reported_by_its_name_and_shape(load: Load) -> None:
    found = report("quantize_moe")
    shape = {"experts": 16, "active": 12, "width": 128, "shared": 2816, "hidden": 896, "layers": 24}
    other = found["mixture"] | {"model": "Qwen2.5-Coder-0.5B-Instruct"} | shape
    text = load("quantize_moe").table(other, found["peers"], found["policies"], found["environment"])
    assert "The model: Qwen2.5-Coder-0.5B-Instruct, each MLP cut into 16 experts of 128 channels, " in text
    assert "a shared expert of 2816" in text
    assert "the width is 896 of gate and up, 128 of down" in text
    assert "SmolLM2" not in text


def test_a_mixture_is_not_measured_among_the_figures_of_another(load: Load, tmp_path: Path) -> None:
    moe, dense = load("quantize_moe"), tmp_path / "dense"
    dense.mkdir()
    config = {"intermediate_size": 4864, "hidden_size": 896, "num_hidden_layers": 24}
    (dense / "config.json").write_text(json.dumps(config))
    asked = {"work": tmp_path, "name": "dense", "experts": 16, "active": 12, "width": 64}
    (tmp_path / "mixture.json").write_text(json.dumps({"lost": []}))  # made before
    folder, facts = moe.mixture_of(argparse.Namespace(**asked), dense)
    assert (folder, facts["shared"]) == (tmp_path / "dense-16x64", 4864 - 16 * 64)
    with pytest.raises(SystemExit, match="name another --work"):
        moe.mixture_of(argparse.Namespace(**asked | {"width": 128}), dense)


def shape_row(layers: int, peak: float, **changed: Any) -> dict[str, Any]:
    """A row of quantising blocks in their true shape."""
    [row] = report("moe_quantize")["rows"][:1]
    return row | {"model": "m", "layers": layers, "peak_rss_mib": peak} | changed


def test_the_report_of_block_shapes_keeps_its_rows_and_compares_depths(load: Load, tmp_path: Path) -> None:
    shapes = load("quantize_moe_shape")
    shapes.add(shape_row(1, 4000.0), tmp_path)
    shapes.add(shape_row(3, 9000.0), tmp_path)
    shapes.add(shape_row(1, 1000.0, model="a hybrid", linear_attention_layers=1), tmp_path)
    text = shapes.add(shape_row(3, 4040.0), tmp_path)  # measured again: in the place of the earlier one
    rows = json.loads((tmp_path / "moe_quantize.json").read_text())["rows"]
    assert [(row["model"], row["layers"]) for row in rows] == [("a hybrid", 1), ("m", 1), ("m", 3)]
    assert "Peak memory over depth: m at 3 layers 1.01 of that at 1. " in text
    assert "| 1, 1 of linear attention |" in text
    assert (tmp_path / "moe_quantize.md").read_text(encoding="utf-8") == text


def test_a_turn_of_block_shapes_is_measured_once(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, measured = load("quantize_moe_shape"), []

    def measure(options: argparse.Namespace, name: str, layers: int) -> dict[str, Any]:
        measured.append((name, layers, options.samples))
        return shape_row(layers, 1.0, tokens=shapes.tokens_of(options), threads=options.threads)

    monkeypatch.setattr(shapes, "measure", measure)
    options = argparse.Namespace(work=tmp_path, samples=16, seq_len=256, threads=2)
    rows = [shapes.once(options, "m", 1), shapes.once(options, "m", 1), shapes.once(options, "m", 3)]
    assert rows[0] == rows[1]
    shapes.once(argparse.Namespace(**vars(options) | {"samples": 8}), "m", 3)  # another text
    assert measured == [("m", 1, 16), ("m", 3, 16), ("m", 3, 8)]


def day(date: str, torch: str = "2.13.0") -> dict[str, Any]:
    return {"date": date, "cpu": "a CPU", "versions": {"torch": torch}}


def test_a_report_of_several_days_says_the_first_and_the_last(load: Load) -> None:
    common = load("_common")
    rows = [day("2026-02-03"), day("2026-01-02"), day("2026-01-02")]
    assert common.measured_on(rows, {"date": "2026-09-09"}) == "2026-01-02 to 2026-02-03"
    assert common.measured_on(rows[1:], {"date": "2026-09-09"}) == "2026-01-02"


def test_no_date_is_made_up_for_a_row_that_has_none(load: Load) -> None:
    common = load("_common")
    old = {"tool": "x"}
    assert common.measured_on([old], {"date": "2026-01-01"}) == "2026-01-01"  # an old report, as a whole
    assert common.measured_on([old], {}) == "a day that was not recorded"
    said = common.measured_on([old, day("2026-01-02")], {"date": "2026-09-09"})
    assert said == "2026-01-02, and on days that were not recorded"


def test_versions_that_differ_are_all_said(load: Load) -> None:
    common = load("_common")
    rows = [day("2026-01-01"), day("2026-01-02", "2.14.0"), day("2026-01-02")]
    assert common.shared(rows, {}, "versions", "torch") == "2.13.0 and 2.14.0"
    assert common.shared([{}], {"versions": {"torch": "1"}}, "versions", "torch") == "1"
    assert common.shared([{}], {}, "versions", "torch") == "(not recorded)"


def test_a_turn_of_an_earlier_day_keeps_its_day_in_the_eval_report(load: Load) -> None:
    race = load("eval_vs_lm_eval")
    kept = {"wall_s": 2.0, "cpu_s": None, "peak_rss_mib": 1.0, "threads": 2, "found": {"a": 1}, "scores": {}}
    asked = {"asked": "the first of each", "batch": 4}
    results = {
        f"{tool}.mmlu.float32": kept | day(date) | asked
        for tool, date in (("qwenq", "2026-01-01"), ("lm-eval", "2026-01-02"))
    }
    rows = [race.row_of(turn, results) for turn in race.TURNS if turn.name in results]
    assert [row["date"] for row in rows] == ["2026-01-01", "2026-01-02"]
    facts = race.environment(Path("model"))
    assert "date" not in facts
    text = race.table(rows, race.ratios(results, "wall_s"), {}, facts)
    assert "2026-01-01 to 2026-01-02" in text
    assert "MMLU: the first of each." in text


def test_what_was_asked_is_what_the_turn_was_given(load: Load) -> None:
    race = load("eval_vs_lm_eval")
    options = argparse.Namespace(subjects="a,b", mmlu_limit=80, gsm8k_limit=12)
    asked = [race.conditions(options, turn)["asked"] for turn in race.TURNS if turn.tool == "qwenq"]
    assert asked == ["a,b, the first 80 of each"] * 2 + ["the first 12 of test"] * 2


def append_to(load: Load, folder: Path, rows: list[dict[str, Any]], **changed: Any) -> list[dict[str, Any]]:
    facts = {"model": "m", "threads": 2, "cpu": "a CPU"}
    content = {"environment": facts | changed, "rows": rows}
    (folder / "decode_cpu.json").write_text(json.dumps(content), encoding="utf-8")
    options = argparse.Namespace(append=True, out=folder)
    found: list[dict[str, Any]] = load("decode_vs_peers").earlier(options, facts)
    return found


def test_turns_are_added_to_dated_ones_of_the_same_model_and_machine(load: Load, tmp_path: Path) -> None:
    rows = [{"tool": "qwenq", "turn": 1, **day("2026-01-01")}]
    assert append_to(load, tmp_path, rows) == rows
    for changed in ({"model": "another"}, {"threads": 1}, {"cpu": "another"}):
        with pytest.raises(SystemExit, match="without --append"):
            append_to(load, tmp_path, rows, **changed)
    with pytest.raises(SystemExit, match="turns without a date"):
        append_to(load, tmp_path, [{"tool": "qwenq", "turn": 1}])


def quantised(turns: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and facts of a report with so many turns."""
    rows: list[dict[str, Any]] = [{"tool": "unquantised", "perplexity": 20.0}]
    for turn in range(1, turns + 1):
        rows += [
            {"tool": tool, "turn": turn, "wall_s": 90.0 + turn, "peak_rss_mib": 1234.0, "perplexity": 22.0}
            | {"phases_s": {"calibration": 1.0, "layers": 60.0 + turn, "write": 0.5, "check": 20.0}}
            for tool in ("qwenq", "GPTQModel")
        ]
    return rows, report("quantize")["environment"] | {"turns": turns}


def test_one_turn_is_called_one_and_has_no_range(load: Load) -> None:
    peers = load("_quantize_report")
    rows, facts = quantised(1)
    text = peers.table(rows, {}, facts)
    assert "one turn each" in text
    assert "| range |" not in text and "91.0–91.0" not in text
    rows, facts = quantised(3)
    text = peers.table(rows, {}, facts)
    assert "medians of 3 alternating turns" in text
    assert "| 92.0 | 91.0–93.0 |" in text


def test_where_qwenqs_seconds_go_adds_up_to_all_of_them(load: Load) -> None:
    rows, facts = quantised(3)
    text = load("_quantize_report").table(rows, {}, facts)
    assert "layers 62.0, writing 0.5, the check 20.0" in text
    assert "exit 8.5" in text  # 92 less the phases


def test_quality_beyond_perplexity_is_shown_where_it_was_measured(load: Load) -> None:
    peers = load("_quantize_report")
    rows, facts = quantised(1)
    assert "KL" not in peers.lines(rows)  # an old report
    for row, unmarked, kl in zip(rows, (18.0, 19.0, 22.0), (None, 0.05, 0.08), strict=True):
        row.update({"perplexity_without_unk": unmarked} | ({} if kl is None else {"kl": kl}))
    table = peers.lines(rows).splitlines()
    assert table[0] == "|  | seconds | peak MiB | perplexity | added | added without `<unk>` | KL |"
    assert table[2] == "| unquantised |  |  | 20.00 |  |  |  |"
    assert table[3] == "| qwenq | 91.0 | 1234 | 22.00 | 2.00 | 1.00 | 0.0500 |"
    found = peers.ratios(rows)
    assert found["gap_vs_gptqmodel"] == 1.0
    assert found["gap_without_unk_vs_gptqmodel"] == 0.25
    assert found["kl_vs_gptqmodel"] == 0.625
    said = peers.comparison(found, facts)
    assert (
        "1.00 of the perplexity that it added (0.25 without the text's marks `<unk>`), 0.62 of its KL" in said
    )


def test_the_evaluator_tells_marks_from_text_and_one_model_from_another(load: Load) -> None:
    even = torch.zeros(4, 4)
    sure = torch.tensor([0.0, math.log(5), 0.0, 0.0]).expand(4, 4)  # token 1: 5/8, the others 1/8
    flat, peaked = (
        lambda row, logits=logits: SimpleNamespace(logits=logits[None]) for logits in (even, sure)
    )
    ids, unk = torch.tensor([[0, 1, 2, 1]]), torch.tensor([[False, False, True, False]])
    quality = load("_perplexity").quality
    found = quality(peaked, ids, unk, flat)
    assert found["perplexity"] == pytest.approx((8 / 5 * 8 * 8 / 5) ** (1 / 3), rel=1e-5)
    assert found["perplexity_without_unk"] == pytest.approx(8 / 5, rel=1e-5)
    expected = sum(math.log(0.25 / p) / 4 for p in (5 / 8, 1 / 8, 1 / 8, 1 / 8))
    assert found["kl"] == pytest.approx(expected, rel=1e-5)  # of the base from the model, not the other way
    assert quality(peaked, ids, unk, peaked)["kl"] == pytest.approx(0, abs=1e-6)
    assert "kl" not in quality(flat, ids, unk, None)


@pytest.mark.parametrize("turns", [1, 3])
def test_the_readme_says_how_many_turns_its_comparison_is_of(load: Load, turns: int) -> None:
    rows, facts = quantised(turns)
    ratios = dict.fromkeys(report("quantize")["ratios"], 0.5)
    text = load("readme").quantize_table("quantize", {"rows": rows, "environment": facts, "ratios": ratios})
    assert ("one turn each" if turns == 1 else "medians of 3 alternating turns") in text


def test_no_figure_of_the_readme_is_in_powers_of_ten(load: Load) -> None:
    row = {"tool": "transformers", "turn": 1, "decode_128": 20.04, "load_s": 0.257, "peak_rss_mib": 1201.4}
    line = load("decode_vs_peers").lines([row]).splitlines()[-1]
    assert line == "| transformers, not quantised: BF16 | 20.0 |  |  | 0.26 | 1201 |"


def test_the_demo_is_of_the_days_in_its_journal(load: Load, tmp_path: Path) -> None:
    script = load("readme")
    folder = tmp_path / "models" / script.MODEL
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {"versions": {}, "quantization": {}, "files": {}, "seconds": {}}
    manifest["calibration"] = dict.fromkeys(("source", "samples", "seq_len", "seed"), 0)
    manifest["check"] = {"modules": [{"error": 0.01, "rtn_error": 0.02}]}
    (folder / "qwenq.json").write_text(json.dumps(manifest))
    steps = [
        {"step": "a", "seconds": 1.0, "date": "2026-01-01"},
        {"step": "b", "seconds": 2.0, "date": "2026-01-02"},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    assert script.demo_report(tmp_path)["environment"]["date"] == "2026-01-01 to 2026-01-02"


def test_a_gpu_table_says_what_is_slower_and_what_whole_generations_gave(load: Load) -> None:
    """Int8 below BF16 is said in words, and a generation that was not warmed up beside its steps."""

    def row(metric: str, precision: str, value: float, tokens: int) -> dict[str, Any]:
        point = {"engine": "fast", "attention": "split", "tokens": tokens}
        model = {"family": "a", "precision": precision}
        return {"metric": metric, "model": model, "point": point, "value": value, "settings": {}}

    speeds = {"bf16": 100.0, "int8": 90.0, "int4": 150.0}
    rows = [
        row("speed.decode", name, value, tokens) for name, value in speeds.items() for tokens in (2048, 8192)
    ]
    facts = {"gpus": [{"name": "Imaginary GPU"}], "date": "2026-01-02"}
    report = {"environment": facts, "rows": [*rows, row("speed.protocol", "int4", 99.6, 2048)], "ratios": {}}
    text = load("readme").gpu_table(report)
    assert "Slower than BF16 over 8192 tokens: Int8 of a." in text
    assert "capturing CUDA graphs count, gave a, Int4 100." in text


def test_both_instruction_sets_stand_beside_each_other_where_both_were_measured(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(speed: float) -> dict[str, Any]:
        rows = [{"checkout": "after", "task": "Int4", "decode_128": speed, "prompt_512": 10 * speed}]
        return {"environment": {"threads": 2, "cpu": "A CPU", "date": "2026-01-02"}, "rows": rows}

    readme, avx2 = load("readme"), tmp_path / "before_after_avx2.json"
    monkeypatch.setitem(readme.BLOCKS, "cpus", (avx2, readme.cpus_table))
    alone = readme.cpus_table(report(50.0))
    assert "| Int4 | 50 | 500 |" in alone
    (tmp_path / "before_after_native.json").write_text(json.dumps(report(80.0)))
    both = readme.cpus_table(report(50.0))
    assert "decode 128, AVX2 | decode 128, AVX-512 |" in both
    assert "| Int4 | 50 | 80 | 500 | 800 |" in both
