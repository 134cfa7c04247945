"""What a broken download, or another program, left in the hub's cache: it goes on, or is no model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from loopback_hub import WEIGHTS, Hub, client
from safetensors.torch import save

from qwenq.errors import QwenqError
from qwenq.models.safetensors_files import open_safetensors


def test_a_dropped_connection_resumes_within_the_run(hub: Hub, tmp_path: Path) -> None:
    hub.cuts = 1
    hub.files["model.safetensors"] = WEIGHTS * 24  # the library keeps what came in chunks of 10 MB
    answer = client(hub, tmp_path)
    assert (Path(str(answer["folder"])) / "model.safetensors").read_bytes() == WEIGHTS * 24
    gets = [(path, wanted) for method, path, wanted in hub.asked if method == "GET"]
    ranges = [wanted for path, wanted in gets if path.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=") and ranges[1] != "bytes=0-"  # the second half alone


def test_a_download_that_died_continues_with_the_next_run(hub: Hub, tmp_path: Path) -> None:
    hub.cuts, hub.down = 1, True
    answer = client(hub, tmp_path)
    assert answer["error"] == "HubError"
    assert "broke off" in str(answer["text"]) and "run the same command again" in str(answer["text"])
    hub.status, hub.down = 200, False
    before = set(hub.sent)
    hub.sent.clear()
    again = client(hub, tmp_path)
    assert (Path(str(again["folder"])) / "model.safetensors").read_bytes() == WEIGHTS
    assert not before & set(hub.sent)  # what was whole is not fetched twice


def broken_off(hub: Hub, home: Path, file: str) -> None:
    """A run whose download dies in the middle of this file, when all others are there."""
    hub.cut_file, hub.cuts, hub.down = file, 1, True
    answer = client(hub, home)
    assert "broke off" in str(answer["text"])
    assert hub.sent_all_but(file)


def make_two_shards(hub: Hub) -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    del hub.files["model.safetensors"]
    for number, part in enumerate(parts):
        hub.files[part] = save({f"model.layers.{number}.weight": torch.full((64, 64), float(number))})
    owners = {f"model.layers.{number}.weight": part for number, part in enumerate(parts)}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": owners}).encode()


@pytest.mark.parametrize(
    "file",
    [
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        pytest.param("model.safetensors", marks=pytest.mark.slow),
        pytest.param("config.json", marks=pytest.mark.slow),
    ],
)
def test_what_a_broken_download_left_is_never_taken_for_the_model(
    hub: Hub, tmp_path: Path, file: str
) -> None:
    """Not offline, and not while the hub is out of order; then it goes on where it broke."""
    if "-of-" in file:
        make_two_shards(hub)
    broken_off(hub, tmp_path, file)
    hub.down = False
    for said, environment in (
        ("not (wholly) in the cache", {"HF_HUB_OFFLINE": "1"}),
        ("out of order (503)", {}),
    ):
        answer = client(hub, tmp_path, **environment)
        assert answer.get("error") == "HubError", answer
        assert said in str(answer["text"])
        assert f"what is in the cache is not whole: 1 file(s) are missing ({file})" in str(answer["text"])
    hub.status = 200
    whole = Path(str(client(hub, tmp_path)["folder"]))
    assert (whole / file).read_bytes() == hub.files[file]


@pytest.mark.parametrize("lost", ["model-00001-of-00002.safetensors", "the index and a shard", "half a file"])
def test_what_another_program_left_is_judged_by_what_its_files_say(
    hub: Hub, tmp_path: Path, lost: str
) -> None:
    """Older versions of the hub's library keep no list of files: opening finds what is missing."""
    make_two_shards(hub)
    folder = Path(str(client(hub, tmp_path)["folder"]))
    if lost == "half a file":
        os.truncate((folder / "model-00002-of-00002.safetensors").resolve(), 90)
    else:
        (folder / "model-00001-of-00002.safetensors").unlink()
    if lost == "the index and a shard":
        (folder / "model.safetensors.index.json").unlink()
    shutil.rmtree(folder.parents[1] / "trees")
    found = Path(str(client(hub, tmp_path, HF_HUB_OFFLINE="1")["folder"]))
    with pytest.raises(QwenqError, match=r"not a whole|missing"):
        open_safetensors(found)
