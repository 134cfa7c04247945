"""A whole model as transformers builds it, from a config and tensors that are here: nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qwenq.errors import ModelError, UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.hf_config import refused_by_transformers
from qwenq.models.routed_experts import unfuse


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

    Raises:
        ModelError: tensors are missing or have the wrong shape; names the first.
    """
    from transformers import AutoModelForCausalLM

    with refused_by_transformers(checkpoint.folder):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        unfuse(model.base_model.layers, every=False)
    wanted = model.state_dict()
    tied = set() if not checkpoint.tied else {"lm_head.weight"}
    wrong = [
        name
        for name, place in wanted.items()
        if name not in tied and (name not in tensors or tensors[name].shape != place.shape)
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors are missing or have the wrong shape, the first is {wrong[0]}",
            where=checkpoint.folder,
            hint="copy the model again",
        )
    model.load_state_dict(
        {name: tensors[name].to(dtype) for name in wanted if name not in tied}, strict=False, assign=True
    )
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
    """transformers' own is off for a while: the caller shows progress."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
