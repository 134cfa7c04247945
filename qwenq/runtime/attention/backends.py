"""List the attention backends by name, with what cannot run here and why, and measure the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwenq.errors import UnsupportedError, UsageError
from qwenq.runtime.attention.flash import FlashV1, Split, flash_v2
from qwenq.runtime.attention.plain import Attention, GroupedDecode, Off, Sdpa
from qwenq.runtime.cache import Span
from qwenq.runtime.generation import timed

HEADS, HEAD_DIM = 16, 128  # of the measurement: one layer of Qwen-1.8B
PROMPT, CONTEXT = 512, 2048  # tokens of the prompt, and slots that a decode step reads
_REPEATS = 3


class Autotuned:
    """The backends that were fastest for prompts and for decode steps of that device and dtype.

    On a CPU steps are those of ``grouped``, unmeasured: what it saves lies in the step around attention.
    """

    name = "best"

    def __init__(self, candidates: Sequence[Attention], device: torch.device, dtype: torch.dtype) -> None:
        def fastest(among: Sequence[Attention], tokens: int, end: int) -> Attention:
            return min(among, key=lambda each: _measure(each, tokens, end, device, dtype))

        grouped = [each for each in candidates if isinstance(each, GroupedDecode)]
        self._prefill = fastest(candidates, PROMPT, PROMPT)
        self._decode = grouped[0] if grouped else fastest(candidates, 1, CONTEXT)
        self.has_step_layout = bool(grouped)
        self.implementation = (
            f"fastest measured at load among {', '.join(each.name for each in candidates)}: "
            f"prefill {self._prefill.name} ({self._prefill.implementation}), "
            f"decode {self._decode.name} ({self._decode.implementation})"
            f"{', not measured' if grouped else ''}"
        )

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
        """See `Attention`."""
        chosen = self._decode if queries.shape[2] == 1 else self._prefill
        return chosen(queries, keys, values, span)


def _measure(attention: Attention, tokens: int, end: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the seconds of one call, the shortest of a few."""
    queries = torch.zeros(1, HEADS, tokens, HEAD_DIM, device=device, dtype=dtype)
    keys = torch.zeros(1, HEADS, end, HEAD_DIM, device=device, dtype=dtype)
    positions = torch.arange(end - tokens, end, device=device).unsqueeze(0)
    span = Span(positions, end - tokens, end, causal=tokens == end, mask=None)
    return min(timed(lambda: attention(queries, keys, keys, span), device, _REPEATS))


class Availability(NamedTuple):
    """Whether a backend can run here: exactly one of both is None."""

    name: str
    implementation: str | None  # what would run
    reason: str | None  # why it cannot, and what would help


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """Return the backend of that name; one that cannot run here is refused, never replaced.

    Args:
        name: ``v2`` (FlashAttention-2), ``v1`` (FlashAttention), ``off`` (no fused kernel), ``sdpa``
            (whatever torch picks), ``split`` (``sdpa``, decode steps with the cache split over programs),
            ``grouped`` (``sdpa``, decode steps laid out for a CPU),
            ``best`` (the fastest of these, measured now).
        device, dtype: of queries, keys and values.

    Raises:
        UsageError: there is no such backend.
        UnsupportedError: it cannot run here; names the reason and what would help.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"there is no attention {name!r}", where="--attention", hint=f"use {', '.join(BACKENDS)}"
        )
    if name != "best":
        return _BUILDERS[name](device, dtype)
    able = [each.name for each in available(device, dtype) if each.implementation and each.name != "best"]
    return Autotuned([_BUILDERS[each](device, dtype) for each in able], device, dtype)


def of_row(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """Return the backend of a table's row that asks for one, and a notice where that is another one.

    Only the cards' columns ``v2`` and ``v1`` of FP32 on a GPU are: no flash kernel takes float32, and theirs,
    too, were measured with plain attention.
    """
    if dtype != torch.float32 or device.type != "cuda" or name not in ("v2", "v1"):
        return name, None
    return "off", f"attention {name} takes no float32: this row ran off, as FP32 rows of the cards did"


def available(device: torch.device, dtype: torch.dtype) -> list[Availability]:
    """Return every backend with what it would run on this device in this dtype, or why it cannot."""
    found = []
    for name, build in _BUILDERS.items():
        try:
            found.append(Availability(name, build(device, dtype).implementation, None))
        except UnsupportedError as error:
            reason = error.what.removeprefix(f"attention {name}: ")
            found.append(Availability(name, None, f"{reason}; {error.hint}" if error.hint else reason))
    names = ", ".join(each.name for each in found if each.implementation is not None)
    return [*found, Availability("best", f"the fastest of {names}, measured at load", None)]


_BUILDERS: dict[str, Callable[[torch.device, torch.dtype], Attention]] = {
    "v2": flash_v2,
    "v1": FlashV1,
    "off": lambda *_: Off(),
    "sdpa": lambda *_: Sdpa(),
    "split": Split,
    "grouped": GroupedDecode,
}
BACKENDS = (*_BUILDERS, "best")
