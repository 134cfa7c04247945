"""Complete names in a shell: models, GPUs, recipes. `qwenq --install-completion` sets a shell up for it.

Where nothing here fits, the shell completes files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def models(incomplete: str) -> list[str]:
    """Return ``bundled``, names of the catalogue, hub ids and folders here that begin with what is typed."""
    from qwenq.models import catalogue

    folder = Path(incomplete).expanduser().parent
    if incomplete.startswith((".", "/", "~")) or (folder != Path() and folder.is_dir()):
        return []
    here = sorted(each.name for each in Path().iterdir() if (each / "config.json").is_file())
    return _beginning(incomplete, ["bundled", *catalogue.names(), *catalogue.hub_ids(), *here])


def gpus(incomplete: str) -> list[str]:
    """Return names of GPUs; of a list that is separated by commas the last is completed."""
    from qwenq.planner.estimates import gpu_names

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning(last, gpu_names())]


def recipes(incomplete: str) -> list[str]:
    """Return names of the recipes that ship with qwenq."""
    from qwenq.workflow import shipped_recipes

    return _beginning(incomplete, sorted(shipped_recipes()))


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    typed = incomplete.lower()
    return [name for name in dict.fromkeys(names) if name.lower().startswith(typed)]
