"""The real hub client against a local server that speaks the hub's URL layout."""

from __future__ import annotations

from pathlib import Path

from loopback_hub import COMMIT, CONFIG, WEIGHTS, Hub, client, clients


def names_in(answer: dict[str, object]) -> set[str]:
    return {path.name for path in Path(str(answer["folder"])).iterdir()}


def test_downloads_what_a_model_needs_and_no_code(hub: Hub, tmp_path: Path) -> None:
    answer = client(hub, tmp_path)
    assert names_in(answer) == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    folder = Path(str(answer["folder"]))
    assert folder.is_relative_to(tmp_path)  # HF_HOME is honoured
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert COMMIT[:12] in str(answer["notices"])


def test_licences_are_fetched_whatever_they_are_called(hub: Hub, tmp_path: Path) -> None:
    names = {"Tongyi Qianwen LICENSE AGREEMENT.txt", "license.txt", "Notice", "COPYING"}
    hub.files |= dict.fromkeys(names, b"terms")
    assert names <= names_in(client(hub, tmp_path))


def test_second_time_offline_comes_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = client(hub, tmp_path)
    hub.asked.clear()
    second = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert second["folder"] == first["folder"]
    assert hub.asked == []
    assert "HF_HUB_OFFLINE" in str(second["notices"])


def test_offline_without_a_copy_the_error_names_the_variable(hub: Hub, tmp_path: Path) -> None:
    answer = client(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert answer["error"] == "HubError"
    assert "unset HF_HUB_OFFLINE" in str(answer["text"])


def test_pickle_is_fetched_only_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    answer = client(hub, tmp_path)
    assert names_in(answer) == {"config.json", "pytorch_model.bin", "tokenizer.json", "LICENSE"}
    assert client(hub, tmp_path, HF_HUB_OFFLINE="1")["folder"] == answer["folder"]


def test_a_repository_without_weights_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"config.json": CONFIG, "model.gguf": b"GGUF"}
    assert "no weights" in str(client(hub, tmp_path)["text"])


def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    says = {
        "refuse/404-RepoNotFound": "check the spelling",
        "refuse/401": "HF_TOKEN",
        "refuse/403": "no access to refuse/403",
        "refuse/403-GatedRepo": "gated",
        "refuse/503": "out of order (503)",
        "refuse/418": "refused (418)",
    }
    answers = clients(hub, tmp_path, list(says))
    for answer, expected in zip(answers, says.values(), strict=True):
        assert answer["error"] == "HubError"
        assert expected in str(answer["text"])
        assert f"127.0.0.1:{hub.port}" in str(answer["text"])


def test_a_token_opens_a_gated_repository(hub: Hub, tmp_path: Path) -> None:
    hub.gated_token = "hf_open"
    assert "gated" in str(client(hub, tmp_path)["text"])
    assert "model.safetensors" in names_in(client(hub, tmp_path, HF_TOKEN="hf_open"))


def test_a_hub_out_of_order_uses_the_cache_aloud(hub: Hub, tmp_path: Path) -> None:
    first = client(hub, tmp_path)
    hub.status = 503
    second = client(hub, tmp_path)
    assert second["folder"] == first["folder"]
    assert "out of order (503)" in str(second["notices"])


def test_no_network_is_said(hub: Hub, tmp_path: Path) -> None:
    answer = client(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert answer["error"] == "HubError"
    assert "could not be reached" in str(answer["text"])
