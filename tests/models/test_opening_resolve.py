from __future__ import annotations

from pathlib import Path

import pytest

from qwenq.errors import HubError, UnsupportedError, UsageError
from qwenq.models.opening import resolve_model


def test_an_existing_folder_is_itself(tmp_path: Path) -> None:
    found = resolve_model(str(tmp_path))
    assert found.folder == tmp_path and found.notices == []


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen" / "Qwen2.5-0.5B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("Qwen/Qwen2.5-0.5B").folder == Path("Qwen/Qwen2.5-0.5B")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_model("~/model").folder == tmp_path / "model"


def test_a_file_points_to_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UsageError, match="is a file") as caught:
        resolve_model(str(file))
    assert str(tmp_path) in str(caught.value.hint) and caught.value.exit_code == 2


def test_a_misspelt_path_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "Qwen2.5-0.5B-Instruct").mkdir()
    (tmp_path / "unrelated").mkdir()
    with pytest.raises(UsageError, match="no such model folder") as caught:
        resolve_model(str(tmp_path / "Qwen2.5-0.5B-Instrct"))
    assert "did you mean" in str(caught.value.hint) and "Qwen2.5-0.5B-Instruct" in str(caught.value.hint)


@pytest.mark.parametrize(
    "model", ["/no/such", "./Qwen/x/y", "just-a-name", "", " ", "a/b/c", "owner/", "../x/y"]
)
def test_the_error_for_neither_path_nor_hub_id_shows_both_forms(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve_model(model)
    assert "hub id" in str(caught.value.hint)


def test_a_hub_shaped_typo_of_a_folder_mentions_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(HubError, match="HF_HUB_OFFLINE") as caught:
        resolve_model("models/qwem")
    assert "did you mean the folder models/qwen?" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("qwen-7b-chat", "qwen-7b-chat is a name of the catalogue, which holds no weights"),
        ("Qwen-7B-Chat", "name Qwen/Qwen-7B-Chat to download them, or add --weights random"),
        ("qwen-1.8b", "name Qwen/Qwen-1_8B to download them"),
        ("qwen-7b-chta", "did you mean qwen-7b-chat? qwen-7b-chat is a name of the catalogue"),
        ("qwen3_8b", "did you mean qwen3-8b? qwen3-8b is a name of the catalogue"),
        ("smollm2-135m-instruct", "is the bundled model: leave MODEL out"),
        ("smolm2-135m-instruct", "did you mean smollm2-135m-instruct? smollm2-135m-instruct is the bundled"),
    ],
)
def test_the_error_for_a_catalogue_name_suggests_hub_id_and_random_weights(
    typed: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such model folder") as caught:
        resolve_model(typed)
    assert said in str(caught.value.hint)


def test_a_folder_near_by_is_suggested_beside_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen-7b-chat-v2").mkdir()
    with pytest.raises(UsageError) as caught:
        resolve_model("qwen-7b-chat")
    assert "did you mean the folder qwen-7b-chat-v2?" in str(caught.value.hint)
    assert "name of the catalogue" in str(caught.value.hint)


@pytest.mark.parametrize("model", ["qwen2.5-vl-7b", "Qwen/Qwen2-VL-7B-Instruct"])
def test_a_model_that_is_not_supported_yet_is_not_downloaded(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwenq.models.hub.fetch", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(UnsupportedError, match=r"not supported yet: .*the vision tower would have"):
        resolve_model(model)
    (tmp_path / model).mkdir(parents=True)
    assert resolve_model(model).folder == Path(model)  # a folder of that name is the user's own affair


@pytest.mark.parametrize("name", ["\0", "a\0/b", "owner/na\0me"])
def test_a_name_with_a_zero_byte_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="zero byte"):
        resolve_model(name)
