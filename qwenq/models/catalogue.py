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
from qwenq.models.qwen_v1 import END_OF_TEXT, IM_END, qwen2_config
from qwenq.models.shapes import ModelShape
from qwenq.models.unsupported import refuse_by_name
from qwenq.published import PublishedRow, published_rows

BUNDLED = "smollm2-135m-instruct"
"""The catalogue name of the model that commands take when none is given."""

_HEAD_OF_LINEAR_ATTENTION = 128
_FLOAT32 = re.compile(r"(^|/)qwen3\.5-")
"""Names of models whose files store decay and norm of linear attention in float32."""
_PATCHES = {
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
}
"""What the vision towers of all sizes have in common."""


@dataclass(frozen=True)
class Entry:
    """One public shape.

    Attributes:
        names: what it is called here, the preferred name first.
        hub: hub ids with this shape, in the same order.
        parameters: of the language model in the publisher's own files, a stored copy of a tied head included.
        stored_head: the publisher's files hold that copy.
        config: a config.json in the layout of Llama, Qwen2 (of Qwen v1, too) or a later Qwen.
        vision_parameters: of the vision tower in the publisher's files.
    """

    names: tuple[str, ...]
    hub: tuple[str, ...]
    parameters: int
    stored_head: bool
    config: dict[str, Any]
    vision_parameters: int = 0

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


def published(name: str) -> list[PublishedRow]:
    """Return the published figures of a model, one row a precision; empty where there are none."""
    found = find(name)
    return [row for row in published_rows() if found is not None and row.model in found.names]


@cache
def _entries() -> tuple[Entry, ...]:
    text = files("qwenq.models").joinpath("catalogue.toml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {}
    for table in tomllib.loads(text)["model"]:
        tables[table["names"][0]] = tables.get(table.get("like"), {}) | table
    return tuple(map(_entry, tables.values()))


def _entry(table: dict[str, Any]) -> Entry:
    return Entry(
        names=tuple(table["names"]),
        hub=tuple(table["hub"]),
        parameters=table["parameters"],
        stored_head=table.get("stored_head", False),
        config=_config(table),
        vision_parameters=_vision_parameters(table),
    )


def _vision_parameters(table: dict[str, Any]) -> int:
    if not (tower := table.get("vision")):
        return 0
    sizes = {
        "depth": tower["depth"],
        "hidden_size": tower["hidden"],
        "intermediate_size": tower["ffn"],
        "out_hidden_size": table["hidden"],
        "deepstack_visual_indexes": range(tower.get("taps", 0)),
    }
    return vision_parameters({**_PATCHES, **sizes}) or 0


def _config(table: dict[str, Any]) -> dict[str, Any]:
    """Convert a catalogue table to the config.json that transformers would save for such a model."""
    if table["family"] == "v1":
        return qwen2_config(_v1_config(table))
    kind = table["family"]
    config: dict[str, Any] = {
        "architectures": [KNOWN_ARCHITECTURES[kind]],
        "model_type": kind,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": table["hidden"],
        "initializer_range": 0.02,
        "max_position_embeddings": table["context"],
        "num_attention_heads": table["heads"],
        "num_hidden_layers": table["layers"],
        "num_key_value_heads": table["kv_heads"],
        "rms_norm_eps": table.get("rms_norm_eps", 1e-6),
        "rope_theta": table.get("rope_theta", 1_000_000.0),
        "tie_word_embeddings": table.get("tied", False),
        "torch_dtype": table.get("dtype", "bfloat16"),
        "use_cache": True,
        "vocab_size": table["vocab"],
    }
    if "ffn" in table:
        config["intermediate_size"] = table["ffn"]
    if kind == "llama":
        return config | {"attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2}
    config |= {"bos_token_id": END_OF_TEXT, "eos_token_id": IM_END}
    if kind == "qwen2":
        return config | {"use_sliding_window": False}
    config |= {"head_dim": table["head_dim"], "attention_bias": False}
    if "attention" not in table:
        config["use_sliding_window"] = False
    return config | _experts(table) | _linear_attention(table)


def _experts(table: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json about a mixture of experts; empty where there is none."""
    if "experts" not in table:
        return {}
    shared = table.get("shared_width")
    keys = {
        "num_experts": table["experts"],
        "num_experts_per_tok": table["active_experts"],
        "moe_intermediate_size": table["expert_width"],
        "norm_topk_prob": True,
    }
    return keys | ({"shared_expert_intermediate_size": shared} if shared else {})


def _linear_attention(table: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of config.json about linear attention; empty where there is none."""
    if "attention" not in table:
        return {}
    return {
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": _HEAD_OF_LINEAR_ATTENTION,
        "linear_num_key_heads": table["key_heads"],
        "linear_num_value_heads": table["value_heads"],
        "linear_value_head_dim": _HEAD_OF_LINEAR_ATTENTION,
        "mtp_num_hidden_layers": table.get("draft_layers", 0),
        "partial_rotary_factor": 0.25,
    }


def _v1_config(table: dict[str, Any]) -> dict[str, Any]:
    """Convert a catalogue table to the config.json of a Qwen v1 model, which counts both MLP halves."""
    return {
        "hidden_size": table["hidden"],
        "intermediate_size": 2 * table["ffn"],
        "num_hidden_layers": table["layers"],
        "num_attention_heads": table["heads"],
        "kv_channels": table["hidden"] // table["heads"],
        "max_position_embeddings": table["context"],
        "rotary_emb_base": table["rope_theta"],
        "seq_length": table["seq_length"],
        "use_dynamic_ntk": table["dynamic_ntk"],
        "use_logn_attn": table["logn"],
        "torch_dtype": "bfloat16",
        "vocab_size": table["vocab"],
    }
