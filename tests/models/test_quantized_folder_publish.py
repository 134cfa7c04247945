"""What a finished folder holds, and which names it can take."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import run
from tiny_families import write_family

from qwenq.errors import CorruptFileError, UsageError
from qwenq.models.integrity import verify_files
from qwenq.models.quantized_folder import clean_up_after_kill, publish, require_free


def test_chat_templates_in_a_folder_of_their_own_are_part_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENQ_CACHE", str(tmp_path / "cache"))
    model, out = write_family(tmp_path / "m"), tmp_path / "out"
    name = "additional_chat_templates/tool_use.jinja"
    (model / name).parent.mkdir()
    (model / name).write_text("{{ messages }}")
    run(model, out)
    assert name in verify_files(out)
    (out / name).write_text("{{ massages }}")
    with pytest.raises(CorruptFileError, match="not those that were written"):
        verify_files(out)


@pytest.mark.parametrize("kind", ["a file", "a folder with a file"])
def test_files_put_into_the_output_folder_meanwhile_are_kept(tmp_path: Path, kind: str) -> None:
    staged, out = tmp_path / "staged", tmp_path / "out"
    staged.mkdir()
    theirs = out if kind == "a file" else out / "thesis.txt"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("years of work")
    with pytest.raises(UsageError, match=r"(?s)put there since this run began.*run the same command again"):
        publish(staged, out, {})
    assert theirs.read_text() == "years of work"
    assert (staged / "qwenq.json").is_file()


def test_the_root_is_refused_as_output_folder() -> None:
    clean_up_after_kill(Path("/"), {}, "")
    with pytest.raises(UsageError, match="a disk is mounted here"):
        require_free(Path("/"), "--out")
