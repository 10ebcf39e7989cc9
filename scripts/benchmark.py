"""How fast the loop, the data path and the buffer are, as ratios measured in one run.

    python scripts/benchmark.py [--json FILE] [--repetitions 5]

Every figure is the median over interleaved repetitions (A B A B ...), with the smallest and the largest, because
machines are shared and noisy.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torchvision import transforms

from cl_bench.backbones.base import Backbone
from cl_bench.backbones.mlp import MLP
from cl_bench.backbones.resnet18 import ResNet18
from cl_bench.buffers.base import Context
from cl_bench.buffers.reservoir import Reservoir
from cl_bench.checkpoint import Checkpoint
from cl_bench.data.base import ImageSet
from cl_bench.loggers.group import Loggers
from cl_bench.methods.er import ER
from cl_bench.optim import Constant, sgd
from cl_bench.scenarios.split import Split
from cl_bench.trainer import Settings, Trainer
from cl_bench.types import Batch

BATCH, REPLAY, STEPS = 32, 32, 12
MEAN, STD = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2761]
SHAPE: dict[str, Any] = {"num_classes": 100, "image_shape": (3, 32, 32)}


def random_set(images: int) -> ImageSet:
    """Random pixels in the shape of CIFAR-100: the arithmetic does not care."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(100), images // 100)
    pixels = rng.integers(0, 256, (len(labels), 3, 32, 32)).astype(np.uint8)
    return ImageSet(pixels, labels, pixels[:100], labels[:100], [str(c) for c in range(100)], None, MEAN, STD)


def scenario() -> Split:
    """One task with augmentation."""
    return Split(
        source=random_set(BATCH * STEPS // 100 * 100 + 100),
        pretrain_classes=0,
        num_tasks=1,
        classes_per_task=None,
        class_order="natural",
        class_order_seed=0,
        data_seed=0,
        val_fraction=0.0,
        train_per_class=None,
        test_per_class=None,
        crop_padding=4,
        flip=True,
        rand_augment=None,
    )


def interleaved(pairs: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Call each in turn, one round to warm up and then ``repetitions`` that count."""
    values: dict[str, list[float]] = {name: [] for name in pairs}
    for round_number in range(repetitions + 1):
        for name, measure in pairs.items():
            value = measure()
            if round_number:
                values[name].append(value)
    return values


def seconds(work: Callable[[], Any], times: int) -> float:
    """Mean seconds of ``times`` calls."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def loop(net: Backbone) -> dict[str, Callable[[], float]]:
    """Seconds of a bare torch step on one fixed batch, and of a step of our loop, augmentation and replay included."""
    parts, generator = scenario(), torch.Generator().manual_seed(0)
    context = Context(transform=parts.transform, generator=generator, device=torch.device("cpu"), **SHAPE)
    method = ER(net=net, buffer=Reservoir(capacity=500, context=context), replay_size=REPLAY)
    optimizer = sgd(net.parameters(), lr=1e-3, momentum=0.0, weight_decay=0.0, nesterov=False)
    x, y = torch.randn(BATCH + REPLAY, 3, 32, 32), torch.randint(100, (BATCH + REPLAY,))

    def bare() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    trainer = Trainer(
        method=method,
        scenario=parts,
        settings=Settings(
            epochs=1,
            batch_size=BATCH,
            clip_norm=None,
            evaluate_on="test",
            checkpoint_seconds=1e9,
            checkpoint_steps=None,
            speed="eager",
            replicas=1,
        ),
        optimizer=lambda params: sgd(params, lr=1e-3, momentum=0.0, weight_decay=0.0, nesterov=False),
        schedule=Constant(),
        generators={"batches": generator, "augment": generator},
        autocast=torch.autocast("cpu", enabled=False),
        logger=Loggers([]),
        checkpoint=Checkpoint(Path()),  # never written
        stop=lambda: False,
    )
    task = parts.tasks[0]

    def ours() -> float:
        phase = next(method.learn(task))
        before = trainer.steps
        began = time.perf_counter()
        trainer.run_phase(task, 0, phase, None)
        return (time.perf_counter() - began) / (trainer.steps - before)

    net.train()
    return {"bare step": lambda: seconds(bare, STEPS), "our loop": ours}


def data_path() -> dict[str, Callable[[], float]]:
    """Seconds of an augmented batch: torchvision image by image, and ours."""
    raw = torch.from_numpy(random_set(100).train_images[:BATCH])
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in raw]
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    transform, generator = scenario().transform, torch.Generator().manual_seed(0)
    return {
        "torchvision, a sample at a time": lambda: seconds(lambda: torch.stack([pipeline(p) for p in pictures]), 20),
        "our batch": lambda: seconds(lambda: transform.train(raw, generator), 200),
    }


def reservoir() -> dict[str, Callable[[], float]]:
    """Seconds of adding a batch and sampling one (augmentation left out): a Python reservoir, and ours."""
    raw, y = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8), torch.zeros(BATCH, dtype=torch.int64)
    memory: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen = 0

    def sample_by_sample() -> None:
        nonlocal seen
        for image, label in zip(raw, y):
            seen += 1
            if len(memory) < 200:
                memory.append((image.clone(), label.clone()))
            elif (place := random.randrange(seen)) < 200:
                memory[place] = (image.clone(), label.clone())
        drawn = random.sample(memory, min(REPLAY, len(memory)))
        torch.stack([image for image, _ in drawn]), torch.stack([label for _, label in drawn])

    plain = scenario().transform
    plain.crop_padding, plain.flip = 0, False
    generator = torch.Generator().manual_seed(0)
    context = Context(transform=plain, generator=generator, device=torch.device("cpu"), **SHAPE)
    buffer, batch = Reservoir(capacity=200, context=context), Batch(x=raw.float(), y=y, raw=raw, task=0)

    def ours() -> None:
        buffer.add(batch)
        buffer.sample(REPLAY)

    return {
        "Python, a sample at a time": lambda: seconds(sample_by_sample, 50),
        "our reservoir": lambda: seconds(ours, 50),
    }


def main() -> int:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that gets every repetition")
    parser.add_argument("--repetitions", type=int, default=5, help="counted repetitions of each figure (default: 5)")
    options = parser.parse_args()
    cases = {
        "loop, linear": loop(MLP(hidden=[], **SHAPE)),
        "loop, resnet18_slim": loop(ResNet18(width=20, **SHAPE)),
        "data path": data_path(),
        "buffer": reservoir(),
    }
    table = Table(
        title=f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {BATCH} + {REPLAY} replayed"
    )
    for column in ("what", "A", "ms", "B", "ms", "A / B", "smallest", "largest"):
        table.add_column(column, justify="left" if column in "whatAB" else "right")
    result: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "cases": {}}
    for what, pair in cases.items():
        values = interleaved(pair, options.repetitions)
        (name_a, a), (name_b, b) = values.items()
        ratios = [x / y for x, y in zip(a, b)]
        result["cases"][what] = values | {"ratio": statistics.median(ratios)}
        cells = [what, name_a, f"{1e3 * statistics.median(a):.2f}", name_b, f"{1e3 * statistics.median(b):.2f}"]
        table.add_row(*cells, *(f"{r:.2f}" for r in (statistics.median(ratios), min(ratios), max(ratios))))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
