"""A whole model as transformers builds it, from a config and tensors that are here: nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.hf_config import refused_by_transformers


def build_whole_model(
    checkpoint: Checkpoint,
    config: Any,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    hint: str | None = None,
    **options: Any,
) -> Any:
    """A causal language model for inference, on the CPU unless ``options`` say otherwise.

    Args:
        checkpoint: for messages.
        config: of it, from ``hf_config.transformers_config``.
        tensors: by name; tied ones once.
        dtype: of the weights.
        hint: what to do about an architecture that transformers does not know.
        options: further ones of transformers' ``from_pretrained``.

    Raises:
        UnsupportedError: transformers has no causal language model of this type.
        ModelError: tensors are missing or have the wrong shape; names the first.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise UnsupportedError(
            f"transformers has no causal language model of type {checkpoint.config['model_type']!r}",
            where=checkpoint.folder,
            hint=hint,
        ) from error
    with _without_progress_bar(), refused_by_transformers(checkpoint.folder):
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are refused below, by name, and not as a fault of the config
            output_loading_info=True,
            **options,
        )
    if wrong := [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]:
        raise ModelError(
            f"{len(wrong)} tensors are missing or have the wrong shape, the first is {wrong[0]}",
            where=checkpoint.folder,
            hint="copy the model again",
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers' own is off for a while: the caller shows progress."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
