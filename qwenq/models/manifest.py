"""Name qwenq.json and the folders of an unfinished run, and check for them."""

from __future__ import annotations

from pathlib import Path

from qwenq.errors import ModelError

MANIFEST = "qwenq.json"
PARTIAL, STAGED, RUN = ".partial", "checkpoint", "run.json"
"""`qwenq quantize` stages what it has not checked yet in ``OUT.partial/checkpoint``, beside ``run.json``,
which says what the run is."""


def missing_manifest(folder: Path) -> list[str]:
    """Return a notice on quantised weights without a manifest; empty where there is one."""
    if (folder / MANIFEST).is_file():
        return []
    real = folder.resolve()
    if real.name == STAGED and real.parent.name.endswith(PARTIAL) and (real.parent / RUN).is_file():
        raise ModelError(
            "this quantised model is unfinished: it was never checked",
            where=folder,
            hint="run the same `qwenq quantize` command again: it resumes, and checks what it wrote",
        )
    return [f"no {MANIFEST}: not written by `qwenq quantize`, or unfinished; its files are not verified"]
