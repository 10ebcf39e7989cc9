"""Energy that the device uses during a run."""

from typing import Any

import torch


class Meter:
    """Joules a CUDA device has used, by the counter that NVML keeps for the whole card, other processes included.

    Args:
        device: of the run. On any other kind of device, without the package ``pynvml`` (``nvidia-ml-py``), or where the
            card keeps no counter, the energy is unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.counter = _open_counter(device) if device.type == "cuda" else None
        self._last = self._read()

    def start(self) -> float | None:
        """What a run that begins now has used: nothing, or None where that cannot be told."""
        return None if self._last is None else 0.0

    def add(self, joules: float | None) -> float | None:
        """``joules`` and those since the last call (at first: since this was made); None where a part is unknown."""
        before, self._last = self._last, self._read()
        if joules is None or before is None or self._last is None:
            return None
        return joules + self._last - before

    def _read(self) -> float | None:
        if self.counter is None:
            return None
        nvml, handle = self.counter
        try:
            return nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # the counter is in millijoules
        except nvml.NVMLError:
            return None


def _open_counter(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and its handle of the device, known by its UUID: its index may be another one than torch's."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
