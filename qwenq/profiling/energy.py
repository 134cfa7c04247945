"""Read the energy counter that a GPU's driver keeps (NVML; Volta and later)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwenq.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

ENERGY_SOURCE = "the GPU's counter over the protocol's generations: the whole GPU, idle power included"


class EnergyCounter:
    """The counter of one GPU.

    Raises:
        UnsupportedError: the device has no counter that can be read; names the reason.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise UnsupportedError("energy is measured on NVIDIA GPUs only")
        try:
            import pynvml
        except ImportError as error:
            raise UnsupportedError("the package nvidia-ml-py is not installed") from error
        import torch

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.joules()
        except pynvml.NVMLError as error:
            raise UnsupportedError(f"NVML: {error}") from error

    def joules(self) -> float:
        """Return the energy used since the driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
