"""Build transformers' config object from config.json; its refusals become our errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qwenq import stopping
from qwenq.errors import ModelError, OutOfMemoryError, QwenqError, UnsupportedError

_STEERS_THE_LOADER = {
    "attn_implementation", "experts_implementation",  # could name a kernel on the hub: code to fetch and run
    "auto_map", "quantization_config", "device_map", "kernel_config", "use_kernels",
    "_attn_implementation_autoset",
}  # fmt: skip
"""Keys that choose what runs. That is decided here, never by a file that came with the weights."""
_OF_OTHER_USES = {
    "num_labels", "id2label", "label2id", "problem_type",  # classifiers'
    "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript",
    "sub_configs", "base_model_tp_plan", "base_model_pp_plan",  # a class's own, not a file's
}  # fmt: skip
"""Keys that say nothing about a language model, but change what its forward pass returns or costs."""


def transformers_config(config: Mapping[str, Any], folder: Path | None, hint: str | None = None) -> Any:
    """Build transformers' config of a config.json, without keys that steer the loader or serve other models.

    Args:
        config: as `qwenq.models.config.read_config` passed it.
        folder, hint: for messages.

    Raises:
        UnsupportedError: transformers does not know the model type.
        ModelError: it refuses a value; says which, in its words.
    """
    from transformers import CONFIG_MAPPING

    left_out = _STEERS_THE_LOADER | _OF_OTHER_USES
    settings = {key: value for key, value in config.items() if key not in left_out}
    kind = settings.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"transformers has no causal language model of type {kind!r}", where=folder, hint=hint
        )
    with refused_by_transformers(folder):
        return CONFIG_MAPPING[kind](**settings)


@contextmanager
def refused_by_transformers(folder: Path | None) -> Iterator[None]:
    """Turn whatever building a model raises into ``ModelError``: transformers checks few values."""
    try:
        yield
    except (MemoryError, QwenqError):
        raise
    except Exception as error:  # KeyError, TypeError, AssertionError, its own: there is no common class
        if (stop := stopping.behind(error)) is not None:
            raise stop from error
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise OutOfMemoryError(
                "there is not enough memory to build this model",
                where=folder,
                hint="free some, or use a smaller model or --dtype bfloat16",
            ) from error
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"transformers cannot build this model from config.json: {type(error).__name__}: {said}",
            where=folder,
            hint="config.json is damaged or of another version: copy it again from where the model came from",
        ) from error
