"""Folders that appear whole, in one step: renamed to the name that the user gave."""

from __future__ import annotations

import os
from pathlib import Path

from qwenq.errors import UsageError


def require_renameable(target: Path, option: str) -> None:
    """Refuse a name that no finished folder can take, before any work is done for it.

    Args:
        target: what the user named.
        option: how he named it, for the hint.

    Raises:
        UsageError: it is a link, or where a disk is mounted.
    """
    if target.is_symlink():
        raise UsageError(
            "this is a link; a finished folder is renamed to what you named, and cannot replace a link",
            where=target,
            hint=f"name what it leads to: {option} {target.resolve()}",
        )
    if os.path.ismount(target):
        raise UsageError(
            "a disk is mounted here; a finished folder is renamed to what you named, and cannot replace that",
            where=target,
            hint=f"name a new folder on it, such as {option} {target / 'model'}",
        )
