"""Publish a folder whole, in one step: rename it to the name that the user gave."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from qwenq.errors import UsageError
from qwenq.models.local_path import require_utf8

_LONGER = "." * 24  # what work folders have in their names besides


def require_renameable(target: Path, option: str) -> None:
    """Refuse a name that no finished folder can take, before any work is done for it.

    Args:
        target: what the user named.
        option: how he named it, for the hint.

    Raises:
        UsageError: it is a link, where a disk is mounted, no name of its own, too long, or not UTF-8.
    """
    require_utf8(target, option)
    if target.name == "..":
        raise UsageError(
            "this names no folder of its own", where=target, hint=f"name a new folder, such as {option} model"
        )
    try:
        os.lstat(target.parent / f"{target.name}{_LONGER}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(
                "the name is too long for this disk", where=target, hint=f"name a shorter one: {option} NAME"
            ) from error
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


def take_name(made: Path, target: Path) -> None:
    """Give a finished folder its name, which an empty folder may have.

    Raises:
        UsageError: something has been put there since ``require_renameable``.
        OSError: the disk refused.
    """
    try:
        os.replace(made, target)  # noqa: PTH105  Path.replace refuses an empty folder on some systems
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UsageError(
            "something has been put there since this run began",
            where=target,
            hint="move it away, then run the same command again",
        ) from error
