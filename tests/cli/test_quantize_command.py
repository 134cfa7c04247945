"""``qwenq quantize`` as a user runs it: what it prints and what it makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from quantize_shell import TEXT, QuantizeShell


def test_a_run_says_its_choices_each_layer_and_what_came_of_it(
    quantize: QuantizeShell, calibration: Path
) -> None:
    ran = quantize("--bits", 4, "--calibration", calibration, "--out", "q")
    assert ran.code == 0, ran.err
    assert "group size 32: the largest" in ran.out
    lines = [line for line in ran.out.splitlines() if line.startswith("  layer ")]
    assert len(lines) == 3
    form = re.compile(
        r"error on calibration text [\d.]+%, round-to-nearest [\d.]+%; [\d.]+ s, \d+:\d\d:\d\d left$"
    )
    assert all(form.search(line) for line in lines)
    for label in ("checkpoint", "size", "time", "KL", "same token", "perplexity", "verdict"):
        assert re.search(rf"^{label}\s", ran.out, re.MULTILINE), label
    assert "\x1b" not in ran.out  # no terminal, no colours
    assert Path("q/qwenq.json").is_file()


def test_json_lines_for_machines(quantize: QuantizeShell, calibration: Path) -> None:
    ran = quantize("--bits", 8, "--calibration", calibration, "--out", "q", "--json")
    events = [json.loads(line) for line in ran.out.splitlines()]
    layers = [event for event in events if event["event"] == "layer"]
    assert [(layer["index"], layer["total"], layer["resumed"]) for layer in layers] == [
        (0, 3, False), (1, 3, False), (2, 3, False)
    ]  # fmt: skip
    assert all(layer["error"] < layer["rtn_error"] for layer in layers)
    assert events[-1]["event"] == "result"
    assert events[-1]["check"]["broken"] is False
    assert Path(events[-1]["folder"]) == Path("q").absolute()


def test_text_files_are_calibration_and_the_name_is_made_up(quantize: QuantizeShell, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    ran = quantize("--calibration", "text.txt", "--samples", 2, "--seq-len", 32, "--bits", 8)
    assert ran.code == 0, ran.err
    assert (tmp_path / "tiny-GPTQ-Int8" / "model.safetensors").is_file()


def test_options_reach_the_config(quantize: QuantizeShell, calibration: Path) -> None:
    grid = ("--bits", 8, "--group-size", -1, "--asym", "--any-engine", "--scale-search", "mse")
    solver = ("--act-order", "none", "--damp", 0.05, "--no-coordinate-descent", "--dtype", "float32")
    ran = quantize(*grid, *solver, "--calibration", calibration, "--out", "q")
    assert ran.code == 0, ran.err
    said = json.loads(Path("q/config.json").read_text())["quantization_config"]
    wanted = {"bits": 8, "group_size": -1, "sym": False, "static_groups": False, "damp_percent": 0.05}
    assert said["checkpoint_format"] == "gptq_v2"  # GPTQModel refuses free zero points in the first format
    assert wanted.items() <= said.items()
    recipe = json.loads(Path("q/qwenq.json").read_text())["recipe"]["quantize"]
    assert (recipe["scale_search"], recipe["coordinate_descent"], recipe["act_order"]) == (
        "mse",
        False,
        "none",
    )


def test_a_recipe_file_with_options_over_it(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path
) -> None:
    text = f'[calibration]\nsource = "{calibration}"\n[quantize]\nbits = 4\nsym = false\nany_engine = true'
    (tmp_path / "r.toml").write_text(text)
    ran = quantize("--recipe", "r.toml", "--bits", 8, "--out", "q")
    assert ran.code == 0, ran.err
    said = json.loads(Path("q/config.json").read_text())["quantization_config"]
    assert (said["bits"], said["sym"]) == (8, False)


def test_a_source_that_is_named_here_is_not_held_to_what_the_recipe_says_of_its_own(
    quantize: QuantizeShell, calibration: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[calibration]\nsource = "owner/texts"\nsamples = 99\nseq_len = 64\nsplit = "test"\ncolumn = "body"\n'
    )
    ran = quantize("--recipe", recipe, "--calibration", calibration, "--out", "q")
    assert ran.code == 0, ran.err
    assert "(the sizes of that set)" in ran.out
    ran = quantize("--recipe", recipe, "--calibration", "self", "--samples", 2, "--out", "q-self")
    assert ran.code == 0, ran.err
    assert "2 × 64 tokens (as asked) from self" in ran.out
    ran = quantize("--recipe", recipe, "--calibration", calibration, "--samples", 3, "--out", "q-none")
    assert "--samples 3 was asked for" in ran.err  # by the user himself
