"""(c): Avalanche 0.6 on the same images, network, batch and augmentation.

Avalanche runs as its users run it: torchvision's transforms, one image at a time, in its own DataLoader in the main
process. Here it computes no metrics and logs nothing, and only the time between the first and the last step of an epoch
counts; ours counts whole epochs with logging. Both train 32 new images per step, with `Replay` also 32 of 200 stored
ones. Its networks have PyTorch's default memory layout, like its own models. Our layout (channels innermost) is a part
of what is compared, and a further row gives Avalanche our layout.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cl_bench.config.build import Parts
from speed.common import (
    BATCH,
    Options,
    Row,
    Work,
    build_parts,
    choose_random_pixels,
    compute_ratio,
    get_first_phase,
    measure_in_turn,
    open_loop,
    shorten,
    time_steps,
)
from speed.loop import ER, NETS
from speed.pieces import CAPACITY, Pictures, make_per_sample_transform

STEPS = {"linear": 156, "resnet18_slim": 6, "resnet18": 4}
"""Steps of an epoch in one repetition; 156 is an epoch of one of ten tasks of CIFAR-100."""
LEAST = {("linear", "fp32"): 6.0, ("resnet18_slim", "fp32"): 1.3, ("resnet18", "bf16"): 1.8}
"""The goal for our rate with replay divided by Avalanche's with `Replay`."""


def measure_avalanche(options: Options) -> Iterator[Row]:
    """For each network: Naive against fine-tuning, Replay against ER, and ER in bf16, the CPU's fast path."""
    for name, overrides in NETS.items():
        options.tell(f"{name} (importing Avalanche takes 15 s)")
        steps = 2 if options.small else STEPS[name]
        small = ["+scale=mini"] if options.small else []
        base = [*choose_random_pixels(2 * steps * BATCH // 100 + 1), *overrides, *small, "scenario.num_tasks=2"]
        ours = {
            "finetune": build_parts(*base, "method=finetune", "buffer=none"),
            "er": build_parts(*base, *ER),
            "er bf16": build_parts(*base, *ER, "precision=bf16"),
        }
        works: dict[str, Work] = {
            "Naive": _prepare_avalanche(ours["finetune"], steps, replay=False),
            "Replay": _prepare_avalanche(ours["er"], steps, replay=True),
        }
        pairs = [("Naive", "finetune", "fp32"), ("Replay", "er", "fp32"), ("Replay", "er bf16", "bf16")]
        if name != "linear":  # it has no maps whose layout could matter
            works["Replay, our layout"] = _prepare_avalanche(ours["er"], steps, replay=True, layout=torch.channels_last)
            pairs.append(("Replay, our layout", "er", "fp32"))
        with ExitStack() as stack:
            for method, parts in ours.items():
                trainer = stack.enter_context(open_loop(parts))
                task = shorten(parts.scenario.tasks[0], steps * BATCH)
                works[method] = time_steps(trainer, task, get_first_phase(parts, task))
                works[method]()  # fills the reservoir
            values = measure_in_turn(works, options.repetitions)
        for above, below, precision in pairs:
            yield Row(
                "avalanche",
                f"our images/s / Avalanche's {above}: {name}, {precision}",
                "x",
                compute_ratio(values, above, below),
                least=LEAST.get((name, precision)) if above == "Replay" else None,
                sides={above: values[above], below: values[below]},
                note=f"{BATCH / min(values[below]):.0f} images/s at best" if above == "Replay" else "",
            )


def _prepare_avalanche(
    parts: Parts, steps: int, *, replay: bool, layout: torch.memory_format = torch.contiguous_format
) -> Work:
    """A measurement: seconds per step of Avalanche's strategy on the second experience; same images as ours."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin, SupervisedPlugin
    from avalanche.training.supervised import Naive

    class Stopwatch(SupervisedPlugin):
        """Seconds and steps of the last epoch, without what comes before and after it."""

        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            self.steps, self.began = 0, time.perf_counter()

        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            self.steps += 1

        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    transform = parts.scenario.transform
    tasks = [shorten(task, steps * BATCH).train for task in parts.scenario.tasks]
    pixels, labels = torch.cat([d.images for d in tasks]), torch.cat([d.labels for d in tasks])
    pictures = Pictures(pixels, labels, None)
    experiences = nc_benchmark(
        pictures,
        pictures,
        n_experiences=2,
        task_labels=False,
        shuffle=False,
        train_transform=make_per_sample_transform(transform.mean, transform.std),
    ).train_stream
    watch = Stopwatch()
    net = copy.deepcopy(parts.method.get_submodule("net")).to(memory_format=layout)
    strategy = Naive(
        model=net,
        optimizer=parts.optimizer(list(net.parameters())),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        plugins=[watch, *([ReplayPlugin(mem_size=CAPACITY, batch_size_mem=BATCH)] if replay else [])],
        evaluator=EvaluationPlugin(),
    )
    strategy.train(experiences[0])  # fills the buffer: Avalanche does so after an experience

    def measure() -> float:
        strategy.train(experiences[1])
        return watch.seconds / watch.steps

    return measure
