"""Examine what can run here: what each engine, kernel and attention backend would run, or why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

import torch

from qwenq.compute import gpu
from qwenq.compute.gpu import triton_label
from qwenq.compute.ops import operations
from qwenq.runtime.attention import available
from qwenq.runtime.engine import find_attention
from qwenq.runtime.linear import Requirements
from qwenq.runtime.quantised_linear import KERNELS, CpuNative, choose


@dataclass(frozen=True)
class Part:
    """A part that runs models, or would."""

    kind: str  # ``engine``, ``kernel``, ``decode step``, ``attention`` or ``operation``
    name: str  # as an option takes it; steps have none, they are taken where they can be
    runs: str | None  # what it is, where it can run here; else None
    reason: str | None  # why it cannot; None where it can


def examine(device: torch.device, dtype: torch.dtype) -> list[Part]:
    """Return every engine, kernel, kind of decode step, attention backend and operation of ``compute`` here.

    Kernels are asked for a model in groups of 128 without a layer of unusual size; a model may have one, and
    then loading it says so.
    """
    parts = [
        Part("engine", "fast", "Qwen (v1 to Qwen3.8), with mixtures and hybrids, and Llama", None),
        Part("engine", "transformers", f"decoders of transformers {metadata.version('transformers')}", None),
    ]
    for kernel in KERNELS:
        reason = kernel.unsupported_reason(Requirements(kernel.widths[-1], 128, "gptq", device, dtype))
        bits = ", ".join(map(str, kernel.widths))
        parts.append(Part("kernel", kernel.name, None if reason else f"{bits} bits", reason))
    attention = (Part("attention", *each) for each in available(device, dtype))
    rest = (Part("operation", each.name, each.runs, each.reason) for each in operations(device, dtype))
    return [*parts, *_steps(device, dtype), *attention, *rest]


def fastest(device: torch.device, dtype: torch.dtype) -> str:
    """Return a sentence: what runs an Int4 model fastest here, and what would make it faster."""
    kernel, notices = choose("auto", Requirements(4, 128, "gptq", device, dtype))
    steps = _steps(device, dtype)
    used = [f"engine fast, kernel {kernel.name}, attention {find_attention('auto', 'fast', device)}"]
    used += [f"{part.name} decode steps" for part in steps if part.runs]
    wanted = ("graph", "fused") if device.type == "cuda" else ()
    reasons = [part.reason for part in steps if part.name in wanted and part.reason]
    more = [*notices, *(f"decode steps could be faster, but {reason}" for reason in dict.fromkeys(reasons))]
    if not more:
        more = ["nothing for this GPU"] if device.type == "cuda" else ["an NVIDIA GPU"]
    return f"fastest here: {', '.join(used)}; to get more: {'; '.join(more)}"


def _steps(device: torch.device, dtype: torch.dtype) -> list[Part]:
    """Return what makes decode steps of the fast engine faster; elsewhere torch runs them piece by piece."""
    whole = CpuNative.unsupported_reason(Requirements(4, 128, "gptq", device, dtype))
    graphs = None if device.type == "cuda" else f"CUDA graphs need a CUDA GPU, and this is a {device.type}"
    between = gpu.unsupported_reason(device)
    return [
        Part("decode step", "compiled", None if whole else "one call, with kernel cpu-native", whole),
        Part("decode step", "graph", None if graphs else "one launch", graphs),
        Part("decode step", "fused", None if between else f"between products {triton_label()}", between),
    ]
