"""The card of a quantised folder: valid on the hub, of measured figures, safe from strangers' text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from pipeline import run
from tiny_families import write_family

from qwenq.errors import ModelError
from qwenq.publishing.model_card import Measured, write_model_card
from qwenq.recipe import quantize_command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    run(write_family(folder / "m", "qwen3"), folder / "tiny-GPTQ-Int4", damp=0.2, sym=False, any_engine=True)
    return folder / "tiny-GPTQ-Int4"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(made, tmp_path / made.name))
    (copy / "README.md").unlink()  # the card that `qwenq quantize` wrote
    return copy


def edit(folder: Path, **changes: Any) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "qwenq.json").read_text())
    for key, value in changes.items():
        manifest[key] = {**manifest[key], **value}
    (folder / "qwenq.json").write_text(json.dumps(manifest))
    return manifest


def test_the_card_has_what_was_measured(folder: Path) -> None:
    manifest = edit(folder)
    card = ModelCard(write_model_card(folder).read_text())
    assert card.data.library_name == "transformers"
    assert {"gptq", "int4", "qwen", "qwenq"} <= set(card.data.tags or [])
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert measured == {
        key: round(manifest["check"][key]["value"], 5) for key in ("kl", "same_top", "perplexity_ratio")
    }
    assert f"Verdict: **{manifest['check']['verdict']['word']}**" in card.text
    assert "| vllm 0.33.0 | no: 21 modules have free zero points" in card.text
    assert "from vllm" not in card.text
    assert "import sglang" not in card.text
    assert "AutoModelForCausalLM" in card.text


def test_the_base_gives_its_id_licence_and_languages(folder: Path, tmp_path: Path) -> None:
    edit(folder, base={"model": "Qwen/Qwen3-0.6B", "name": "Qwen3-0.6B"})
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\n---\n# Qwen3")
    card = ModelCard(write_model_card(folder, base).read_text())
    assert card.data.base_model == "Qwen/Qwen3-0.6B"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en", "zh"]
    assert "(https://huggingface.co/Qwen/Qwen3-0.6B)" in card.text


@pytest.mark.parametrize(
    "broken", ["---\n: : [\n---\n", "---\nlicense: [1, {}]\n---\n", "no front matter", "---\n"]
)
def test_a_strangers_card_costs_its_licence_line_only(folder: Path, tmp_path: Path, broken: str) -> None:
    (tmp_path / "README.md").write_text(broken)
    card = ModelCard(write_model_card(folder, tmp_path).read_text())
    assert card.data.license is None


def test_strangers_text_breaks_neither_yaml_nor_markdown(folder: Path) -> None:
    name = "a\n---\nlicense: evil\n| x | <script>alert(1)</script> <!-- /qwenq:about --> `rm` [a](b)"
    edit(folder, base={"name": name}, calibration={"source": "x`\n| y"})
    card = ModelCard(write_model_card(folder).read_text())
    assert card.data.license is None
    assert "<script>" not in card.text
    assert card.text.count("<!-- /qwenq:about -->") == 1
    (line,) = [line for line in card.text.splitlines() if line.startswith("- Calibration")]
    assert line.endswith("``x` \\| y``")


def test_what_people_wrote_stays_and_marked_sections_are_renewed(folder: Path) -> None:
    path = write_model_card(folder)
    text = path.read_text().replace("library_name: transformers", "library_name: vllm")
    text = text.replace("<!-- qwenq:cost -->", "My own words.\n\n<!-- qwenq:cost -->\nold figures")
    path.write_text(text)
    edit(folder, check={"tokens": 4242})
    renewed = write_model_card(folder, measured=Measured("| a | b |")).read_text()
    assert "My own words." in renewed
    assert "library_name: vllm" in renewed
    assert "4,242 held-out tokens" in renewed
    assert "old figures" not in renewed
    assert "## Measured\n\n| a | b |" in renewed
    assert write_model_card(folder).read_text() == renewed


def test_a_removed_section_is_not_put_back(folder: Path) -> None:
    path = write_model_card(folder)
    before, _, _ = path.read_text().partition("<!-- qwenq:licence -->")
    path.write_text(before)
    assert "## Licence" not in write_model_card(folder).read_text()


@pytest.mark.parametrize(
    ("mark", "moved"),
    [
        ("<!-- /qwenq:cost -->", ""),
        ("<!-- qwenq:cost -->", ""),
        ("<!-- /qwenq:licence -->", ""),
        ("<!-- /qwenq:cost -->", "behind the next section"),
    ],
)
def test_a_section_without_its_end_is_refused_and_nothing_is_lost(
    folder: Path, mark: str, moved: str
) -> None:
    """Up to the end mark of a later place, words of people would be taken for the section's."""
    path = write_model_card(folder)
    after = "<!-- /qwenq:load -->"
    text = path.read_text().replace(mark, "My own words.")
    text = text.replace(after, f"{after}\n{mark}") if moved else text
    path.write_text(text)
    name = mark.replace("/", "").removeprefix("<!-- ").removesuffix(" -->")
    with pytest.raises(ModelError, match=f"only one of the marks <!-- {name} --> and <!-- /{name} -->"):
        write_model_card(folder)
    assert path.read_text() == text


def test_the_command_makes_the_folder_again(folder: Path) -> None:
    manifest = edit(folder, base={"model": "Qwen/Qwen3-0.6B"})
    manifest["recipe"]["model"] = "Qwen/Qwen3-0.6B"
    command = quantize_command(manifest["recipe"], folder.name)
    assert command.startswith("qwenq quantize Qwen/Qwen3-0.6B --calibration calibration.safetensors")
    assert "--damp 0.2" in command
    assert "--asym" in command
    assert "--bits" not in command
    manifest["recipe"]["quantize"] |= {"module_bits": {"self_attn": 8}, "coordinate_descent": False}
    assert "--module-bits self_attn=8" in quantize_command(manifest["recipe"], folder.name)
    assert "--no-coordinate-descent" in quantize_command(manifest["recipe"], folder.name)


@pytest.mark.parametrize("content", ["", "[]", '{"base": {}}'])
def test_a_folder_without_a_manifest_gets_no_card(folder: Path, content: str) -> None:
    (folder / "qwenq.json").write_text(content)
    with pytest.raises(ModelError):
        write_model_card(folder)
    assert not (folder / "README.md").exists()
