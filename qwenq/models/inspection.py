"""Run decoders that transformers' code alone describes: what surrounds their blocks is its own.

For the families that are known here, tables say how hidden states are embedded and what the head does. Of
any other causal language model of transformers, these functions check that it is a plain stack of blocks, and
leave all that comes before and behind the blocks to the code of its class: scaled embeddings, capped logits.
Its tensors have the names that transformers' rules give them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwenq.errors import UnsupportedError

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.", "lm_head.weight"
_BLOCKS = "model.layers."
_HINT = "this architecture is not supported yet"


def require_plain_stack(model: Any, folder: Path | None) -> None:
    """Refuse a language model that is more than an embedding, blocks, a norm, and a head without a bias."""
    surplus = (
        name
        for name in model.state_dict()
        if name not in (EMBEDDING, HEAD) and not name.startswith((_BLOCKS, NORM))
    )
    if (name := next(surplus, None)) is not None:
        raise UnsupportedError(
            f"transformers' {type(model).__name__} is not a plain stack of blocks: it has {name}",
            where=folder,
            hint=_HINT,
        )


def attention_of(model_class: Any, config: Any) -> tuple[str, str]:
    """Return the attention of transformers that computes what a model's class asks for, and the reason."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager", "its scores are soft-capped"
    if not getattr(model_class, "_supports_sdpa", False):
        return "eager", "its class supports no fused attention"
    return "sdpa", "its blocks are transformers' own"


def fill_computed(model: Any, device: torch.device) -> None:
    """Give buffers that are in no file their values, by the model's own initialisation."""
    for name, module in model.named_modules():
        missing = {key: tensor for key, tensor in computed_buffers(module).items() if tensor.is_meta}
        for key, tensor in missing.items():
            if tensor.is_floating_point():
                module._buffers[key] = torch.full_like(tensor, float("nan"), device=device)
        if missing:
            with torch.no_grad():
                model._init_weights(module)
        for key in missing:
            value = module._buffers[key]
            if value is None or value.is_meta or bool(value.isnan().any()):
                raise UnsupportedError(
                    f"nothing says what the buffer {key} of {name or type(model).__name__} holds", hint=_HINT
                )


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a module, without its children's, that are in no file."""
    own = module._non_persistent_buffers_set
    return {key: tensor for key, tensor in module._buffers.items() if key in own and tensor is not None}


class _Outputs:
    """Hidden states in the form that any class reads them from: all other outputs are None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands in for the blocks: gives what it was given."""

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> _Outputs:
        return _Outputs(self.hidden)


class ClassHead:
    """What a model's class makes of the hidden states behind the last norm: its head, and what follows that.

    Args:
        model: a causal language model of transformers; it is not changed.
        product: in the place of its output head, [batch, tokens, hidden] → [batch, tokens, vocabulary].
    """

    def __init__(self, model: Any, product: nn.Module) -> None:
        self._shell = copy.copy(model)
        self._shell._modules = dict(model._modules)  # the copy shares the parts that are not replaced
        self._given = _Given()
        setattr(self._shell, model.base_model_prefix, self._given)
        self._shell.set_output_embeddings(product)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute logits: […, hidden] → […, vocabulary]."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        self._given.hidden = rows
        logits: Tensor = self._shell(inputs_embeds=rows, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)


# Translate the names of tensors in files into those of transformers' model, by transformers' own rules.
#
# Some architectures are published under other names than transformers' modules have: a Mixtral's experts are
# ``block_sparse_moe.experts.0.w1``. Names alone are translated here: a rule that also changes values (it
# transposes, permutes, splits) is refused where it would apply, as the files would then be read wrongly.


_EXPERTS_OF = {
    ("gate_up_proj", "MergeModulelist", "Concatenate"): ("gate_proj", "up_proj"),
    ("down_proj", "MergeModulelist"): ("down_proj",),
}
"""Of rules that only stack experts: the target and the operations → the expert's linears, in their order."""
_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


def model_names(model_type: str, folder: Path | None = None) -> Callable[[str], str]:
    """Return a function from a name in the files to that in transformers' model, experts apart."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    rules = [_rule(transform, folder) for transform in get_checkpoint_conversion_mapping(model_type) or ()]

    def translate(name: str) -> str:
        for rule in rules:
            name = rule(name)
        return name

    return translate


def _rule(transform: Any, folder: Path | None) -> Callable[[str], str]:
    """Return one rule of transformers as a function of names; it raises where values would change."""
    operations = [type(operation).__name__ for operation in getattr(transform, "operations", None) or ()]
    if not operations:
        return lambda name: str(transform.rename_source_key(name)[0])
    targets, sources = transform.target_patterns, transform.source_patterns
    linears = _EXPERTS_OF.get((targets[0].rpartition(".")[2].rstrip("$"), *operations))
    found = [_EXPERT.search(source) for source in sources]
    if len(targets) == 1 and linears is not None and len(linears) == len(sources) and all(found):
        own = {match[1]: linear for match, linear in zip(found, linears, strict=True) if match is not None}
        leaves = re.compile(rf"(.*\.experts\.\d+)\.({'|'.join(map(re.escape, own))})(\.\w+)")

        def rename(name: str) -> str:
            if (match := leaves.fullmatch(name)) is None:
                return name
            return f"{match[1]}.{own[match[2]]}{match[3]}"

        return rename

    def refuse(name: str) -> str:
        if transform.rename_source_key(name)[1] is not None:
            raise UnsupportedError(
                f"transformers changes the values of {name} as it loads them ({', '.join(operations)})",
                where=folder,
                hint="this architecture's files are not read here: only names are translated",
            )
        return name

    return refuse
