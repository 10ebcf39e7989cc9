"""What several test files use: configurations, tiny parts, the command in a process of its own."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from cl_bench.backbones.base import Backbone
from cl_bench.buffers.base import Context
from cl_bench.config.build import prepare_component
from cl_bench.config.schema import compose_config
from cl_bench.core.types import Batch
from cl_bench.data.base import ImageSet
from cl_bench.data.transform import Transform

INSTRUCTION_SETS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Environment variables that make torch compute as on another processor; read when it is loaded."""

# Compiled steps are kept from run to run. With a cache that runs under several instruction sets had filled, a compiled
# step aborted, and with an empty one it did not; so each setting has a cache of its own.
_settings = "-".join(os.environ.get(key, "") for key in INSTRUCTION_SETS)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"cl_bench_inductor_{_settings}")))

# Tiny nets gain nothing from a second thread, and two busy processes with two threads each on two cores crawl.
THREADS = int(os.environ.get("CL_BENCH_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)

SEED = int(os.environ.get("CL_BENCH_TEST_SEED", "0"))
"""Seed of the tests that learn something, so that their margins can be measured over several."""

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("CL_BENCH_DATA", ROOT / "data"))
DEVICE = os.environ.get("CL_BENCH_TEST_DEVICE", "cpu")
"""Where the small runs of the tests are computed. Much is held bit for bit on the CPU only; what holds on a GPU is in
``test_cuda.py``."""

needs_cifar100 = pytest.mark.skipif(
    not (DATA / "cifar-100-python" / "train").is_file(), reason=f"CIFAR-100 is not in {DATA}"
)

TINY = [
    "scenario.classes_per_task=[5,5]",
    "scenario.train_per_class=10",
    "scenario.test_per_class=4",
    "trainer.epochs=2",
    "trainer.batch_size=16",
    f"device={DEVICE}",
]
"""Digits in two tasks of 50 training images: a run of some seconds."""


def configure(*overrides: str) -> DictConfig:
    """The configuration that the command would run with."""
    return compose_config(overrides)


def network_of(*overrides: str, num_classes: int = 100, image_shape: tuple[int, int, int] = (3, 32, 32)) -> Backbone:
    """The network that these overrides choose."""
    shape = {"num_classes": num_classes, "image_shape": image_shape}
    return prepare_component(configure(*overrides).backbone, "backbone", [], Backbone)(**shape)


def command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m cl_bench`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cl_bench", *arguments],
        cwd=cwd,
        env=command_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def command_environment(**environment: str) -> dict[str, str]:
    """The environment of the command: this checkout, the data of the tests, no W&B key."""
    base = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return (
        base
        | {
            "PYTHONPATH": str(ROOT),
            "CL_BENCH_DATA": str(DATA),
            "WANDB_MODE": "offline",
            "OMP_NUM_THREADS": str(THREADS),
        }
        | environment
    )


def toy_images(num_classes: int = 4, per_class: int = 6, side: int = 8, channels: int = 1) -> ImageSet:
    """Random images with labels; every image is different."""
    rng = np.random.default_rng(0)

    def split() -> tuple[np.ndarray, np.ndarray]:
        labels = np.tile(np.arange(num_classes), per_class)
        images = rng.integers(0, 256, (len(labels), channels, side, side)).astype(np.uint8)
        return images, labels

    train, test = split(), split()
    names = [f"class {c}" for c in range(num_classes)]
    parents = [c % 2 for c in range(num_classes)]
    return ImageSet(*train, *test, names, parents, [0.5] * channels, [0.25] * channels)


def identity_transform(channels: int = 1) -> Transform:
    """Pixels in [0, 1], not augmented."""
    return Transform(mean=[0.0] * channels, std=[1.0] * channels, crop_padding=0, flip=False)


def buffer_context(num_classes: int = 4, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> Context:
    """What a buffer is given when it is built."""
    return Context(
        image_shape=shape,
        num_classes=num_classes,
        transform=identity_transform(shape[0]),
        generator=torch.Generator().manual_seed(seed),
        device=torch.device("cpu"),
    )


def batch_of(raw: torch.Tensor, y: torch.Tensor, task: int = 0) -> Batch:
    """A stream batch of un-augmented images."""
    return Batch(x=identity_transform(raw.shape[1]).normalise(raw), y=y, raw=raw, task=task)


def describe_machine() -> str:
    """What decides how torch rounds here: a stranger's report of a failed test is of use only with it."""
    name = next((line.split(":")[1] for line in cpuinfo() if line.startswith("model name")), platform.machine())
    asked = [f"{key}={os.environ[key]}" for key in INSTRUCTION_SETS if key in os.environ]
    words = [name.strip(), torch.backends.cpu.get_cpu_capability(), *asked, f"{torch.get_num_threads()} threads"]
    return ", ".join([*words, f"torch {torch.__version__}", f"seed {SEED}"])


def cpuinfo() -> list[str]:
    """The lines of /proc/cpuinfo, none where there is no such file."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


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
