"""Build a whole model with transformers, from a config and tensors that are here: nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qwenq.errors import UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.hf_config import refused_by_transformers
from qwenq.models.routed_experts import unfuse
from qwenq.models.source import require_shape


def build_whole_model(
    checkpoint: Checkpoint,
    config: Any,
    tensors: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    hint: str | None = None,
    **options: Any,
) -> Any:
    """Build a causal language model for inference, on the CPU unless ``options`` say otherwise.

    Args:
        checkpoint: for messages.
        config: of it, from ``hf_config.transformers_config``.
        tensors: by name; tied ones once.
        dtype: of the weights.
        hint: what to do about an architecture that transformers does not know.
        options: further ones of transformers' ``from_pretrained``.
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
    for name in report["missing_keys"]:
        require_shape(name, None, (), checkpoint.folder)
    for name, found, expected in report["mismatched_keys"]:
        require_shape(name, found, expected, checkpoint.folder)
    return model.eval().requires_grad_(False)


def assemble_unfused(
    checkpoint: Checkpoint,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """Return a causal language model for inference on the CPU, whose experts are ``RoutedExperts``.

    transformers' own loader would stack experts into tensors of three dimensions, also those that only stand
    for packed weights. Here the model is made on the meta device, its experts are taken apart, and tensors
    are put in their places as they are.

    Args:
        checkpoint: for messages.
        config: of it, from ``hf_config.transformers_config``.
        tensors: by name, each expert's apart; tied ones once.
        dtype: of the weights.
        options: further ones of transformers' ``from_config``.
    """
    from transformers import AutoModelForCausalLM

    with refused_by_transformers(checkpoint.folder):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        unfuse(model.base_model.layers, every=False)
    tied = {"lm_head.weight"} if checkpoint.tied else set()
    wanted = {name: place for name, place in model.state_dict().items() if name not in tied}
    for name, place in wanted.items():
        require_shape(name, tensors[name].shape if name in tensors else None, place.shape, checkpoint.folder)
    model.load_state_dict({name: tensors[name].to(dtype) for name in wanted}, strict=False, assign=True)
    model.tie_weights()
    _fill_computed(model)
    return model.eval().requires_grad_(False)


def _fill_computed(model: Any) -> None:
    """Give buffers that are in no file their values: rotary frequencies, which follow from the config."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=model.config))


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Switch transformers' progress bar off for a while: the caller shows progress."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
