"""Turn what the user typed into a path; a name that no disk takes is an error in a line."""

from __future__ import annotations

import os
from pathlib import Path

from qwenq.errors import UsageError


def local_path(text: str | Path, what: str) -> Path:
    """Return the path, ``~`` expanded; nothing need be there.

    Args:
        text: as typed.
        what: it stands for: MODEL, ``--out``.

    Raises:
        UsageError: a name that no disk takes, a folder that may not be searched, the home of nobody; a name
            that is not UTF-8.
    """
    require_utf8(text, what)
    try:
        path = Path(text).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: ~nobody
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"{what} cannot be looked for: {why}",
            where=str(text),
            hint="check its spelling and permissions",
        ) from error
    return path


def require_utf8(path: str | Path, what: str) -> None:
    """Refuse a name that JSON cannot hold and the safetensors library cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the name of {what} is not UTF-8: neither JSON nor the safetensors library takes it",
            where=path,
            hint="rename that folder or file",
        ) from error
