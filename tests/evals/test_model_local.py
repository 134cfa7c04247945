from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from qwenq.errors import UsageError
from qwenq.evals.model import (
    LoadOptions,
    LocalModel,
    assign_bases,
    bases_first,
    is_chat_model,
    open_eval_model,
)
from qwenq.models.tokenizer import load_tokenizer

CPU = LoadOptions(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("eval_model") / "Tiny")


def copy(tiny: Path, folder: Path, **config: object) -> Path:
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}


def test_a_model_that_ends_its_turns_is_a_chat_model(tiny: Path, tmp_path: Path) -> None:
    assert is_chat_model(load_tokenizer(tiny))
    assert open_eval_model(str(tiny), CPU).protocol == "card"


@pytest.mark.parametrize("change", [{"eos_token": "<|endoftext|>"}, {"chat_template": None}])
def test_a_base_model_with_a_template_is_not_a_chat_model(
    change: dict[str, object], tiny: Path, tmp_path: Path
) -> None:
    """Qwen2.5's base models have the template of the chat models, but end at ``<|endoftext|>``."""
    folder = copy(tiny, tmp_path / "base")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert open_eval_model(str(folder), CPU).protocol == "base"


def test_the_key_changes_with_every_setting_that_changes_answers(tiny: Path, tmp_path: Path) -> None:
    first = open_eval_model(str(tiny), CPU)
    assert open_eval_model(str(copy(tiny, tmp_path / "the-same")), CPU).key == first.key
    for how in (
        replace(CPU, dtype="bfloat16"),
        replace(CPU, engine="transformers"),
        replace(CPU, kernel="x"),
    ):
        assert open_eval_model(str(tiny), how).key != first.key
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert open_eval_model(str(other), CPU).key != first.key


def test_auto_is_resolved(tiny: Path) -> None:
    how = open_eval_model(str(tiny), LoadOptions(device="cpu")).how
    assert how.device == "cpu"
    assert how.dtype in ("float32", "bfloat16")
    assert how.attention == "grouped"
    assert open_eval_model(str(tiny), replace(CPU, engine="transformers")).how.attention == "sdpa"
    assert open_eval_model(str(tiny), replace(CPU, attention="off")).how.attention == "off"


def test_auto_and_the_named_setting_share_records(tiny: Path) -> None:
    named, auto = (open_eval_model(str(tiny), replace(CPU, attention=name)) for name in ("grouped", "auto"))
    assert named.key == auto.key
    assert auto.engine.implementation == named.engine.implementation


def test_a_gpu_that_is_not_there_is_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(UsageError, match="cuda:99"):
        open_eval_model("no/such/model", LoadOptions(device="cuda:99"))


def quantised(tiny: Path, folder: Path, manifest: dict[str, object] | None) -> LocalModel:
    copy(tiny, folder, **GPTQ)
    if manifest is not None:
        (folder / "qwenq.json").write_text(json.dumps(manifest))
    return open_eval_model(str(folder), CPU)


def test_the_base_is_the_one_with_the_fingerprint(tiny: Path, tmp_path: Path) -> None:
    base, other = (
        open_eval_model(str(tiny), CPU),
        open_eval_model(str(write_tiny_model(tmp_path / "b", seed=1)), CPU),
    )
    manifest = {"base": {"model": "somewhere/else", "fingerprint": base.model.fingerprint}}
    int4 = quantised(tiny, tmp_path / "q", manifest)
    assert assign_bases([other, base, int4]) == []
    assert int4.model.family == base.model.family
    assert int4.base == base.model.fingerprint
    assert bases_first([int4, other, base]) == [other, base, int4]


@pytest.mark.parametrize(("named", "says"), [
    ("Tiny", "was made from other weights than Tiny has: the base has changed since, and it is not compared"),
    ("Else", "no base of q is among the models: it is not compared"),
])  # fmt: skip
def test_weights_with_another_fingerprint_are_not_the_base(
    tiny: Path, tmp_path: Path, named: str, says: str
) -> None:
    """Neither those under the base's name, which has changed since, nor the only ones of its shape."""
    base = open_eval_model(str(tiny), CPU)
    manifest = {"base": {"model": f"somewhere/{named}", "fingerprint": "0123"}}
    int4 = quantised(tiny, tmp_path / "q", manifest)
    (said,) = assign_bases([base, int4])
    assert said.endswith(says)
    assert (int4.base, int4.model.family) == ("0123", named)
    recorded = assign_bases([int4], [base.model])
    assert recorded == ([said] if named == "Tiny" else []), "nor does the folder's old one go unsaid"


def test_a_base_that_was_recorded_need_not_be_named_again(tiny: Path, tmp_path: Path) -> None:
    recorded = open_eval_model(str(tiny), CPU).model
    manifest = {"base": {"model": "somewhere/else", "fingerprint": recorded.fingerprint}}
    for folder, made in (("by-manifest", manifest), ("Tiny-GPTQ-Int4", None)):
        int4 = quantised(tiny, tmp_path / folder, made)
        assert assign_bases([int4], [recorded]) == []
        assert (int4.model.family, int4.base) == ("Tiny", recorded.fingerprint)


def test_several_models_of_one_name_leave_the_base_open(tiny: Path, tmp_path: Path) -> None:
    base = open_eval_model(str(tiny), CPU)
    before = replace(base.model, fingerprint="as it was before")
    int4 = quantised(tiny, tmp_path / "Tiny-GPTQ-Int4", None)
    (said,) = assign_bases([int4], [before, base.model])
    assert "several models are called Tiny" in said
    assert int4.base is None
    assert assign_bases([int4, base], [before]) == []
    assert int4.base == base.model.fingerprint


def test_without_a_manifest_the_base_is_found_by_name(tiny: Path, tmp_path: Path) -> None:
    base, int4 = open_eval_model(str(tiny), CPU), quantised(tiny, tmp_path / "Tiny-GPTQ-Int4", None)
    assert assign_bases([base, int4]) == []
    assert (int4.model.family, int4.base) == ("Tiny", base.model.fingerprint)


def test_the_only_model_of_the_same_shape_is_the_base_with_a_notice(tiny: Path, tmp_path: Path) -> None:
    base, int4 = open_eval_model(str(tiny), CPU), quantised(tiny, tmp_path / "x", None)
    (said,) = assign_bases([base, int4])
    assert "compared with Tiny" in said
    assert int4.model.family == "Tiny"


def test_another_shape_is_no_base(tiny: Path, tmp_path: Path) -> None:
    wide = open_eval_model(
        str(write_tiny_model(tmp_path / "wide", intermediate_size=64, hidden_size=64)), CPU
    )
    int4 = quantised(tiny, tmp_path / "x", None)
    (said,) = assign_bases([wide, int4])
    assert "not compared" in said
    assert int4.model.family == "x"
