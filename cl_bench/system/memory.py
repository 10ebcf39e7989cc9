"""Memory: the peak of a run, what is free, and what took it where there was not enough."""

import gc
import os
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Forget the peak of whatever ran in this process before; does nothing where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def get_free_bytes(device: torch.device) -> int:
    """Bytes that are still free: of the device, or of the host's memory where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = PROCESS.parent / "meminfo"
    if meminfo.exists():
        return _read_bytes(meminfo, "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def get_pass_bytes(device: torch.device, host: int) -> int:
    """Bytes that the tensors of one pass may take which come once for each image: ``host``, or more on a large GPU.

    A part of all its memory, not of what is free: the same card cuts the same pieces in every run.
    """
    if device.type != "cuda":
        return host
    return max(host, torch.cuda.get_device_properties(device).total_memory // 32)


def get_peak_bytes(device: torch.device) -> int:
    """Bytes at the peak: of the device's allocator, or of the whole process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (PROCESS / "status").exists():
        return _read_bytes(PROCESS / "status", "VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read_bytes(file: Path, key: str) -> int:
    """Bytes of a line ``key: N kB`` in a file of /proc."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of a device or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Of torch's allocators for CPU and MPS, and of sizes whose product has more than 64 bits.
    words = r"can't allocate memory|not enough memory|out of memory|[Oo]verflow"
    return isinstance(error, RuntimeError | TypeError | ValueError) and re.search(words, str(error)) is not None


def list_largest_tensors(named: Mapping[str, torch.Tensor], count: int = 5) -> list[str]:
    """The largest tensors that Python can reach, as ``name shape type size``; not all have a name."""
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}
    gc.collect()  # what only a cycle holds is nothing to tell of
    reached: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = {}
    for thing in gc.get_objects():
        # not isinstance: proxies answer that
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            reached.setdefault(storage.data_ptr(), (storage.nbytes(), tuple(thing.shape), thing.dtype))
    largest = sorted(reached.items(), key=lambda item: -item[1][0])[:count]
    return [
        f"{names.get(place, 'a temporary one')} {shape} {str(dtype).removeprefix('torch.')} {nbytes / 1e6:,.1f} MB"
        for place, (nbytes, shape, dtype) in largest
    ]
