"""Folders are uploaded by the real client to a server of this machine; what is refused publishes nothing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hub_server import hub_client
from pipeline import run
from tiny_families import write_family
from upload_hub import UploadHub, serve_uploads

from qwenq.cli.app import app, register

REPO = "someone/tiny-GPTQ-Int4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    run(write_family(folder / "m", "qwen3"), folder / "tiny-GPTQ-Int4")
    return folder / "tiny-GPTQ-Int4"


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with serve_uploads() as served:
        yield served


def push(hub: UploadHub, folder: Path, *, home: Path, **settings: Any) -> dict[str, Any]:
    """In a process of its own: huggingface_hub reads its address and token when it is imported."""
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom qwenq.errors import QwenqError\n"
        "from qwenq.publishing.push import push\n"
        "a, shown = json.loads(sys.argv[1]), []\n"
        "see = lambda e: shown.append(e.text if hasattr(e, 'text') else e.result.files)\n"
        "try:\n    u = push(Path(a.pop('folder')), a.pop('repo'), listener=see, **a)\n"
        "    found = {'url': u.url, 'files': u.files, 'notices': u.notices}\n"
        "except QwenqError as e:\n    found = {'error': str(e), 'kind': type(e).__name__}\n"
        "print(json.dumps({**found, 'shown': shown}))\n"
    )
    asked = {"folder": str(folder), "repo": REPO, **settings}
    printed, _ = hub_client(code, [json.dumps(asked)], hub.url, home, HF_TOKEN="hf_test")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def test_a_checked_folder_is_published_as_one_commit(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    found = push(hub, made, home=tmp_path, private=True)
    assert found["url"] == f"{hub.url}/{REPO}/commit/1"
    paths, repository = found["notices"]
    assert paths.startswith(f"qwenq.json holds paths of this machine: {made.parent}/")
    assert repository == f"made the private repository {REPO}"
    assert found["shown"] == [paths, found["files"], repository], "what will be public, before it is"
    there = hub.repos[REPO]["main"]
    assert set(there) == {".gitattributes", *found["files"]}
    assert all(there[name] == (made / name).read_bytes() for name in found["files"])
    assert "README.md" in there
    assert len(hub.commits) == 1
    assert hub.private == {REPO}


def test_a_card_is_published_as_it_was_edited(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    """Its marks too, even broken ones: `qwenq push` writes a card only where there is none."""
    copy = Path(shutil.copytree(made, tmp_path / made.name))
    card = (copy / "README.md").read_text().replace("<!-- /qwenq:cost -->", "My own words.")
    (copy / "README.md").write_text(card)
    assert push(hub, copy, home=tmp_path)["url"]
    assert hub.repos[REPO]["main"]["README.md"] == (copy / "README.md").read_bytes() == card.encode()


def test_a_dry_run_sends_nothing_and_lists_all(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    found = push(hub, made, home=tmp_path, dry_run=True)
    assert found["url"] is None
    assert {"model.safetensors", "config.json", "qwenq.json", "README.md"} <= set(found["files"])
    assert hub.repos == {}


def test_the_listing_of_the_documents_is_that_of_the_command(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another model: names, layout and sums are compared."""
    monkeypatch.chdir(made.parent)
    text = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    command, listing = re.findall(r"```sh\n(qwenq push .*)\n```\n\n.*\n\n```text\n([^`]*)```", text)[0]
    register()
    arguments = shlex.split(command)[1:]
    arguments[1] = made.name
    typer.main.get_command(app).main(arguments, standalone_mode=False)
    shown, said = (each.splitlines() for each in (listing, capsys.readouterr().out))
    form = re.compile(r" *[\d.]+ [KM]?B  ([\w./-]+)")
    documented, listed = ([form.fullmatch(line)[1] for line in lines[:-1]] for lines in (shown, said))
    more = {"LICENSE", "generation_config.json"}
    assert {name for name in documented if not name.startswith("plots/")} - more == set(listed)
    assert documented == sorted(documented)
    numbers = lambda line: re.sub(r"\d+ files, [\d.]+ [KM]?B", "N", line)  # noqa: E731
    assert numbers(shown[-1]) == numbers(said[-1])
    assert shown[-1].startswith(f"would publish {len(documented)} files, ")


def test_weights_that_arrived_before_a_cut_are_not_sent_twice(
    hub: UploadHub, made: Path, tmp_path: Path
) -> None:
    hub.repos[REPO] = {"main": {".gitattributes": b""}}
    hub.cut_commits = 1
    first = push(hub, made, home=tmp_path)
    assert first["kind"] == "HubError"
    assert "nothing was published" in first["error"]
    assert len(hub.uploads) == 1
    assert push(hub, made, home=tmp_path)["url"]
    assert len(hub.uploads) == 1


def test_weights_that_are_cut_on_their_way_arrive_whole(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    hub.cut_uploads = 1
    assert push(hub, made, home=tmp_path)["url"]
    assert hub.cut_uploads == 0
    assert len(hub.uploads) == 1
    assert hub.repos[REPO]["main"]["model.safetensors"] == (made / "model.safetensors").read_bytes()


def test_a_branch_is_made_and_said(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    found = push(hub, made, home=tmp_path, branch="int4-g32")
    assert "made the branch int4-g32" in found["notices"]
    assert "model.safetensors" in hub.repos[REPO]["int4-g32"]
    assert "model.safetensors" not in hub.repos[REPO]["main"]


def test_a_new_branch_does_not_begin_with_the_files_of_main(
    hub: UploadHub, made: Path, tmp_path: Path
) -> None:
    hub.repos[REPO] = {"main": {"model-00001-of-00002.safetensors": b"x"}}
    assert push(hub, made, home=tmp_path, branch="int4")["url"]
    assert "model-00001-of-00002.safetensors" not in hub.repos[REPO]["int4"]


def test_a_repository_with_other_files_is_left_alone(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    hub.repos[REPO] = {"main": {"pytorch_model.bin": b"x", "config.json": b"{}"}}
    found = push(hub, made, home=tmp_path)
    assert found["kind"] == "UsageError"
    assert "pytorch_model.bin" in found["error"]
    assert hub.repos[REPO]["main"]["config.json"] == b"{}"


def test_a_branch_that_was_made_before_a_refusal_is_said(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    """The first commit of a repository, where a new branch begins, may have files of something else."""
    hub.repos[REPO], hub.first_files = {"main": {"model.bin": b"x"}}, {"model.bin": b"x"}
    found = push(hub, made, home=tmp_path, branch="int4")
    assert f"{REPO} holds other files on int4: model.bin" in found["error"]
    assert "nothing was uploaded, but it made the branch int4; choose" in found["error"]
    assert set(hub.repos[REPO]["int4"]) == {".gitattributes", "model.bin"}


def test_the_command_lists_what_will_be_public_before_it_is(
    hub: UploadHub, made: Path, tmp_path: Path
) -> None:
    hub.may_write = False
    code = (
        "import sys\nfrom qwenq.cli import main\nsys.argv[:1] = ['qwenq', 'push']\n"
        "try:\n    main()\nexcept SystemExit as e:\n    print('exit code', e.code)\n"
    )
    said, notes = hub_client(code, [str(made), REPO], hub.url, tmp_path, HF_TOKEN="hf_test")
    *listed, ended = said.splitlines()
    assert {line.split()[-1] for line in listed} >= {"model.safetensors", "README.md", "qwenq.json"}
    assert ended == "exit code 1"
    assert notes.index("holds paths of this machine") < notes.index("does not let this token write (403)")
    assert hub.repos == {}


def test_a_token_that_may_not_write_is_explained(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    hub.may_write = False
    found = push(hub, made, home=tmp_path)
    assert found["kind"] == "HubError"
    assert "does not let this token write (403)" in found["error"]
    assert "nothing was published; it would have been" in found["error"]


def test_what_was_made_before_a_failure_is_said(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    hub.cut_commits = 1
    found = push(hub, made, home=tmp_path, private=True)
    said = f"the hub answered 500; nothing was published, but it made the private repository {REPO}; "
    assert said in found["error"]


def test_without_a_token_it_says_how_to_get_one(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    hub.token = "hf_other"
    found = push(hub, made, home=tmp_path)
    assert found["kind"] == "HubError"
    assert "asks for a valid token (401)" in found["error"]
    assert "hf auth login" in found["error"]


def test_plots_and_other_images_of_the_card_go_along(hub: UploadHub, made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / made.name))
    (copy / "plots").mkdir()
    for name in ("plots/old.png", "plots/new.png", "logo.svg", "private.png"):
        (copy / name).write_bytes(name.encode())
    card = (copy / "README.md").read_text()
    shown = '![a plot](plots/old.png)\n<img src="logo.svg">\n![elsewhere](https://a.example/b.png)\n'
    (copy / "README.md").write_text(card + shown)
    files = push(hub, copy, home=tmp_path)["files"]
    assert {"plots/old.png", "logo.svg"} <= set(files)
    assert not {"plots/new.png", "private.png"} & set(files)
    (copy / "README.md").write_text(card + "![a plot](plots/new.png)\n")
    assert push(hub, copy, home=tmp_path)["url"], "images of an earlier card are no files of something else"
    assert hub.repos[REPO]["main"]["plots/new.png"] == b"plots/new.png"


@pytest.mark.parametrize("shown", ["plots/no.png", "../secret.png", "link.png", "qwenq.json"])
def test_an_image_that_is_not_in_the_folder_is_refused(
    hub: UploadHub, made: Path, tmp_path: Path, shown: str
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / made.name))
    (tmp_path / "secret.png").write_bytes(b"secret")
    (copy / "link.png").symlink_to(tmp_path / "secret.png")
    (copy / "README.md").write_text(f"![a]({shown})")
    found = push(hub, copy, home=tmp_path)
    assert found["kind"] == "ModelError"
    assert f"README.md shows {shown}, which is not an image in this folder" in found["error"]
    assert hub.repos == {}


def test_without_a_network_it_says_what_would_have_been_uploaded(made: Path, tmp_path: Path) -> None:
    found = push(UploadHub(port=9), made, home=tmp_path)  # nothing listens there
    assert found["kind"] == "HubError"
    assert "cannot be reached" in found["error"]
    assert "it would have been" in found["error"]
    paths, files = found["shown"]
    assert paths.startswith("qwenq.json holds paths of this machine")
    assert f"it would have been {len(files)} files" in found["error"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"check": None}, "never compared"),
        ({"check": {"broken": True}}, "broken"),
    ],
)
def test_an_unchecked_folder_is_refused(
    hub: UploadHub, made: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((copy / "qwenq.json").read_text())
    (copy / "qwenq.json").write_text(json.dumps(manifest | change))
    found = push(hub, copy, home=tmp_path)
    assert found["kind"] == "VerificationError"
    assert said in found["error"]
    assert hub.repos == {}


def test_a_damaged_folder_and_a_name_without_owner_are_refused(
    hub: UploadHub, made: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "config.json").write_text("{}")
    assert push(hub, copy, home=tmp_path)["kind"] == "CorruptFileError"
    assert "no OWNER/NAME" in push(hub, made, home=tmp_path, repo="tiny")["error"]
