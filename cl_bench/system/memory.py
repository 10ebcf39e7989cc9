"""RAM and device memory: the peak of a run, what is free, and which tensors are the largest."""

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
    """Reset the peak of this process; does nothing if the system cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (PROCESS / "clear_refs").exists():
        (PROCESS / "clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def get_free_bytes(device: torch.device) -> int:
    """Free bytes of the device's memory; of the RAM if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = PROCESS.parent / "meminfo"
    if meminfo.exists():
        return _read_bytes(meminfo, "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def get_pass_bytes(device: torch.device, host: int) -> int:
    """Bytes for the per-image tensors of one pass: ``host``, or more on a large GPU.

    It is a part of the whole device memory, not of the free memory, so the same card has the same parts in every run.
    """
    if device.type != "cuda":
        return host
    return max(host, torch.cuda.get_device_properties(device).total_memory // 32)


def get_peak_bytes(device: torch.device) -> int:
    """The peak in bytes: of the device's allocator, or of the whole process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (PROCESS / "status").exists():
        return _read_bytes(PROCESS / "status", "VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read_bytes(file: Path, key: str) -> int:
    """The bytes in a line ``key: N kB`` of a file in /proc."""
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that RAM or device memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # From torch's allocators for CPU and MPS, and from sizes whose product has more than 64 bits.
    words = r"can't allocate memory|not enough memory|out of memory|[Oo]verflow"
    return isinstance(error, RuntimeError | TypeError | ValueError) and re.search(words, str(error)) is not None


def list_largest_tensors(named: Mapping[str, torch.Tensor], count: int = 5) -> list[str]:
    """The largest tensors that Python can reach, as ``name shape type size``; some have no name."""
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}
    gc.collect()  # frees tensors that only a reference cycle holds
    reached: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = {}
    for thing in gc.get_objects():
        # not isinstance, which proxies deceive
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            if storage.device.type != "meta":  # the fake tensors that torch.compile leaves have no memory
                reached.setdefault(storage.data_ptr(), (storage.nbytes(), tuple(thing.shape), thing.dtype))
    largest = sorted(reached.items(), key=lambda item: -item[1][0])[:count]
    return [
        f"{names.get(pointer, 'a temporary one')} {shape} {str(dtype).removeprefix('torch.')} {nbytes / 1e6:,.1f} MB"
        for pointer, (nbytes, shape, dtype) in largest
    ]
