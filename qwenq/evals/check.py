"""Stream both models block by block.

A 15 GB model is checked in the memory of one of its blocks, the hidden states, and two heads.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qwenq.errors import ModelError, UsageError
from qwenq.evals.divergence import TokenScores, score_tokens
from qwenq.evals.module_error import (
    EXPERT_TOKENS,
    MODULE_TOKENS,
    ModuleError,
    captured_inputs,
    chosen_sequences,
    module_error,
)
from qwenq.evals.result import CheckResult
from qwenq.evals.statistics import (
    by_position,
    mean_of_sequences,
    perplexity,
    rate_of_sequences,
    ratio_of_perplexities,
)
from qwenq.evals.verdict import judge
from qwenq.events import Listener, Notice, Update, counted, silent
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.gptq_config import QuantConfig
from qwenq.models.gptq_format import DequantisedSource, is_quantised, quantised_modules
from qwenq.models.pad_ffn import widened
from qwenq.models.random_weights import refuse_random

__all__ = ["CheckResult", "check", "require_comparable"]

TOKENS_PER_BATCH = 2048
_SAME_IN_BOTH = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def check(
    quantised: Checkpoint,
    base: Checkpoint,
    held_out: Tensor,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    listener: Listener = silent,
) -> CheckResult:
    """Compare a GPTQ checkpoint with the model it was made from.

    Args:
        quantised: a GPTQ folder, packed tensors.
        base: the same model before, plain weights.
        held_out: int64 [sequences, tokens], at least 2 tokens; text that calibration never saw.
        device: where to compute.
        dtype: of weights and hidden states. float32 shows the integers' cost alone; in 16 bits the two
            models' roundings differ, too, and are counted with it.
        listener: receives the progress, and a notice where a slower path runs, and why.

    Raises:
        UsageError: not a quantised model and its base (see ``require_comparable``), random weights, tokens
            out of the vocabulary, or too few.
        ModelError: tensors are missing or of other shapes than the config says.
        CorruptFileError: weights that are not finite.
    """
    quant = require_comparable(quantised, base)
    require_tokens(held_out, base)
    base = widened(base, quantised.config.get("intermediate_size"))  # Qwen's 72B is wider than its base
    plain = replace(quantised, source=DequantisedSource(quantised.source, quant, torch.float32))
    pair = _Pair(plain, base, quant, torch.device(device), dtype)
    if pair.passed_over:
        listener(Notice(pair.passed_over))
    with counted(listener, "checking") as progress, torch.inference_mode():
        scores, modules = pair.run(held_out, quantised_modules(quantised.source), progress)
    return _summarise(scores, modules, quant, held_out, device=str(device), dtype=dtype)


def require_comparable(quantised: Checkpoint, base: Checkpoint) -> QuantConfig:
    """Return the settings of ``quantised``, a GPTQ model of ``base``'s shape.

    Raises:
        UsageError: the first is not quantised, the second is, they differ in shape, or weights are random.
        UnsupportedError: quantised by something else than GPTQ.
    """
    for checkpoint in (quantised, base):
        refuse_random(checkpoint.config, "accuracy")
    if is_quantised(base.config):
        raise UsageError(
            "the base is itself quantised",
            where=base.folder,
            hint="name the full-precision model: --against BASE",
        )
    if not is_quantised(quantised.config):
        raise UsageError(
            "this model is not quantised, so there is nothing to check",
            where=quantised.folder,
            hint="quantise it first: `qwenq quantize MODEL --bits 4`",
        )
    for key in _SAME_IN_BOTH:
        has, wants = quantised.config.get(key), base.config.get(key)
        if has != wants and None not in (has, wants):
            raise _another_model(key, has, wants, base)
    has, wants = (one.config.get("intermediate_size", 0) for one in (base, quantised))
    if not has <= wants <= 2 * has:  # wider: zero channels were added before quantising (models/pad_ffn.py)
        raise _another_model("intermediate_size", wants, has, base)
    return QuantConfig.read(quantised.config, quantised.folder / "config.json")


def _another_model(key: str, has: object, wants: object, base: Checkpoint) -> UsageError:
    return UsageError(
        f"not the same model: {key} is {has} in the quantised one and {wants} in the base",
        where=base.folder,
        hint="name the model that was quantised: --against BASE",
    )


def require_tokens(held_out: Tensor, base: Checkpoint) -> None:
    """Refuse tokens that cannot be scored.

    Raises:
        UsageError: not [sequences, tokens] with 2 tokens or more, or an id without a row in the embedding.
    """
    if held_out.ndim != 2 or held_out.shape[0] < 1 or held_out.shape[1] < 2:
        raise UsageError(
            f"the held-out tokens are {list(held_out.shape)}; the check needs sequences of at least 2 tokens",
            hint="make more text: a set with held-out sequences, or --samples and --seq-len",
        )
    low, high, rows = int(held_out.min()), int(held_out.max()), int(base.config["vocab_size"])
    if low < 0 or high >= rows:
        raise UsageError(
            f"the held-out tokens hold id {low if low < 0 else high}; the model knows 0 … {rows - 1}",
            hint="make the text's tokens with this model's own tokenizer",
        )


class _Pair:
    """Two decoders that run block by block side by side."""

    def __init__(
        self,
        quantised: Checkpoint,
        base: Checkpoint,
        quant: QuantConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._quant = quant
        self._checkpoints = base, quantised
        self._base = BlockwiseDecoder(base, device, dtype)
        self._quantised = BlockwiseDecoder(quantised, device, dtype)
        self.passed_over = self._base.passed_over  # both have the same heads

    def run(
        self, tokens: Tensor, modules: list[str], progress: Update
    ) -> tuple[TokenScores, list[ModuleError]]:
        """Score all tokens; ``modules`` are the quantised linears' full names."""
        size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        batches = torch.split(tokens, size)
        chosen = chosen_sequences(*tokens.shape)
        rows = [[row - at * size for row in chosen if row // size == at] for at in range(len(batches))]
        step = _Steps(progress, len(self._base.names) + len(batches))
        base_hidden, hidden = self._base.embed(batches), self._quantised.embed(batches)
        errors: list[ModuleError] = []
        for index, prefix in enumerate(self._base.names):
            names = [m.removeprefix(f"{prefix}.") for m in modules if m.startswith(f"{prefix}.")]
            inputs = self._advance_base(index, names, base_hidden, rows)
            with self._quantised.block(index) as block:
                for at, states in enumerate(hidden):
                    hidden[at] = self._quantised.forward(block, states)
            errors += [self._module_error(f"{prefix}.{name}", x) for name, x in inputs.items()]
            step()
        scores = score_tokens(self._base, self._quantised, (base_hidden, hidden), batches, step)
        return scores, errors

    def _advance_base(
        self, index: int, names: list[str], hidden: list[Tensor], rows: list[list[int]]
    ) -> dict[str, Tensor]:
        """Run block ``index`` on ``hidden`` in place; return the inputs of its linears, [tokens, in] each.

        ``rows``: the sequences of each batch whose inputs are kept.
        """
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        with self._base.block(index) as block:
            for at, states in enumerate(hidden):
                with captured_inputs(block, names) as seen:
                    hidden[at] = self._base.forward(block, states)
                for name, (x,) in seen.items():
                    if x.ndim == 3:
                        kept[name].append(x[rows[at]].flatten(0, 1)[:MODULE_TOKENS])  # [tokens, in]
                    else:  # an expert's, of all sequences: [rows, in]
                        kept[name].append(x[:EXPERT_TOKENS].clone())
        return {name: torch.cat(parts)[:MODULE_TOKENS] for name, parts in kept.items()}

    def _module_error(self, name: str, x: Tensor) -> ModuleError:
        """Measure one linear from its weights in float32: the blocks' are rounded to the compute dtype."""
        weight, quantised = (c.read(f"{name}.weight").to(x.device).float() for c in self._checkpoints)
        if weight.shape != quantised.shape:
            raise ModelError(
                f"the quantised weight is {list(quantised.shape)}, the base's {list(weight.shape)}",
                where=name,
                hint="the folder mixes two models: quantise again",
            )
        return module_error(name, weight, quantised, x, self._quant.of(name))


class _Steps:
    def __init__(self, progress: Update, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _summarise(
    scores: TokenScores,
    modules: list[ModuleError],
    quant: QuantConfig,
    held_out: Tensor,
    *,
    device: str,
    dtype: torch.dtype,
) -> CheckResult:
    sequences, seq_len = held_out.shape
    kl = mean_of_sequences(scores.kl)
    if kl.low is not None:
        kl = replace(kl, low=max(0.0, kl.low))
    same_top = rate_of_sequences(scores.same_top)
    median, p99, p999 = (float(x) for x in np.quantile(scores.kl, (0.5, 0.99, 0.999)))
    return CheckResult(
        kl=kl,
        kl_median=median,
        kl_p99=p99,
        kl_p999=p999,
        kl_by_position=by_position(scores.kl),
        same_top=same_top,
        perplexity=perplexity(scores.nll),
        base_perplexity=perplexity(scores.base_nll),
        perplexity_ratio=ratio_of_perplexities(scores.nll, scores.base_nll),
        sequences=sequences,
        seq_len=seq_len,
        tokens=scores.kl.size,
        modules=tuple(modules),
        module_tokens=min(MODULE_TOKENS, len(chosen_sequences(sequences, seq_len)) * seq_len),
        bits=quant.bits,
        group_size=quant.group_size,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        verdict=judge(kl.value, same_top.value, quant.bits),
    )
