"""The energy that a device uses during a run."""

from typing import Any

import torch


class Meter:
    """Measures the joules of a CUDA device, with NVML's counter for the whole card, other processes included.

    Args:
        device: of the run. The energy is unknown on any other kind of device, without the package ``pynvml``
            (``nvidia-ml-py``), or if the card has no counter.
    """

    def __init__(self, device: torch.device) -> None:
        self.counter = _open_counter(device) if device.type == "cuda" else None
        self._last = self._read()

    def start(self) -> float | None:
        """The energy at the start of a run: 0, or None if it cannot be measured."""
        return None if self._last is None else 0.0

    def add(self, joules: float | None) -> float | None:
        """``joules`` plus the energy since the last call, or since the start; None if a part is unknown."""
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
    """NVML and its handle of the device, found by UUID: NVML's index may differ from torch's."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
