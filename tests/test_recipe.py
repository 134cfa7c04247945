from __future__ import annotations

from pathlib import Path

import pytest

from qwenq.errors import UsageError
from qwenq.recipe import CalibrationRecipe, QuantizeRecipe, Recipe, read_recipe

ROOT = Path(__file__).parents[1]


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(folder: Path, text: str) -> UsageError:
    path = written(folder, text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert caught.value.where == str(path)
    assert caught.value.hint
    return caught.value


def test_a_whole_recipe(tmp_path: Path) -> None:
    text = """
        model = "Qwen/Qwen3-0.6B"
        [calibration]
        source = "chats.jsonl"
        samples = 64
        [quantize]
        bits = 8
        group_size = -1
        sym = false
        damp = 0.05
    """
    recipe = read_recipe(written(tmp_path, text))
    assert recipe == Recipe(
        model="Qwen/Qwen3-0.6B",
        calibration=CalibrationRecipe(source="chats.jsonl", samples=64),
        quantize=QuantizeRecipe(bits=8, group_size=-1, sym=False, damp=0.05),
    )


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(("text", "key", "nearest"), [
    ('modle = "x"', "modle", "model"),
    ("[quantise]\nbits = 4", "quantise", "quantize"),
    ("[quantize]\ngroupsize = 64", "quantize.groupsize", "group_size"),
    ("[quantize]\nsymmetric = true", "quantize.symmetric", "sym"),
    ("[calibration]\nsequence_len = 64", "calibration.sequence_len", "seq_len"),
])  # fmt: skip
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, key: str, nearest: str) -> None:
    error = refused(tmp_path, text)
    assert error.what == f"unknown key {key!r}"
    assert error.hint == f"did you mean {nearest!r}?"


def test_a_key_that_is_near_nothing_lists_those_there_are(tmp_path: Path) -> None:
    error = refused(tmp_path, "[quantize]\nqqqq = 1")
    assert error.hint is not None
    assert "bits" in error.hint
    assert "group_size" in error.hint


@pytest.mark.parametrize(("text", "says"), [
    ("[quantize]\nbits = 3", "quantize.bits = 3"),
    ("[quantize]\ngroup_size = 48", "quantize.group_size = 48"),
    ("[quantize]\ndamp = 0", "quantize.damp = 0"),
    ("[quantize]\ndamp = nan", "quantize.damp = nan"),
    ("[quantize]\nseed = -1", "quantize.seed = -1"),
    ('[quantize]\nact_order = "yes"', "quantize.act_order = 'yes'"),
    ("[calibration]\nsamples = 0", "calibration.samples = 0"),
    ('[calibration]\nseq_len = "long"', "calibration.seq_len = 'long'"),
    ("[calibration]\nsamples = true", "calibration.samples = True"),
    ("[quantize]\nseed = true", "quantize.seed = True"),
    ("[profile]\ntokens = [true]", "profile.tokens = True"),
    ("calibration = 7", "calibration = 7"),
    ("model = 7", "model = 7"),
])  # fmt: skip
def test_a_bad_value_is_shown_with_its_key(tmp_path: Path, text: str, says: str) -> None:
    error = refused(tmp_path, text)
    assert error.what.startswith(f"{says}: ")


def test_what_is_no_toml_says_the_line(tmp_path: Path) -> None:
    assert "line 2" in refused(tmp_path, "model = 'a'\nbits: 4").what


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        read_recipe(path)
    assert caught.value.hint


def test_a_mark_at_the_start_of_the_file_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xef\xbb\xbfmodel = 'a'\n")
    assert read_recipe(path).model == "a"


def test_a_file_with_a_hole_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("model = 'a'\n")
    with path.open("rb+") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room on the disk
    with pytest.raises(UsageError, match="more than 1 MB"):
        read_recipe(path)


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe(tmp_path / name)
    assert caught.value.hint


def test_options_that_were_given_win_and_the_others_leave_the_recipe_alone(tmp_path: Path) -> None:
    base = read_recipe(written(tmp_path, "[quantize]\nbits = 8\ndamp = 0.05"))
    over = base.override({"model": None}, quantize={"bits": 4, "damp": None, "sym": False})
    assert (over.quantize.bits, over.quantize.damp, over.quantize.sym) == (4, 0.05, False)
    assert base.quantize.bits == 8


def test_a_bad_option_names_the_command_line() -> None:
    with pytest.raises(UsageError, match=r"quantize\.bits = 3") as caught:
        Recipe().override(quantize={"bits": 3})
    assert caught.value.where == "the command line"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      scheme: W4A16\n", "YAML"),
        ("# theirs\n---\nbits: 4\n", "YAML"),
        ("- GPTQModifier:\n    targets: Linear\n", "YAML"),
        ('{"bits": 4, "group_size": 128, "desc_act": false}', "JSON"),
    ],
)
def test_a_recipe_of_another_tool_is_called_what_it_is(tmp_path: Path, text: str, language: str) -> None:
    error = refused(tmp_path, text)
    assert error.what == f"this looks like {language}; a recipe of qwenq is a TOML file"
