"""What several test files use: configurations, tiny parts, the command in a process of its own."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import INSTRUCTION_SETS, THREADS, describe_machine

# Compiled steps are kept from run to run. With a cache that runs under several instruction sets had filled, a compiled
# step aborted, and with an empty one it did not; so each setting has a cache of its own.
_settings = "-".join(os.environ.get(key, "") for key in INSTRUCTION_SETS)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"cl_bench_inductor_{_settings}")))

torch.set_num_threads(THREADS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(("machine", describe_machine()))
    return report


@pytest.fixture
def three_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Three random 1 x 8 x 8 images and labels among four classes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.tensor([0, 1, 1])
