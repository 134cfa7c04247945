"""Check a quantised model against its base on held-out text, streamed block by block."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenq.comparison import Verdict, judge_check
from qwenq.compute.grid import round_to_nearest
from qwenq.errors import ModelError, UsageError
from qwenq.events import Listener, Notice, Update, counted, silent
from qwenq.models.blocks import BlockwiseDecoder
from qwenq.models.checkpoint import Checkpoint
from qwenq.models.foreign_formats import ForeignFormat
from qwenq.models.gptq_config import QuantConfig, is_quantised
from qwenq.models.gptq_format import DequantisedSource, quantised_modules
from qwenq.models.random_weights import refuse_random
from qwenq.models.transformers_model import Hook, hooked
from qwenq.statistics import (
    Estimate,
    PositionMean,
    json_number,
    mean_of_sequences,
    mean_over_modules,
    means_by_position,
    perplexity,
    rate_of_sequences,
    ratio_of_perplexities,
)

# Measure the error of each linear's output, and that of rounding to nearest.


MODULE_TOKENS = 512  # enough for two digits of a share of energy, at an eighth of the forward passes' cost
EXPERT_TOKENS = 64  # of each batch, for an expert: a block has hundreds, whose inputs are all kept at once


@dataclass(frozen=True)
class ModuleError:
    """Errors of one linear as shares of its output's energy: ‖(W − Q) x‖² / ‖W x‖² over tokens x.

    Attributes:
        name: "model.layers.0.self_attn.q_proj".
        error: of the quantised weight.
        rtn_error: of plain rounding to nearest at the same bits and group size.
    """

    name: str
    error: float
    rtn_error: float


def chosen_sequences(sequences: int, tokens: int) -> list[int]:
    """Return the sequences whose inputs are used: evenly spread, at most MODULE_TOKENS tokens, at least one.

    They are whole, because the first token of a sequence has extraordinary activations, and must not be
    counted more often than it occurs.
    """
    count = min(sequences, max(1, MODULE_TOKENS // tokens))
    return [index * sequences // count for index in range(count)]


def module_error(name: str, weight: Tensor, quantised: Tensor, x: Tensor, quant: QuantConfig) -> ModuleError:
    """Compare a quantised weight and its rounded one, float32 [out, in], on the same inputs [tokens, in].

    Products of bfloat16 inputs are bfloat16's, added up in float32: what is rounded there, each weight's and
    each output's last bits, is a hundred-thousandth of an energy. Others are float32's.
    """
    x = x if x.dtype == torch.bfloat16 else x.float()
    energy = _energy(x, weight)
    others = quantised, round_to_nearest(weight, quant.bits, quant.group_size, sym=quant.sym)
    return ModuleError(name, *(_energy(x, weight - other) / energy if energy else 0.0 for other in others))


def _energy(x: Tensor, weight: Tensor) -> float:
    return float((x @ weight.to(x.dtype).T).float().square_().sum(dtype=torch.float64))


# Compare two models' predictions token by token.


SLAB_TOKENS = 256
ROWS = 32  # of logits that are compared at a time: what is read ten times should stay in a processor's cache
TOPS = (5, 10)
"""Numbers of likeliest tokens whose overlap is measured."""
SLAB_ELEMENTS = 1 << 25  # logits of one model at a time: 128 MB in float32 (220 tokens of a 152k vocabulary)


@dataclass(frozen=True)
class TokenScores:
    """Both models' predictions of all tokens but each sequence's first: arrays [sequences, tokens − 1]."""

    kl: NDArray[np.float64]  # KL(base ‖ quantised) of the predicted distributions, in nats
    same_top: NDArray[np.bool_]  # whether both give the same token the highest probability
    # −log of the probability that the quantised model gave to the token that came, in nats
    nll: NDArray[np.float64]
    base_nll: NDArray[np.float64]  # the same for the base model
    # top5, top10: share of the 5 and 10 likeliest tokens that both models have in common
    top5: NDArray[np.float64]
    top10: NDArray[np.float64]


def score_tokens(
    base: BlockwiseDecoder,
    quantised: BlockwiseDecoder,
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]],
    batches: Sequence[Tensor],
    step: Callable[[], None],
) -> TokenScores:
    """Run both heads and compare, a slab of tokens at a time.

    Args:
        hidden: the last block's output of base and quantised, [batch, tokens, hidden] per batch.
        batches: int64 [batch, tokens], what the hidden states were made from.
    """
    slab = max(1, min(SLAB_TOKENS, SLAB_ELEMENTS // base.vocabulary))
    rows = []
    with base.head() as base_head, quantised.head() as head:
        for base_states, states, batch in zip(*hidden, batches, strict=True):
            parts = zip(
                torch.split(base_states[:, :-1].flatten(0, 1), slab),  # [batch · (tokens − 1), hidden]
                torch.split(states[:, :-1].flatten(0, 1), slab),
                torch.split(batch[:, 1:].flatten(), slab),
                strict=True,
            )
            scored = [compare_slab(base_head(b), head(q), t.to(base.device)) for b, q, t in parts]
            found = torch.cat(scored, dim=1).cpu()  # [6, batch · (tokens − 1)]
            rows.append(found.unflatten(1, (len(batch), -1)))
            step()
    kl, same, nll, base_nll, top5, top10 = torch.cat(rows, dim=1).numpy()
    return TokenScores(kl, same.astype(bool), nll, base_nll, top5, top10)


def compare_slab(*logits_and_targets: Tensor) -> Tensor:
    """Return ``compare_logits`` of any number of tokens, computed ``ROWS`` at a time."""
    parts = zip(*(torch.split(x, ROWS) for x in logits_and_targets), strict=True)
    return torch.cat([compare_logits(*part) for part in parts], dim=1)


def compare_logits(base: Tensor, quantised: Tensor, targets: Tensor) -> Tensor:
    """Return the fields of ``TokenScores`` in their order, float64 [6, tokens]; logits are changed in place.

    With a, b the logits less their maximum, Z = Σ exp: KL = Σ exp(a) (a − b) / Zₐ + log Z_b − log Zₐ. Nothing
    overflows, nothing is a logarithm of zero. Summed in float32 it is right to about 1e-6 nats, a tenth of
    what running the models in another float dtype changes.
    """
    (top_a, first_a), (top_b, first_b) = (x.max(-1, keepdim=True) for x in (base, quantised))
    same = (first_a == first_b)[:, 0]
    likeliest = [x.topk(min(TOPS[-1], x.shape[-1])).indices for x in (base, quantised)]
    shared = [_overlap(*(found[:, :count] for found in likeliest)) for count in TOPS]
    a, b = base.sub_(top_a), quantised.sub_(top_b)
    picked_a, picked_b = (x.gather(-1, targets[:, None])[:, 0].double() for x in (a, b))
    weights = a.exp()
    z_a = weights.sum(-1).double()
    expected = weights.mul_(a.sub_(b)).sum(-1).double() / z_a
    z_b = b.exp_().sum(-1).double()
    kl = (expected + z_b.log() - z_a.log()).clamp_(min=0)  # below zero is rounding; NaN stays NaN
    return torch.stack([kl, same.double(), z_b.log() - picked_b, z_a.log() - picked_a, *shared])


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the share of ids [tokens, count] of one that the other has, too: float64 [tokens]."""
    return (one[:, :, None] == other[:, None, :]).any(-1).double().mean(-1)


@dataclass(frozen=True)
class CheckResult:
    """Result of the check: the cost of quantising, measured on held-out text.

    Attributes:
        kl: mean KL(base ‖ quantised) a token, in nats.
        kl_median, kl_p99, kl_p999: median and quantiles (0.99, 0.999) over tokens.
        kl_by_position: mean KL along the sequences.
        same_top: share of tokens where both models rank the same token first.
        top5, top10: mean share of the base's 5 and 10 likeliest tokens that both models have in common.
        perplexity, base_perplexity: of the next token.
        perplexity_ratio: quantised over base, paired by sequence.
        sequences, seq_len, tokens: size of the text; the first token of a sequence is not predicted.
        modules: every quantised linear of the blocks, in file order.
        module_tokens: tokens that their errors were measured on.
        bits, group_size: of the quantised model.
        device, dtype: of both models' computation.
        verdict: a word and a sentence.
    """

    kl: Estimate
    kl_median: float
    kl_p99: float
    kl_p999: float
    kl_by_position: tuple[PositionMean, ...]
    same_top: Estimate
    top5: Estimate
    top10: Estimate
    perplexity: float
    base_perplexity: float
    perplexity_ratio: Estimate
    sequences: int
    seq_len: int
    tokens: int
    modules: tuple[ModuleError, ...]
    module_tokens: int
    bits: int
    group_size: int
    device: str
    dtype: str
    verdict: Verdict

    @property
    def broken(self) -> bool:
        """Return whether this is not a usable copy of its base, and must not be published."""
        return self.verdict.word == "broken"

    def to_json(self) -> dict[str, Any]:
        """Return plain values; None in place of numbers that are not finite."""
        by_position = [stretch.to_json() for stretch in self.kl_by_position]
        plain: dict[str, Any] = _finite({**asdict(self), "kl_by_position": by_position})
        return {"verdict": plain.pop("verdict"), "broken": self.broken, **plain}

    def worst_modules(self, count: int) -> list[ModuleError]:
        """Return the ``count`` modules with the largest error, worst first."""
        return sorted(self.modules, key=lambda module: module.error, reverse=True)[:count]

    def summary(self) -> dict[str, str]:
        """Return a label and a line for each figure; the verdict comes last."""
        kl, same, ratio = self.kl, self.same_top, self.perplexity_ratio
        lines = {
            "KL": f"{kl.value:.4f} nats a token{_interval(kl, '.4f')}; "
            f"median {self.kl_median:.4f}, 99 % quantile {self.kl_p99:.3f}, 99.9 % {self.kl_p999:.3f}",
            "same token": f"{same.value:.1%} of {self.tokens:,} tokens have the same most likely one"
            f"{_interval(same, '.1%')}",
            "top tokens": f"{self.top5.value:.1%} of the 5 likeliest are the same"
            f"{_interval(self.top5, '.1%')}, {self.top10.value:.1%} of the 10 likeliest"
            f"{_interval(self.top10, '.1%')}",
            "perplexity": f"{self.perplexity:.3f}, base {self.base_perplexity:.3f}: "
            f"× {ratio.value:.4f}{_interval(ratio, '.4f')}",
        }
        if self.modules:
            error, rtn = _mean_errors(self.modules)
            lines["modules"] = (
                f"mean error on held-out text {error:.3%} of the output, round-to-nearest {rtn:.3%}"
            )
        parts = self.errors_by_part()
        if not parts.keys() <= {"self_attn", "mlp"}:  # of a dense model, the two say little
            said = (f"{part} {error:.3%} ({rtn:.3%})" for part, (error, rtn) in parts.items())
            lines["by part"] = f"the same, in brackets round-to-nearest: {', '.join(said)}"
        return lines | {"verdict": str(self.verdict)}

    def errors_by_part(self) -> dict[str, tuple[float, float]]:
        """Return mean errors, and those of rounding to nearest, by part of a block: all experts are one."""
        parts: dict[str, list[ModuleError]] = {}
        for module in self.modules:
            if found := _PART.search(module.name):
                parts.setdefault(found[1], []).append(module)
        return {part: _mean_errors(modules) for part, modules in parts.items()}


_PART = re.compile(r"\.layers\.\d+\.(.+?)(?:\.\d+)?\.\w+$", re.ASCII)


def _mean_errors(modules: Sequence[ModuleError]) -> tuple[float, float]:
    """Return the mean error, and that of rounding to nearest."""
    return (
        mean_over_modules((module.name, module.error) for module in modules),
        mean_over_modules((module.name, module.rtn_error) for module in modules),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return json_number(value) if isinstance(value, float) else value


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return " (one sequence: no interval)"
    return f" (95 % interval {estimate.low:{form}} to {estimate.high:{form}})"


# Stream both models block by block.
#
# A 15 GB model is checked in the memory of one of its blocks, the hidden states, and two heads.


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
    step: str = "checking",
) -> CheckResult:
    """Compare a quantised checkpoint with the model it was made from.

    Args:
        quantised: a GPTQ folder, packed tensors; or another tool's, whose weights are shown dequantised.
        base: the same model before, plain weights.
        held_out: int64 [sequences, tokens], at least 2 tokens; text that calibration never saw.
        device: where to compute.
        dtype: of weights and hidden states. float32 shows the integers' cost alone; in 16 bits the two
            models' roundings differ, too, and are counted with it.
        listener: receives the progress, and a notice where a slower path runs, and why.
        step: name of the progress.
    """
    quant = require_comparable(quantised, base)
    require_tokens(held_out, base)
    if quantised.foreign is None:
        plain = replace(quantised, source=DequantisedSource(quantised.source, quant, torch.float32))
        measured = quantised_modules(quantised.source)
    else:
        plain, measured = quantised, _comparable_modules(quantised, quantised.foreign.format, base, listener)
    widths = [one.config.get("intermediate_size") for one in (base, quantised)]
    if widths[0] != widths[1]:
        listener(
            Notice(f"the MLP has {widths[1]} channels, the base's {widths[0]}: its modules are left out")
        )
        measured = [name for name in measured if ".mlp." not in name]
    with counted(listener, step) as progress:
        before, after = (BlockwiseDecoder(model, torch.device(device), dtype) for model in (base, plain))
        if before.fallback_notice:  # both have the same heads
            listener(Notice(before.fallback_notice))
        with torch.inference_mode():
            scores, modules = _measure(before, after, quant, held_out, measured, progress)
    return _summarise(scores, modules, quant, held_out, device=str(device), dtype=dtype)


def require_quantised(model: Checkpoint) -> None:
    """Refuse a model that is not quantised, or whose weights are random."""
    if not is_quantised(model.config) and model.foreign is None:
        raise UsageError(
            "this model is not quantised, so there is nothing to check",
            where=model.folder,
            hint="the quantised model comes first: `qwenq check QUANTISED --against BASE`",
        )
    refuse_random(model.config, "accuracy")


def require_comparable(quantised: Checkpoint, base: Checkpoint) -> QuantConfig:
    """Return the settings of ``quantised``, a model of ``base``'s shape; refuse any other pair."""
    require_quantised(quantised)
    refuse_random(base.config, "accuracy")
    if is_quantised(base.config):
        raise UsageError(
            "the base is itself quantised",
            where=base.folder,
            hint="name the full-precision model: --against BASE",
        )
    for key in _SAME_IN_BOTH:
        has, wants = quantised.config.get(key), base.config.get(key)
        if has != wants and None not in (has, wants):
            raise _another_model(key, has, wants, base)
    has, wants = (one.config.get("intermediate_size", 0) for one in (base, quantised))
    if not has <= wants <= 2 * has:  # wider: Qwen added channels of zeros to its 72B before it quantised it
        raise _another_model("intermediate_size", wants, has, base)
    if quantised.foreign is not None:
        found = quantised.foreign.format
        return QuantConfig(found.bits, found.group_size, found.symmetric)
    return QuantConfig.read(quantised.config, quantised.folder / "config.json")


def _comparable_modules(
    quantised: Checkpoint, found: ForeignFormat, base: Checkpoint, listener: Listener
) -> list[str]:
    """Return the modules of another tool's model whose weights can be compared with the base's one by one.

    AWQ and SmoothQuant move factors from weights into the norms before them, and rotations change both:
    then only what the whole model computes can be compared.
    """
    if not found.integers:
        listener(Notice("errors by module are measured only for integers, and these weights are floats"))
        return []
    stored = set(base.names())
    norms = [name for name in quantised.names() if name.endswith("norm.weight") and name in stored]
    for name in norms:
        if not torch.allclose(quantised.read(name).float(), base.read(name).float(), rtol=1e-2, atol=1e-3):
            listener(
                Notice(
                    f"{name} is not the base's: weights were scaled or rotated before they were rounded, so "
                    "errors by module would mean nothing"
                )
            )
            return []
    return quantised.foreign_modules


def _another_model(key: str, has: object, wants: object, base: Checkpoint) -> UsageError:
    return UsageError(
        f"not the same model: {key} is {has} in the quantised one and {wants} in the base",
        where=base.folder,
        hint="name the model that was quantised: --against BASE",
    )


def require_tokens(held_out: Tensor, base: Checkpoint) -> None:
    """Refuse tokens that cannot be scored."""
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


def _measure(
    base: BlockwiseDecoder,
    quantised: BlockwiseDecoder,
    quant: QuantConfig,
    tokens: Tensor,
    modules: list[str],
    progress: Update,
) -> tuple[TokenScores, list[ModuleError]]:
    """Run both models side by side: score all tokens, and measure the linears called ``modules``."""
    size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
    batches = torch.split(tokens, size)
    chosen = chosen_sequences(*tokens.shape)
    rows = [[row - at * size for row in chosen if row // size == at] for at in range(len(batches))]
    done, total = count(1), len(base.names) + len(batches)

    def step() -> None:
        progress(next(done), total)

    base_hidden, hidden = base.embed(batches), quantised.embed(batches)
    errors: list[ModuleError] = []
    for index, prefix in enumerate(base.names):
        names = [m.removeprefix(f"{prefix}.") for m in modules if m.startswith(f"{prefix}.")]
        inputs = _advance_base(base, index, names, base_hidden, rows)
        with quantised.block(index) as block:
            for at, states in enumerate(hidden):
                hidden[at] = quantised.forward(block, states)
        checkpoints = base.checkpoint, quantised.checkpoint
        errors += [_error_of(f"{prefix}.{name}", x, quant, checkpoints) for name, x in inputs.items()]
        step()
    return score_tokens(base, quantised, (base_hidden, hidden), batches, step), errors


def _advance_base(
    base: BlockwiseDecoder, index: int, names: list[str], hidden: list[Tensor], rows: list[list[int]]
) -> dict[str, Tensor]:
    """Run block ``index`` on ``hidden`` in place; return the inputs of its linears, [tokens, in] each.

    ``rows``: the sequences of each batch whose inputs are kept.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    batch: list[int] = []

    def keep(name: str) -> Hook:
        def hook(_: object, args: tuple[Any, ...]) -> None:
            if args[0].ndim == 3:
                kept[name].append(args[0][batch].flatten(0, 1)[:MODULE_TOKENS])  # [tokens, in]
            else:  # an expert's, of all sequences: [rows, in]
                kept[name].append(args[0][:EXPERT_TOKENS].clone())

        return hook

    with base.block(index) as block, hooked({name: block.get_submodule(name) for name in names}, keep):
        for at, states in enumerate(hidden):
            batch[:] = rows[at]
            hidden[at] = base.forward(block, states)
    return {name: torch.cat(parts)[:MODULE_TOKENS] for name, parts in kept.items()}


def _error_of(
    name: str, x: Tensor, quant: QuantConfig, checkpoints: tuple[Checkpoint, Checkpoint]
) -> ModuleError:
    """Measure one linear from its weights in float32: the blocks' are rounded to the compute dtype."""
    weight, quantised = (one.read(f"{name}.weight").to(x.device).float() for one in checkpoints)
    if weight.shape != quantised.shape:
        raise ModelError(
            f"the quantised weight is {list(quantised.shape)}, the base's {list(weight.shape)}",
            where=name,
            hint="the folder mixes two models: quantise again",
        )
    return module_error(name, weight, quantised, x, quant.of(name))


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
    kl = mean_of_sequences(scores.kl).within(0.0)
    same_top = rate_of_sequences(scores.same_top)
    median, p99, p999 = (float(x) for x in np.quantile(scores.kl, (0.5, 0.99, 0.999)))
    return CheckResult(
        kl=kl,
        kl_median=median,
        kl_p99=p99,
        kl_p999=p999,
        kl_by_position=means_by_position(scores.kl),
        same_top=same_top,
        top5=mean_of_sequences(scores.top5).within(0.0, 1.0),
        top10=mean_of_sequences(scores.top10).within(0.0, 1.0),
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
        verdict=judge_check(kl.value, same_top.value, quant.bits, scores.kl.size),
    )
