"""A report fills the cards of the folders that its rows are of: marked section, plots, model-index."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from pipeline import run
from publishing.card_page import card_html, picture
from reporting.browser import chromium
from reporting.example_runs import rows, write_run
from tiny_families import write_family

from qwenq import api
from qwenq.cli.app import app, register
from qwenq.errors import ModelError, UsageError
from qwenq.models.checkpoint import open_checkpoint
from qwenq.models.identity import result_model
from qwenq.models.integrity import verify_files
from qwenq.publishing.measured import fill_cards
from qwenq.reporting.write import write_report
from qwenq.results import Model, Row

GOLDEN = Path(__file__).parent / "golden"
BEGIN, END = "<!-- qwenq:measured -->", "<!-- /qwenq:measured -->"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    run(write_family(folder / "m", "qwen3"), folder / "tiny-GPTQ-Int4")
    return folder / "tiny-GPTQ-Int4"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / made.name))


def rows_of(folder: Path, command: str = "") -> Iterator[Row]:
    """The rows of ``example_runs``; its Int4 is the model in this folder."""
    found = result_model(open_checkpoint(folder), torch.float32, str(folder))
    for row in rows():
        model: Model = row.model
        if model.precision == "int4":
            model = replace(model, name=found.name, fingerprint=found.fingerprint)
        details = {**row.details, **({"command": command} if command else {})}
        yield replace(row, model=model, details=details)


@pytest.fixture(scope="module")
def page(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose plots all tests show; to draw them takes seconds."""
    out = tmp_path_factory.mktemp("page")
    return write_report([write_run(out / "run", list(rows_of(made)))], out / "report")


@pytest.fixture
def runs(folder: Path, tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "run", list(rows_of(folder)))]


def test_the_card_has_tables_published_figures_and_plots(folder: Path, runs: list[Path], page: Path) -> None:
    fill_cards(runs, page, [folder])
    card = ModelCard((folder / "README.md").read_text())
    measured = card.text[card.text.index(BEGIN) : card.text.index(END)]
    assert "In these tables this model is Int4." in measured
    assert "| Int4, published¹ |" in measured or "*Int4, published*" in measured
    assert "### Speed" in measured
    assert "- processor: Imaginary CPU" in measured
    plots = re.findall(r'<img src="(plots/[^"]+)"', measured)
    assert len(plots) == 7
    for name in plots:
        assert (folder / name).read_bytes() == (page.parent / name).read_bytes()
    verify_files(folder)  # neither card nor plots are in the manifest


def test_the_model_index_has_the_accuracies_of_this_model(folder: Path, runs: list[Path], page: Path) -> None:
    fill_cards(runs, page, [folder])
    index = ModelCard((folder / "README.md").read_text()).data.eval_results or []
    found = {result.dataset_type: result for result in index}
    assert found["mmlu"].metric_value == 43.6
    assert found["mmlu"].metric_name == "accuracy, percent of 500 items"
    assert found["mmlu"].dataset_config == "protocol card, version 1, limit 500"
    assert {result.metric_type for result in index} == {"kl", "same_top", "perplexity_ratio", "accuracy"}


def test_a_second_report_replaces_what_the_first_wrote_and_nothing_else(
    folder: Path, runs: list[Path], page: Path, tmp_path: Path
) -> None:
    fill_cards(runs, page, [folder])
    path = folder / "README.md"
    theirs = "  - task:\n      type: text-generation\n    dataset:\n      name: Mine\n      type: mine\n"
    theirs += "    metrics:\n    - type: accuracy\n      value: 1.0\n"
    text = path.read_text().replace("  results:\n", f"  results:\n{theirs}", 1)
    text = text.replace("library_name: transformers", "# a remark\nlibrary_name: vllm")
    path.write_text(f"{text}\nMy own words.\n")
    (folder / "plots" / "mine.png").write_bytes(b"mine")
    fewer = [write_run(tmp_path / "fewer", [row for row in rows_of(folder) if "speed" in row.metric])]
    fill_cards(fewer, page, [folder])
    renewed = path.read_text()
    assert "# a remark\nlibrary_name: vllm" in renewed
    assert renewed.endswith("\nMy own words.\n")
    kinds = [result.dataset_type for result in ModelCard(renewed).data.eval_results or []]
    assert kinds == ["held-out"] * 3 + ["mine"]
    shown = re.findall(r'<img src="plots/([^"]+)"', renewed)
    assert {file.name for file in (folder / "plots").iterdir()} == {"mine.png", *shown}
    fill_cards(fewer, page, [folder])
    assert path.read_text() == renewed


def test_what_was_removed_is_not_put_back(folder: Path, runs: list[Path], page: Path) -> None:
    path = folder / "README.md"
    text = path.read_text()
    path.write_text(re.sub(r"(?s)\nmodel-index:.*?\n---", "\n---", text))
    fill_cards(runs, page, [folder])
    assert "model-index" not in path.read_text()
    assert "### Accuracy" in path.read_text()
    path.write_text(own := text.replace(BEGIN, "").replace(END, ""))
    with pytest.raises(ModelError, match="has no place for a report"):
        fill_cards(runs, page, [folder])
    assert path.read_text() == own


@pytest.mark.parametrize("card", [b"\xff\xfe", f"{END}\n{BEGIN}\nmine".encode(), f"{BEGIN}\nmine".encode()])
def test_a_card_that_cannot_be_renewed_is_left_as_it_is(
    folder: Path, runs: list[Path], page: Path, card: bytes
) -> None:
    (folder / "README.md").write_bytes(card)
    with pytest.raises(ModelError):
        fill_cards(runs, page, [folder])
    assert (folder / "README.md").read_bytes() == card


@pytest.mark.parametrize("step", ["qwenq report --card", "qwenq run"])
def test_an_edited_card_keeps_its_edits_and_a_broken_one_all(
    step: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`qwenq run` names no card: its last step finds the folder by the rows, and a bad card is no failure."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", list(rows_of(folder, f"qwenq quantize bundled --out {folder.name}")))
    register()
    command = typer.main.get_command(app)
    arguments = ["report", "run", "--out", "report", *(("--card", folder.name) if "--card" in step else ())]
    path = folder / "README.md"
    text = path.read_text().replace("library_name: transformers", "library_name: vllm")
    text = text.replace("<!-- qwenq:cost -->", "My own words.\n\n<!-- qwenq:cost -->")
    path.write_text(f"{text}\nAnd these.\n")
    command.main(arguments, standalone_mode=False)
    filled = path.read_text()
    assert "### Accuracy" in filled and "library_name: vllm\n" in filled
    assert "My own words.\n\n<!-- qwenq:cost -->" in filled and filled.endswith("\nAnd these.\n")
    assert capsys.readouterr().err == f"note: card: {folder.name}/README.md\n"

    path.write_text(broken := filled.replace(END, ""))
    plots = {file: file.stat().st_mtime_ns for file in (folder / "plots").iterdir()}
    if "--card" in step:
        with pytest.raises(ModelError, match="only one of the marks"):
            command.main(arguments, standalone_mode=False)
    else:
        command.main(arguments, standalone_mode=False)
        left = f"note: the card of {folder.name} is left as it is: README.md has only one of the marks"
        assert left in capsys.readouterr().err
    assert path.read_text() == broken
    assert {file: file.stat().st_mtime_ns for file in (folder / "plots").iterdir()} == plots


def test_a_broken_model_index_is_named(folder: Path, runs: list[Path], page: Path) -> None:
    path = folder / "README.md"
    path.write_text(broken := re.sub(r"  results:\n", "  results: 3\n", path.read_text()))
    with pytest.raises(ModelError, match=r"model-index in README\.md is not as the hub has it"):
        fill_cards(runs, page, [folder])
    assert path.read_text() == broken


def test_folders_are_found_by_the_commands_of_the_rows(
    folder: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    before = (other / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    command = f"qwenq eval bundled {folder.name} other 'no such' --limit 3"
    runs = [write_run(tmp_path / "run", list(rows_of(folder, command)))]
    assert fill_cards(runs, page) == [Path(folder.name) / "README.md"]
    assert "### Accuracy" in (folder / "README.md").read_text()
    assert (other / "README.md").read_text() == before, "a model of another name: its rows are not here"
    assert fill_cards(runs, page, []) == []


def test_a_folder_of_another_model_is_refused(folder: Path, page: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "run", list(rows()))]
    with pytest.raises(UsageError, match="none of these runs measured this model"):
        fill_cards(runs, page, [folder])


def test_text_of_rows_stays_in_its_section(folder: Path, page: Path, tmp_path: Path) -> None:
    evil = f"{END} <script>alert(1)</script> | `x` [a](b)"
    changed = [
        replace(row, point={**row.point, "task": evil}) if row.metric == "accuracy" else row
        for row in rows_of(folder)
    ]
    fill_cards([write_run(tmp_path / "run", changed)], page, [folder])
    card = ModelCard((folder / "README.md").read_text())
    assert card.text.count(END) == 1
    page = card_html(folder)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_card_is_golden(folder: Path, runs: list[Path], page: Path) -> None:
    """But for what engines load, which has tests of its own. ``QWENQ_GOLDEN=write`` writes it anew."""
    manifest = json.loads((folder / "qwenq.json").read_text())
    estimate = {"value": 0.0712, "low": 0.0688, "high": 0.0736}
    verdict = {"word": "good", "sentence": "KL 0.0712 nats, same top token 90.0%"}
    manifest["check"] |= {"kl": estimate, "same_top": estimate, "perplexity_ratio": estimate}
    manifest |= {"check": manifest["check"] | {"verdict": verdict}, "versions": {"torch": "2.13.0"}}
    manifest["made_by"] = "qwenq 1.2.3"
    (folder / "qwenq.json").write_text(json.dumps(manifest))
    (folder / "README.md").unlink()
    fill_cards(runs, page, [folder])
    fill_cards(runs, page, [folder])
    text = (folder / "README.md").read_text()
    text = re.sub(r"(?s)(<!-- qwenq:load -->\n).*?(<!-- /qwenq:load -->)", r"\1…\n\2", text)
    if os.environ.get("QWENQ_GOLDEN") == "write":
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / "card.md").write_text(text, encoding="utf-8")
    assert text == (GOLDEN / "card.md").read_text(encoding="utf-8")


def test_the_card_is_readable_in_a_browser(
    folder: Path, runs: list[Path], page: Path, tmp_path: Path
) -> None:
    if chromium() is None:
        pytest.skip("needs chromium")
    fill_cards(runs, page, [folder])
    shown = card_html(folder)
    assert shown.count("<table>") >= 8
    assert "|" not in re.sub(r"(?s)<pre>.*?</pre>|<code>.*?</code>", "", shown.partition("</style>")[2])
    picture(folder, tmp_path / "card.png")
    assert (tmp_path / "card.png").stat().st_size > 50_000


def test_from_python_and_the_command_line(
    folder: Path,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    page = api.report(runs, tmp_path / "report", cards=[folder], progress=False)
    assert page == tmp_path / "report" / "index.html"
    assert "### Accuracy" in (folder / "README.md").read_text()
    register()
    command = typer.main.get_command(app)
    arguments = ["report", str(runs[0]), "--out", "report", "--card", folder.name]
    command.main(arguments, standalone_mode=False)
    said = capsys.readouterr()
    assert said.err == f"note: card: {folder.name}/README.md\n"
    assert said.out == "report/index.html\n"
    with pytest.raises(UsageError, match="exclude each other"):
        command.main([*arguments, "--no-card"], standalone_mode=False)
