"""Tell a whole snapshot in the hub's cache from what a download that died has left.

The hub's library puts a file into a snapshot once it is whole, and keeps the list of the repository's files
(since 2.4): a snapshot that lacks one of them is refused there. One that another program, or an older
version, has made may have no such list: then its own files have to agree with each other.
"""

from __future__ import annotations

import re
from pathlib import Path

from qwenq.errors import QwenqError

_SHARD = re.compile(r".*-\d+-of-(\d+)\.(?:safetensors|bin)")


def what_is_missing(snapshot: Path) -> str | None:
    """Return why a snapshot cannot be used as it is; None: it is whole, as far as its files tell."""
    names = {path.name for path in snapshot.iterdir() if path.is_file()}  # a link into nowhere is none
    if "config.json" not in names:
        return "config.json is missing"
    try:
        return _missing_weights(snapshot, names)
    except QwenqError as error:
        return error.what


def _missing_weights(snapshot: Path, names: set[str]) -> str | None:
    from qwenq.models.safetensors_files import open_safetensors, read_index

    source = open_safetensors(snapshot)  # the index's files, and every header against its file's length
    if source is not None:
        return _missing_shard({file.name for file in source.files})
    for index in snapshot.glob("*.bin.index.json"):
        absent = set(read_index(index).values()) - names
        if absent:
            return f"the shard {min(absent)} is missing"
    return _missing_shard({name for name in names if name.endswith(".bin")})


def _missing_shard(names: set[str]) -> str | None:
    """Report shards that others count and that are not there: the index may not have come either."""
    totals = [int(found[1]) for name in names if (found := _SHARD.fullmatch(name))]
    if totals and len(totals) < max(totals):
        return f"only {len(totals)} of {max(totals)} shards are there"
    return None
