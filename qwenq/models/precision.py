"""Which dtype to compute in on a device: bfloat16 where the hardware multiplies it natively."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # x86 (Cooper Lake, Sapphire Rapids), Arm (Neoverse V1)


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for forward passes on ``device``.

    CPU: bfloat16 only where the CPU has instructions for it; elsewhere it is emulated and slower than
    float32. CUDA: bfloat16 since Ampere, float16 before it. Any other device: float32.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if kind == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in _CPU_BF16):
        return torch.bfloat16
    return torch.float32
