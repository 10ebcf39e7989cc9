"""A table of the backbones that every method takes: parameters, multiply-adds, speed of a training step, accuracies.

    python scripts/backbones.py [--scale mini] [--records DIR] [--only vit,cvt] [--out results/backbones]

Parameters and multiply-adds (MACs) are of one image of 32 x 32 pixels and 100 classes. The speed is that of forward,
backward and optimizer step on a batch of 32 images, per second of CPU time on one thread, so that other programs on the
machine disturb it little; it is of this machine. With ``--records`` there are also the accuracies of finished runs; a
cell is empty if no run of it is finished.
"""

import argparse
import copy
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl_bench.backbones.base import Backbone
from cl_bench.config.build import build
from cl_bench.config.schema import CONFIGS, compose_config
from cl_bench.core.record import TITLES
from cl_bench.report.compare import compare
from cl_bench.report.folders import scan
from cl_bench.report.page import format_number
from cl_bench.report.rows import MAIN
from cl_bench.report.tables import Table, format_markdown

sys.path.insert(0, str(Path(__file__).parent))

from speed.common import choose_random_pixels, describe_machine

BATCH, CLASSES, STEPS = 32, 100, 3
METHODS = ("finetune", "er", "joint")
"""Whose accuracies the table shows."""


def find_backbones() -> list[str]:
    """The backbones for classes of 32 x 32 pixels whose file does not choose a method."""
    names = [path.stem for path in sorted((CONFIGS / "backbone").glob("*.yaml")) if not path.stem.endswith("_digits")]
    names = [name for name in names if not name.startswith("detr")]  # for boxes
    usual = compose_config([]).choices.method
    return [name for name in names if compose_config([f"backbone={name}"]).choices.method == usual]


def build_backbone(name: str, scale: Sequence[str]) -> Backbone:
    """The network for 100 classes of 32 x 32 pixels."""
    net: Any = build(compose_config([f"backbone={name}", "device=cpu", *scale, *choose_random_pixels(1)])).method.net
    return net


def count_macs(net: Backbone, image: torch.Tensor) -> float:
    """Multiply-adds of a forward pass; products with the maps of an attention are counted, too."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval().requires_grad_(False)(image)  # the counter hooks every tensor that has a gradient
    return counter.get_total_flops() / 2


def measure_speed(net: Backbone) -> float:
    """Images per second of CPU time: the median of :data:`STEPS` training steps after one that is not counted."""
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(CLASSES, (BATCH,))
    optimizer = torch.optim.SGD(net.train().parameters(), lr=1e-3)
    seconds = []
    for _ in range(1 + STEPS):
        began = time.process_time()
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    return BATCH / statistics.median(seconds[1:])


def collect_accuracies(records: Path) -> dict[tuple[str, str], str]:
    """Class-IL and Task-IL accuracy by backbone and method: mean ± standard deviation (seeds); what is finished."""
    found = {}
    for row in compare([str(records)]).rows if scan(records)[0] else []:
        summary = row.runs[0].summary
        cells = [row.stat(key) for key in (MAIN, MAIN.replace("class_il", "task_il"))]
        shown = [format_number(cell.mean) + ("" if cell.std is None else f" ± {cell.std:.2f}") for cell in cells]
        found[summary["backbone"], summary["method"]] = f"{' / '.join(shown)} ({cells[0].n})"
    return found


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=["full", "mini"], default="full", help="the networks' size")
    parser.add_argument("--records", type=Path, metavar="DIR", help="finished runs whose accuracies are shown")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="these backbones")
    parser.add_argument("--out", type=Path, default=Path("results/backbones"), help="folder of table.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale = [] if options.scale == "full" else ["+scale=mini"]
    accuracies = collect_accuracies(options.records) if options.records else {}
    methods, lines = METHODS if options.records else (), []
    for name in options.only.split(",") if options.only else find_backbones():
        net = build_backbone(name, scale)
        parameters = sum(p.numel() for p in net.parameters())
        macs, speed = count_macs(net, torch.zeros(1, 3, 32, 32)), measure_speed(net)
        line = [name, f"{parameters / 1e6:.3f}", f"{macs / 1e6:.1f}", f"{speed:.0f}"]
        lines.append(line + [accuracies.get((name, method), "") for method in methods])
        print(*lines[-1], flush=True)
    header = ["backbone", "parameters [millions]", "MACs [millions]", "images/s"]
    header += [f"{method}: {' / '.join(TITLES.values())} [%] (seeds)" for method in methods]
    table = format_markdown(Table("", "", header, lines, numbers=range(1, len(header))))
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/backbones.py", *sys.argv[1:]])
    text = f"Made by `{command}`. Size: {options.scale}. Images of 32 x 32 pixels, {CLASSES} classes.\n\n{table}\n\n"
    text += f"images/s: a training step of {BATCH} images in fp32, per second of CPU time, on one machine: "
    text += f"{describe_machine()}.\n"
    (options.out / "table.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
