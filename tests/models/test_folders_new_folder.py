from __future__ import annotations

from pathlib import Path

import pytest

from qwenq.errors import UsageError
from qwenq.models.folders import require_renameable


def test_links_are_refused_with_what_they_lead_to(tmp_path: Path) -> None:
    require_renameable(tmp_path / "new", "DST")
    (tmp_path / "link").symlink_to(tmp_path / "not yet")
    with pytest.raises(UsageError) as caught:
        require_renameable(tmp_path / "link", "DST")
    assert caught.value.hint == f"name what it leads to: DST {tmp_path.resolve() / 'not yet'}"


def test_so_is_where_a_disk_is_mounted() -> None:
    with pytest.raises(UsageError, match="a disk is mounted here") as caught:
        require_renameable(Path("/"), "--out")
    assert caught.value.hint == "name a new folder on it, such as --out /model"


def test_so_are_names_that_no_disk_takes_and_what_is_no_name(tmp_path: Path) -> None:
    require_renameable(tmp_path / ("a" * 200), "--out")
    with pytest.raises(UsageError, match="too long for this disk"):
        require_renameable(tmp_path / ("a" * 250), "--out")  # there is no room for ".partial"
    with pytest.raises(UsageError, match="does not name a new folder"):
        require_renameable(tmp_path / "new" / "..", "--out")
