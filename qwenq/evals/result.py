"""Hold the check's result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qwenq.evals.module_error import ModuleError
from qwenq.evals.statistics import Estimate, Stretch, json_number
from qwenq.evals.verdict import Verdict


@dataclass(frozen=True)
class CheckResult:
    """Result of the check: the cost of quantising, measured on held-out text.

    Attributes:
        kl: mean KL(base ‖ quantised) a token, in nats.
        kl_median, kl_p99, kl_p999: median and quantiles (0.99, 0.999) over tokens.
        kl_by_position: mean KL along the sequences.
        same_top: share of tokens where both models rank the same token first.
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
    kl_by_position: tuple[Stretch, ...]
    same_top: Estimate
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
        fields = vars(self).items()
        plain = {name: value for name, value in fields if isinstance(value, int | str)}
        estimates = {name: value.to_json() for name, value in fields if isinstance(value, Estimate)}
        numbers = {name: json_number(value) for name, value in fields if isinstance(value, float)}
        modules = [
            {"name": m.name, "error": json_number(m.error), "rtn_error": json_number(m.rtn_error)}
            for m in self.modules
        ]
        verdict = asdict(self.verdict)
        return {
            "verdict": verdict,
            "broken": self.broken,
            **estimates,
            **numbers,
            **plain,
            "kl_by_position": [stretch.to_json() for stretch in self.kl_by_position],
            "modules": modules,
        }

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
            "perplexity": f"{self.perplexity:.3f}, base {self.base_perplexity:.3f}: "
            f"× {ratio.value:.4f}{_interval(ratio, '.4f')}",
        }
        if self.modules:
            error = sum(module.error for module in self.modules) / len(self.modules)
            rtn = sum(module.rtn_error for module in self.modules) / len(self.modules)
            lines["modules"] = f"mean error {error:.3%} of the output, round-to-nearest {rtn:.3%}"
        return lines | {"verdict": str(self.verdict)}


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return " (one sequence: no interval)"
    return f" (95 % interval {estimate.low:{form}} to {estimate.high:{form}})"
