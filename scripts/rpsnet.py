"""What RPS-Net would cost on 10-split CIFAR-100: parameters, multiply-adds, CPU time of a step, hours of a run.

    python scripts/rpsnet.py [--batch 32] [--steps 3]

The network is that of the released code (brjathu/RPSnet, RPS_net_cifar): nine layers of eight parallel modules each. It
is not a backbone of this program; docs/methods/rpsnet.md says why.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead

WIDTHS = (64, 64, 64, 128, 128, 256, 256, 512, 512)
MODULES, PATHS, EPOCHS, TASKS, INTERVAL = 8, 8, 100, 10, 2
NEW, EXEMPLARS = 5_000, 2_000
"""Training images of a task, and of earlier tasks."""

MEASURED = (1, 2, 3, 4)
"""Modules of a layer in use; four are expected in the last tasks."""


class RPSNet(SingleHead):
    """y = sum of the modules in use; a layer that widens has one more, which is always in use; the others add x.

    Args:
        widths: of the nine layers.
        used: how many modules of each layer are in use; the newest of them is trained.
    """

    def __init__(self, widths: tuple[int, ...], used: int) -> None:
        super().__init__()
        self.used = used
        before = (3, *widths[:-1])
        layers = [
            [_build_module(a, b, double=place > 0) for _ in range(MODULES)]
            for place, (a, b) in enumerate(zip(before, widths))
        ]
        self.parts = nn.ModuleList(module for layer in layers for module in layer)
        wider = {str(i): (a, b) for i, (a, b) in enumerate(zip(before, widths)) if i and a != b}
        self.widening = nn.ModuleDict({place: _build_module(a, b, double=False) for place, (a, b) in wider.items()})
        self.head = nn.Linear(widths[-1], 100)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, D)."""
        for place in range(len(self.parts) // MODULES):
            first = place * MODULES
            y = torch.stack([module(x) for module in self.parts[first : first + self.used]]).sum(dim=0)
            if str(place) in self.widening:
                y = y + self.widening[str(place)](x)
            elif place not in (0, 6):  # the seventh adds no x in the released code
                y = y + x
            x = F.relu(y)
            if place in (4, 6):
                x = F.max_pool2d(x, 2)
        return x.mean(dim=(2, 3))

    def list_trained(self) -> list[nn.Parameter]:
        """The newest module in use of each layer, and the head."""
        modules = self.parts[self.used - 1 :: MODULES]
        return [p for module in [*modules, self.head] for p in module.parameters()]


def _build_module(width_in: int, width_out: int, *, double: bool) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU; with ``double`` one more convolution and BatchNorm."""
    first = [nn.Conv2d(width_in, width_out, 3, padding=1), nn.BatchNorm2d(width_out), nn.ReLU()]
    second = [nn.Conv2d(width_out, width_out, 3, padding=1), nn.BatchNorm2d(width_out)]
    return nn.Sequential(*first, *(second if double else []))


def expect_used(task: int) -> float:
    """Modules of a layer in use in a task: the first, and of one random draw every second task those that are new."""
    return 1 + (MODULES - 1) * (1 - (1 - 1 / MODULES) ** (task // INTERVAL))


def measure_seconds(net: RPSNet, batch: int, steps: int) -> tuple[float, float]:
    """CPU seconds of an image: a training step of the newest modules, and a forward pass in evaluation mode."""
    net.requires_grad_(False)
    trained = net.list_trained()
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=0.001)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))
    training, forward = [], []
    for _ in range(1 + steps):
        began = time.process_time()
        loss = F.cross_entropy(net.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        between = time.process_time()
        with torch.no_grad():
            net.eval()(x)
        training.append((between - began) / batch)
        forward.append((time.process_time() - between) / batch)
    return statistics.median(training[1:]), statistics.median(forward[1:])


def sum_over_run(per_module: dict[int, tuple[float, float]]) -> float:
    """The sum over a run: of each task all paths, all epochs, and a step and the teacher's pass on every image.

    Args:
        per_module: modules in use -> cost of an image in a step and in a forward pass; interpolated between them.
    """
    total = 0.0
    for task in range(TASKS):
        used = expect_used(task)
        low = min(int(used), max(per_module) - 1)
        (step, forward), (more_step, more_forward) = per_module[low], per_module[low + 1]
        part = used - low
        image = step + part * (more_step - step) + (forward + part * (more_forward - forward) if task else 0)
        total += PATHS * EPOCHS * (NEW + (EXEMPLARS if task else 0)) * image
    return total


def main() -> int:
    """Print the table and the sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images of a timed step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not counted")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from backbones import count_macs  # slow to import

    torch.set_num_threads(1)
    macs, seconds = {}, {}
    for used in MEASURED:
        net = RPSNet(WIDTHS, used)
        forward = count_macs(net, torch.zeros(1, 3, 32, 32))
        backward = (1 + 1 / used) * forward  # through all modules to the images, and to the weights of the newest
        macs[used], seconds[used] = (forward + backward, forward), measure_seconds(net, options.batch, options.steps)
        total, trained = (sum(p.numel() for p in found) for found in (net.parameters(), net.list_trained()))
        print(
            f"{used} modules in use: {total / 1e6:.2f} million parameters, {trained / 1e6:.2f} million trained, "
            f"{forward / 1e9:.2f} billion multiply-adds, {seconds[used][0]:.3f} s a training image, "
            f"{seconds[used][1]:.3f} s a forward pass",
            flush=True,
        )
    hours = sum_over_run(seconds) / 3600
    print(f"run: {hours:.0f} hours of one thread, {2 * sum_over_run(macs):.2e} floating-point operations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
