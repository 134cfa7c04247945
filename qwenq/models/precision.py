"""Choose device and dtype: bfloat16 where the hardware has instructions for it, and gains by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwenq.errors import UsageError

if TYPE_CHECKING:
    import torch


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype in which torch runs a model fastest on ``device``, where reading its weights takes the
    time.

    CPU: bfloat16 only where the CPU has instructions for it; elsewhere torch emulates it, slower than float32
    (the fast engine does not: ``runtime.engine.find_dtype``). CUDA: bfloat16 since Ampere, float16 before it.
    Any other device: float32.
    """
    import torch

    from qwenq.compute import cpu

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if kind == "cpu" and cpu.multiplies_bfloat16() else torch.float32


def product_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype for passing whole texts through a model on ``device``, where products take the time.

    It is that of ``compute_dtype``, but for CPUs that have bfloat16 and multiply float32 faster.
    """
    import torch

    from qwenq.compute import cpu

    if torch.device(device).type == "cpu" and cpu.float32_is_faster():
        return torch.float32
    return compute_dtype(device)


def resolve_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype that "auto" or a name stands for in quantising, and the reason in a sentence."""
    import torch

    if wanted != "auto":
        return getattr(torch, wanted), f"computing in {wanted} on {device}: as asked"
    dtype = product_dtype(device)
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype is not compute_dtype(device):
        why = "this CPU multiplies bfloat16 more slowly"
    elif device.type == "cpu":
        why = "native on this CPU" if dtype is torch.bfloat16 else "this CPU only emulates bfloat16"
    else:
        why = "the device's native half precision" if dtype is not torch.float32 else "the safe choice there"
    return dtype, f"computing in {name} on {device}: {why}"


def resolve_device(wanted: str) -> torch.device:
    """Return the device that "auto" (a CUDA GPU if there is one), "cpu", "cuda:1" … stands for.

    Raises:
        UsageError: no such device here; says what is there.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # nothing was tried on others
        raise UsageError(f"{wanted!r} is no device", where="--device", hint="use cpu, cuda, cuda:1 or auto")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        built = "" if torch.version.cuda else f"; this torch ({torch.__version__}) is built without CUDA"
        found = f"{gpus} CUDA GPU{'' if gpus == 1 else 's'} found"
        raise UsageError(
            f"{wanted} cannot be used: {found}{built}", where="--device", hint="use --device cpu"
        )
    return device
