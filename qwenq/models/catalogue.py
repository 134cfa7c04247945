"""List public model shapes by name, so that planning needs no download. Imports no torch.

The data lie beside this file, in ``catalogue.toml``; what the cards say is a leaf, ``qwenq.published``.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from qwenq.errors import UsageError
from qwenq.models.block_shapes import vision_parameters
from qwenq.models.config import KNOWN_ARCHITECTURES
from qwenq.models.qwen_v1 import qwen2_config
from qwenq.models.shapes import ModelShape
from qwenq.models.unsupported import refuse_by_name

BUNDLED = "smollm2-135m-instruct"
"""The catalogue name of the model that commands take when none is given."""

_NOT_OF_CONFIG = ("names", "hub", "parameters", "stored_head", "like", "vision", "secondary")
"""Keys of catalogue.toml that are none of config.json."""
_FLOAT32 = re.compile(r"(^|/)qwen3\.5-")
"""Names of models whose files store decay and norm of linear attention in float32."""


@dataclass(frozen=True)
class Entry:
    """One public shape."""

    names: tuple[str, ...]  # what it is called here, the preferred name first
    hub: tuple[str, ...]  # hub ids with this shape, in the same order
    # of the language model in the publisher's own files, a stored copy of a tied head included
    parameters: int
    stored_head: bool  # the publisher's files hold that copy
    config: dict[str, Any]  # a config.json in the layout of Llama, Qwen2 (of Qwen v1, too) or a later Qwen
    vision_parameters: int = 0  # of the vision tower in the publisher's files
    secondary: str | None = None  # where sizes come from that no publisher's file was read for

    @property
    def shape(self) -> ModelShape:
        """Return its sizes."""
        return ModelShape.from_config(self.config)

    def dtype_of(self, name: str) -> str:
        """Return the dtype in which the weights of this name are stored.

        The bundled model was dequantised to float32, its namesake on the hub is bfloat16 as all others.
        """
        return str(self.config["torch_dtype"]) if name.lower() in self.names else "bfloat16"

    def beside(self, name: str) -> int:
        """Return the bytes that the files of this name hold beyond draft layers and language model."""
        wider = self.shape.float32_parameters * 2 if _FLOAT32.search(name.lower()) else 0
        return self.vision_parameters * 2 + wider

    def hub_of(self, name: str) -> str:
        """Return the hub id that belongs to one of its names."""
        return self.hub[min(self.names.index(name.lower()), len(self.hub) - 1)]


def names() -> list[str]:
    """Return the preferred name of every entry, in the order of the catalogue."""
    return [entry.names[0] for entry in _entries()]


def hub_ids() -> list[str]:
    """Return the hub ids of all entries, in the order of the catalogue."""
    return [hub for entry in _entries() for hub in entry.hub]


def find(name: str) -> Entry | None:
    """Return the entry of a name or hub id, in any case; None where there is none."""
    wanted = name.lower()
    known = (item for item in _entries() for key in (*item.names, *item.hub) if key.lower() == wanted)
    return next(known, None)


def entry(name: str) -> Entry:
    """Return the entry of a name or hub id; of another name, suggest the nearest ones."""
    found = find(name)
    if found is None:
        refuse_by_name(name)
        raise UsageError(
            f"no model called {name!r} in the catalogue",
            where="MODEL",
            hint=f"did you mean {' or '.join(suggestions(name))}?",
        )
    return found


def suggestions(name: str, count: int = 2, alike: float = 0.0) -> list[str]:
    """Return the catalogue names nearest to a misspelt or shortened one, best first.

    Those that begin with it lead, then those that have all of its parts (``qwen3-4b-2507``).
    """
    from rapidfuzz import fuzz, process

    typed = name.lower().rpartition("/")[2]
    known = [known for item in _entries() for known in item.names]
    parts = set(typed.split("-"))
    longer = (each for each in known if typed and (each.startswith(typed) or parts <= set(each.split("-"))))
    begun = sorted(longer, key=lambda each: (not each.startswith(typed), len(each)))
    matches = process.extract(typed, known, scorer=fuzz.ratio, limit=count, score_cutoff=alike)
    return list(dict.fromkeys([*begun, *(str(match[0]) for match in matches)]))[:count]


def config_for(name: str) -> dict[str, Any]:
    """Return a config.json for a catalogue name (of Qwen v1 in the layout of Qwen2)."""
    return dict(entry(name).config)


@cache
def _entries() -> tuple[Entry, ...]:
    data = tomllib.loads(files("qwenq.models").joinpath("catalogue.toml").read_text(encoding="utf-8"))
    tables: dict[str, dict[str, Any]] = {}
    for table in data["model"]:
        tables[table["names"][0]] = tables.get(table.get("like"), {}) | table
    return tuple(_entry(table, data) for table in tables.values())


def _entry(table: dict[str, Any], data: dict[str, Any]) -> Entry:
    """Return an entry of its table, and of what all models, or those of its type, have in common."""
    kind = table["model_type"]
    own = {key: value for key, value in table.items() if key not in _NOT_OF_CONFIG}
    config = {**data["common"], "architectures": [KNOWN_ARCHITECTURES[kind]], **data["type"][kind], **own}
    tower = data["vision"] | table.get("vision", {})  # of a model without one no depth is known
    seen = {"out_hidden_size": own["hidden_size"], "deepstack_visual_indexes": range(tower["taps"])}
    return Entry(
        names=tuple(table["names"]),
        hub=tuple(table["hub"]),
        parameters=table["parameters"],
        stored_head=table.get("stored_head", False),
        config=qwen2_config(config) if kind == "qwen" else config,
        vision_parameters=vision_parameters(tower | seen) or 0,
        secondary=table.get("secondary"),
    )
