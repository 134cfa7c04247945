"""Read a calibration set that `qwenq calibrate` saved."""

from __future__ import annotations

from pathlib import Path

from qwenq.calibration.dataset import CalibrationSet
from qwenq.calibration.sequences import check_vocabulary
from qwenq.errors import UsageError
from qwenq.models.local_path import local_path


def load_saved(
    path: Path, vocabulary: int, asked: tuple[int | None, int | None, int | None] = (None, None, None)
) -> CalibrationSet:
    """Return the set in a file, whose sizes are fixed.

    Args:
        path: the .safetensors file.
        vocabulary: ids have to be below it.
        asked: samples, tokens of each, and held-out sequences that the user named; None: not named.

    Raises:
        UsageError: no such file, or it has other sizes.
        CalibrationError: an id that the model does not have, or a file that is not a calibration set.
        CorruptFileError: a damaged file.
    """
    path = local_path(path, "the calibration set")
    if not path.is_file():
        raise UsageError("no such calibration set", where=path, hint="make it with `qwenq calibrate`")
    loaded = CalibrationSet.load(path)
    has = loaded.manifest
    for name, wish, fact in zip(
        ("samples", "seq-len", "held-out"), asked, (has.samples, has.seq_len, has.held_out), strict=True
    ):
        if wish is not None and wish != fact:
            raise UsageError(
                f"--{name} {wish} was asked for, but this saved set has {fact}",
                where=path,
                hint=f"leave --{name} out, or make another set",
            )
    for tokens in (loaded.tokens, loaded.held_out):
        check_vocabulary(tokens, vocabulary, str(path))
    return loaded
