"""Models of other tools beside ours: every command works on them, or says why it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_shell import Ran, Shell
from evals.benchmark_data import write_mmlu
from models.foreign_models import write_foreign
from pipeline import run
from safetensors.torch import load_file, save_file
from tiny_families import write_calibration, write_family
from tiny_model import TEXT

from qwenq.reporting.collect import collect
from qwenq.reporting.report import make_report
from qwenq.reporting.write import report_markdown
from qwenq.results import read_rows

KINDS = {
    "awq": "Tiny-AWQ",
    "packed": "Tiny-quantized.w4a16",
    "fp8": "Tiny-FP8",
    "autoround:auto_gptq": "Tiny-int4-AutoRound",
}
CHECK = ("--text", "notes.txt", "--samples", 2, "--seq-len", 24, "--device", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and this base quantised by us and, as their layouts say, by others."""
    root = tmp_path_factory.mktemp("models")
    base = write_family(root / "Tiny", "qwen3", max_position_embeddings=2048)
    for kind, name in KINDS.items():
        write_foreign(base, root / name, kind)
    run(base, root / "Tiny-GPTQ-Int4", bits=4, group_size=32)
    return root


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    Path("notes.txt").write_text(TEXT * 60)
    return lambda command, *arguments: Shell(command, monkeypatch, capsys)(*arguments)


def refused(ran: Ran) -> str:
    """The message of a run that was refused in three parts, without a traceback."""
    assert ran.code == 2, ran
    assert ran.err.startswith("qwenq: ")
    assert "\n  try:   " in ran.err
    assert "Traceback" not in ran.err
    return ran.err


@pytest.mark.parametrize(
    ("kind", "form", "modules"),
    [
        ("awq", "AWQ Int4, groups of 32", 21),
        ("packed", "compressed-tensors Int4, groups of 32", 21),
        ("fp8", "FP8, blocks of 16 × 32", 0),
        ("autoround:auto_gptq", "Int4, groups of 32", 21),
    ],
)
def test_check_compares_them_with_their_base(
    models: Path, shell: Callable[..., Ran], kind: str, form: str, modules: int
) -> None:
    ran = shell("check", models / KINDS[kind], "--against", models / "Tiny", *CHECK, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["format"] == form
    assert 0 < found["kl"]["value"] < 0.25
    assert len(found["modules"]) == modules
    assert all(0 < module["rtn_error"] < module["error"] < 0.5 for module in found["modules"])
    text = shell("check", models / KINDS[kind], "--against", models / "Tiny", *CHECK)
    assert f"{models / KINDS[kind]} ({form})" in text.out


def test_the_same_integers_cost_the_same_in_every_layout(models: Path, shell: Callable[..., Ran]) -> None:
    found = []
    for kind in ("awq", "packed", "autoround:auto_gptq"):
        ran = shell("check", models / KINDS[kind], "--against", models / "Tiny", *CHECK, "--json")
        found.append(json.loads(ran.out)["kl"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-4) == pytest.approx(found[2], rel=1e-4)


def test_no_errors_by_module_where_weights_were_scaled_before_they_were_rounded(
    models: Path, shell: Callable[..., Ran], tmp_path: Path
) -> None:
    """As AWQ does: factors go from the norms into the weights that follow."""
    write_foreign(models / "Tiny", tmp_path / "scaled", "awq")
    tensors = load_file(tmp_path / "scaled" / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    tensors[norm] = tensors[norm] * 1.1
    for part in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.1.self_attn.{part}.scales"] /= 1.1
    save_file(tensors, tmp_path / "scaled" / "model.safetensors", metadata={"format": "pt"})
    ran = shell("check", tmp_path / "scaled", "--against", models / "Tiny", *CHECK, "--json")
    found = json.loads(ran.out)
    assert found["modules"] == []
    assert any(f"{norm} is not the base's" in notice for notice in found["notices"])
    assert 0 < found["kl"]["value"] < 0.25


def evaluated(shell: Callable[..., Ran], data: Path, *given: Path) -> Ran:
    options = ("--tasks", "mmlu", "--protocol", "base", "--subjects", "abstract_algebra,astronomy")
    ran: Ran = shell(
        "eval", *given, *options, "--data", data, "--limit", 6, "--device", "cpu", "--out", "run"
    )
    assert ran.code == 0, ran.err
    return ran


def test_one_report_pairs_ours_and_theirs_with_the_base(
    models: Path, shell: Callable[..., Ran], tmp_path: Path
) -> None:
    names = ["Tiny", "Tiny-GPTQ-Int4", *KINDS.values()]
    evaluated(shell, write_mmlu(tmp_path / "data"), *(models / name for name in names))
    rows = [row for row in read_rows(Path("run")) if row.metric == "accuracy"]
    precisions = {row.model.name: row.model.precision for row in rows}
    assert precisions == {
        "Tiny": "bf16",
        "Tiny-GPTQ-Int4": "int4",
        "Tiny-AWQ": "awq-int4",
        "Tiny-quantized.w4a16": "ct-int4",
        "Tiny-FP8": "fp8",
        "Tiny-int4-AutoRound": "int4",
    }
    assert {row.model.family for row in rows} == {"Tiny"}
    assert all(("paired" in row.details) == (row.model.name != "Tiny") for row in rows)
    sizes = {row.model.name: row.model.nbytes for row in rows}
    assert sizes["Tiny-AWQ"] < sizes["Tiny-FP8"] < sizes["Tiny"]  # type: ignore[operator]
    shown = report_markdown(make_report(collect([Path("run")]), "Tiny"))
    table = shown.partition("## Accuracy")[2].partition("\n\n")[2]
    order = [line.split("|")[1].strip() for line in table.splitlines()[2:8]]
    assert order == [
        "BF16", "FP8", "Int4, Tiny-GPTQ-Int4", "Int4, Tiny-int4-AutoRound", "Int4 (AWQ)",
        "Int4 (compressed-tensors)",
    ]  # fmt: skip


@pytest.mark.parametrize("with_base", [True, False])
def test_a_model_made_from_an_fp8_folder(
    models: Path, shell: Callable[..., Ran], tmp_path: Path, with_base: bool
) -> None:
    calibration = write_calibration(models / "Tiny-FP8", tmp_path / "c.safetensors")
    ran = shell(
        "quantize", models / "Tiny-FP8", "--group-size", 32, "--calibration", calibration, "--out", "made"
    )
    assert ran.code == 0, ran.err
    manifest = json.loads(Path("made/qwenq.json").read_text())
    assert manifest["base"]["name"] == "Tiny-FP8"
    assert not (Path("made") / "model.safetensors.index.json").exists()
    config = json.loads(Path("made/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"
    assert not any("scale_inv" in name for name in load_file(Path("made/model.safetensors")))
    bases = [models / "Tiny"] if with_base else []
    done = evaluated(shell, write_mmlu(tmp_path / "data"), *bases, models / "Tiny-FP8", Path("made"))
    note = "both are compared with its base" if with_base else "name the base of both"
    assert f"made was made from Tiny-FP8, which is quantised itself: {note}" in done.err
    rows = {row.model.precision: row for row in read_rows(Path("run")) if row.metric == "accuracy"}
    assert [("paired" in rows[name].details) for name in ("fp8", "int4")] == [with_base, with_base]


@pytest.mark.parametrize("engine", ["fast", "transformers"])
def test_chat_and_perplexity_run_them(models: Path, shell: Callable[..., Ran], engine: str) -> None:
    from typer.testing import CliRunner

    from qwenq.cli.app import app, register

    register()
    options = ["--max-new-tokens", "4", "--greedy", "--dtype", "float32", "--engine", engine]
    done = CliRunner().invoke(app, ["chat", str(models / "Tiny-AWQ"), *options], input="hello\n")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
    ran = shell(
        "perplexity", models / "Tiny-AWQ", "--text", "notes.txt", "--lengths", "16,32", "--samples", 1,
        "--device", "cpu", "--out", "ppl",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert {row.model.precision for row in read_rows(Path("ppl"))} == {"awq-int4"}


def test_speed_is_not_measured_of_weights_that_have_no_kernel_here(
    models: Path, shell: Callable[..., Ran]
) -> None:
    assert "AWQ Int4, groups of 32 has no kernel here" in refused(shell("profile", models / "Tiny-AWQ"))


def test_integers_of_another_tool_are_not_quantised_again(models: Path, shell: Callable[..., Ran]) -> None:
    said = refused(shell("quantize", models / "Tiny-AWQ", "--out", "again"))
    assert "already quantised: AWQ Int4" in said
    assert not Path("again").exists()


# check --for


def test_engines_that_load_a_folder(models: Path, shell: Callable[..., Ran]) -> None:
    ran = shell("check", models / "Tiny-GPTQ-Int4", "--for", "all")
    assert ran.code == 0, ran.err
    assert [line.split()[0] for line in ran.out.splitlines() if line.endswith(": loads")] == [
        "vllm", "sglang", "transformers", "gptqmodel"
    ]  # fmt: skip
    assert "note    needs optimum and gptqmodel beside it" in ran.out


def test_one_number_of_gpus_that_loads_is_enough(models: Path, shell: Callable[..., Ran]) -> None:
    ran = shell("check", models / "Tiny-GPTQ-Int4", "--for", "vllm", "--tp", "1,2")
    assert ran.code == 0, ran.err
    assert "on 2 GPUs: does not load\n  because the 96 inputs of down_proj in groups of 32" in ran.out
    assert "\n  try     " in ran.out
    ran = shell("check", models / "Tiny-GPTQ-Int4", "--for", "vllm,transformers", "--tp", "2")
    assert ran.code == 1
    assert "qwenq: not loaded by vllm\n" in ran.err


def test_verdicts_as_json(models: Path, shell: Callable[..., Ran]) -> None:
    ran = shell("check", models / "Tiny-GPTQ-Int4", "--for", "vllm, gptqmodel", "--tp", "1,2", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["model"] == str(models / "Tiny-GPTQ-Int4")
    verdicts = [(v["engine"], v["gpus"], v["loads"]) for v in found["verdicts"]]
    assert verdicts == [("vllm", 1, True), ("vllm", 2, False), ("gptqmodel", 1, True)]
    (problem,) = found["verdicts"][1]["problems"]
    assert set(problem) == {"reason", "remedy"}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Tiny-GPTQ-Int4", ["--for", "llama.cpp"], "the rules of 'llama.cpp' are not known"),
        ("Tiny-GPTQ-Int4", ["--for", "vllm", "--tp", "two"], "'two' is not a list of whole numbers"),
        ("Tiny-GPTQ-Int4", ["--for", "vllm", "--tp", "0"], "--tp has to be at least 1, not 0"),
        ("Tiny", ["--for", "vllm"], "this model is not quantised"),
        ("Tiny-AWQ", ["--for", "vllm"], "this is AWQ Int4, groups of 32"),
        ("Tiny-int4-AutoRound", ["--for", "vllm"], "this config.json is AutoRound's"),
    ],
)
def test_questions_about_engines_that_have_no_answer(
    models: Path, shell: Callable[..., Ran], name: str, options: list[Any], said: str
) -> None:
    assert said in refused(shell("check", models / name, *options))


def test_quantize_says_where_the_folder_loads(
    models: Path, shell: Callable[..., Ran], tmp_path: Path
) -> None:
    calibration = write_calibration(models / "Tiny", tmp_path / "c.safetensors")
    common = (models / "Tiny", "--group-size", 32, "--calibration", calibration)
    ran = shell("quantize", *common, "--out", "symmetric")
    assert "loads in vllm, sglang, transformers, gptqmodel\n" in ran.out + ran.err
    said = refused(shell("quantize", *common, "--asym", "--out", "asymmetric"))
    assert (
        "neither vLLM nor SGLang would load the result: 7 modules of each block have free zero points" in said
    )
    assert "without --asym; or add --any-engine: transformers and gptqmodel would load it" in said
    assert not list(Path().glob("asymmetric*"))
    ran = shell("quantize", *common, "--asym", "--any-engine", "--out", "asymmetric")
    assert "loads in transformers, gptqmodel; not in vllm (" in ran.out + ran.err
    assert "free zero points" in ran.out + ran.err


# convert --to compressed-tensors


def test_a_converted_folder_is_the_same_model(models: Path, shell: Callable[..., Ran]) -> None:
    from qwenq.models.checkpoint import open_checkpoint
    from qwenq.models.gptq_config import QuantConfig
    from qwenq.models.gptq_format import DequantisedSource

    ran = shell("convert", models / "Tiny-GPTQ-Int4", "ct", "--to", "compressed-tensors")
    assert ran.code == 0, ran.err
    assert "changed: GPTQ → compressed-tensors, the same integers and scales" in ran.out
    assert not Path("ct/quantize_config.json").exists()
    assert (Path("ct") / "tokenizer.json").is_file()
    packed, read = open_checkpoint(models / "Tiny-GPTQ-Int4"), open_checkpoint(Path("ct"))
    plain = DequantisedSource(packed.source, QuantConfig.read(packed.config), torch.float32)
    assert set(read.names()) == set(plain.names())
    assert all(torch.equal(read.read(name), plain.read(name)) for name in plain.names())
    both = [
        json.loads(shell("check", name, "--against", models / "Tiny", *CHECK, "--json").out)
        for name in (models / "Tiny-GPTQ-Int4", "ct")
    ]
    assert both[0]["kl"] == both[1]["kl"]
    assert both[0]["modules"] == both[1]["modules"]


def test_a_foreign_folder_is_converted_to_plain_weights(models: Path, shell: Callable[..., Ran]) -> None:
    ran = shell("convert", models / "Tiny-AWQ", "plain")
    assert ran.code == 0, ran.err
    assert "changed: AWQ Int4, groups of 32 → plain weights in float32" in ran.out
    assert "quantization_config" not in json.loads(Path("plain/config.json").read_text())


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("Tiny", [], "for a GPTQ model, and this one is not quantised"),
        ("Tiny-AWQ", [], "for a GPTQ model, and this one is AWQ Int4"),
        ("Tiny-int4-AutoRound", [], "free zero points"),
        ("Tiny-GPTQ-Int4", ["--zeros", "v2"], "compressed-tensors has one format of zero points"),
    ],
)
def test_what_has_no_form_in_compressed_tensors(
    models: Path, shell: Callable[..., Ran], source: str, options: list[str], said: str
) -> None:
    ran = shell("convert", models / source, "ct", "--to", "compressed-tensors", *options)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert "\n  try:   " in ran.err
    assert not Path("ct").exists()


def test_random_weights_have_no_integers_to_convert(shell: Callable[..., Ran]) -> None:
    said = refused(shell("convert", "qwen2.5-0.5b", "x", "--weights", "random", "--to", "compressed-tensors"))
    assert "random weights are written in one layout\n  where: --to" in said
