"""Energy of a GPU, from the counter that its driver keeps (NVML; Volta and later)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenq.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

HOW = "the GPU's counter over the protocol's generation: the whole GPU, whoever used it, idle power included"


class EnergyCounter:
    """Reads the counter of one GPU.

    Raises:
        UnsupportedError: the device has no counter that can be read; says why.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedError("no energy counter of a CPU is read here")
        try:
            import pynvml
        except ImportError as error:
            raise UnsupportedError("the package nvidia-ml-py is not installed") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(_uuid(device))
            self.joules()
        except pynvml.NVMLError as error:
            raise UnsupportedError(f"NVML: {error}") from error

    def joules(self) -> float:
        """Since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000


def _uuid(device: torch.device) -> str:
    import torch

    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
