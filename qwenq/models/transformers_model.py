"""Build transformers' models and blocks from a config.json and tensors that are here: nothing is fetched.

Experts become linears of their own, and each part of a block is either quantised or kept for a reason.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwenq import stopping
from qwenq.errors import ModelError, OutOfMemoryError, QwenqError, UnsupportedError
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.inspection import fill_computed
from qwenq.models.source import require_shape

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


def as_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return a cache as the argument that this version of transformers takes it by: 5.24 renamed it."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def transformers_config(config: Mapping[str, Any], folder: Path | None, hint: str | None = None) -> Any:
    """Build transformers' config of a config.json, without what steers the loader or serves other models."""
    from transformers import CONFIG_MAPPING

    left_out = _STEERS_THE_LOADER | _OF_OTHER_USES
    settings = {key: value for key, value in config.items() if key not in left_out}
    kind = settings.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise _no_model(kind, folder, hint)
    with refused_by_transformers(folder):
        return CONFIG_MAPPING[kind](**settings)


def _no_model(kind: str, folder: Path | None, hint: str | None) -> UnsupportedError:
    what = f"transformers has no causal language model of type {kind!r}"
    return UnsupportedError(what, where=folder, hint=hint)


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


# Take experts apart into linears, in the place of transformers' parameters of three dimensions.
#
# transformers keeps all experts of a block in two tensors and multiplies them by whatever code its
# configuration names. Here an expert is a module with ``gate_proj``, ``up_proj`` and ``down_proj``, under
# the names that quantised files have, so that each is quantised, packed and checked like any other linear.


@dataclass(frozen=True)
class Routed:
    """Which tokens an expert is given."""

    hidden: Tensor  # [tokens, width], the input of all experts of the block
    rows: Tensor  # int64, ascending: those that this expert is given


class Expert(nn.Module):
    """A gated MLP; ``routed`` is what the linear that is about to run was routed, for ``gptq.sequential``."""

    def __init__(
        self, hidden: int, width: int, activation: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gate_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
            self.up_proj = nn.Linear(hidden, width, bias=False, dtype=dtype)
            self.down_proj = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self._activation = activation
        self.routed: Routed | None = None

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the outputs for ``hidden[rows]``, [rows, hidden]."""
        x = hidden[rows]
        self.routed = Routed(hidden, rows)
        inner = self._activation(self.gate_proj(x)) * self.up_proj(x)
        self.routed = Routed(hidden, rows)  # another batch may have run while this one paused
        return self.down_proj(inner)  # type: ignore[no-any-return]

    def inner(self, x: Tensor) -> Tensor:
        """Return the input of ``down_proj`` for other tokens, [tokens, width]; no hook sees it."""
        gate = functional.linear(x, self.gate_proj.weight)
        return self._activation(gate) * functional.linear(x, self.up_proj.weight)


class RoutedExperts(nn.ModuleList):
    """The experts of a block.

    Args:
        experts: in the router's order.
        every: call every expert, also for no token: then which linears run does not depend on the batch.
    """

    def __init__(self, experts: Iterable[Expert], *, every: bool) -> None:
        super().__init__(experts)
        self._every = every

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, [tokens, width] as ``hidden`` is.

        ``chosen``, int64, and ``weights`` are [tokens, k].
        """
        out = torch.zeros_like(hidden)
        numbers = range(len(self)) if self._every else chosen.unique().tolist()
        for number in numbers:
            rows, place = torch.where(chosen == number)
            found = self[number](hidden, rows) * weights[rows, place, None]
            out.index_add_(0, rows, found.to(out.dtype))
        return out


def unfuse(blocks: Iterable[nn.Module], *, every: bool) -> bool:
    """Replace fused experts by ``RoutedExperts`` on the meta device; return whether there were any.

    Modules of another make (biases, no gate, interleaved rows, [in, out]) are left alone: code that goes
    through the parameters of a block then meets theirs, and refuses them by name.
    """
    found = False
    for block in blocks:
        for name, module in list(block.named_modules()):
            if _is_fused(module):
                count, hidden, width = module.down_proj.shape
                dtype = module.down_proj.dtype
                experts = (Expert(hidden, width, module.act_fn, dtype) for _ in range(count))
                block.set_submodule(name, RoutedExperts(experts, every=every).eval())
                found = True
    return found


def _is_fused(module: nn.Module) -> bool:
    """Return whether these are gated experts, gate's rows before up's, and nothing else."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) != {"gate_up_proj", "down_proj"} or any(tensor.ndim != 3 for tensor in own.values()):
        return False
    count, hidden, width = own["down_proj"].shape
    ordinary = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    return bool(
        ordinary and own["gate_up_proj"].shape == (count, 2 * width, hidden) and callable(module.act_fn)
    )


KEPT: tuple[tuple[str, str], ...] = (
    (r"\.gate$|\.router$", "the router: a few rows that choose the experts"),
    (r"shared_expert_gate$", "one row, which weighs the shared expert"),
    (r"linear_attn\.in_proj_(a|b|ba)$", "a row a head: decay and strength of a recurrent state"),
    (r"conv1d$", "a short depthwise convolution, no linear layer"),
)
"""Patterns of modules by their name in a block, and why they stay as they are. The first match counts."""


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a block that are quantised, by name, in definition order."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and _reason(name) is None
    }


Hook = Callable[[nn.Module, tuple[Any, ...]], None]


@contextmanager
def hooked(modules: Mapping[str, nn.Module], make: Callable[[str], Hook]) -> Iterator[None]:
    """Call what ``make`` returns for a module's name whenever that module is about to run."""
    handles = [module.register_forward_pre_hook(make(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_of(block: nn.Module) -> dict[str, str]:
    """Return the parameters of a block with two dimensions or more that stay as they are: name → reason."""
    linears = linears_of(block)
    kept = {}
    for name, parameter in block.named_parameters():
        module, _, leaf = name.rpartition(".")
        if parameter.ndim < 2 or (module in linears and leaf == "weight"):
            continue
        reason = _reason(module)
        if reason is None:
            raise UnsupportedError(
                f"{name} {list(parameter.shape)} of a {type(block).__name__} is not a linear layer, and no "
                "rule says that it may stay as it is",
                hint="this architecture is not supported yet",
            )
        kept[name] = reason
    return kept


def summary(kept: Iterable[dict[str, str]]) -> str | None:
    """Return one line for the user on what stays unquantised in all blocks; None: nothing does."""
    counts = Counter((name.removesuffix(".weight"), why) for block in kept for name, why in block.items())
    parts = [f"{name} in {count} layers ({why})" for (name, why), count in counts.items()]
    return f"not quantised: {'; '.join(parts)}" if parts else None


def _reason(module: str) -> str | None:
    return next((reason for pattern, reason in KEPT if re.search(pattern, f".{module}")), None)


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

    ``config`` is from ``transformers_config``; tied tensors are given once; ``hint`` says what to do about an
    architecture that transformers does not know.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_model(checkpoint.config["model_type"], checkpoint.folder, hint)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
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
    are put in their places as they are, each expert's apart.
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
    state = {name: tensors[name].to(place.dtype) for name, place in wanted.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for name, module in list(model.named_modules()):  # rotary frequencies, which follow from the config
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and not list(module.parameters()):
            model.set_submodule(name, type(module)(config=model.config))
    fill_computed(model, torch.device("cpu"))
    return model.eval().requires_grad_(False)


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
