"""Memory: the peak of a run, and what is free."""

import os
import resource
import sys
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Forget the peak of whatever ran in this process before; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def free_bytes(device: torch.device) -> int:
    """Bytes that are still free: of the device, or of the host's memory where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = PROCESS.parent / "meminfo"
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes(device: torch.device) -> int:
    """Bytes at the peak: of the device's allocator, or of the whole process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (PROCESS / "status").exists():
        lines = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
