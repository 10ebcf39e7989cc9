"""(a), (b): the loop's rate relative to the limit, a bare torch step on one fixed batch.

The limit does the arithmetic of the method's step and nothing else: same network, optimizer and precision, 32 images
and 32 replayed ones that never change, no augmentation, no buffer, no logging. For ER that is the cross-entropy of 64
images. For LVT it is the step of the second task, written out: one pass over 64 images, both heads, the stream's two
cross-entropies, the replayed one, its distillation, and the penalty on keys and biases. A bare classifier's step would
be faster, but it would leave out arithmetic of the method.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_bench.config.build import Parts
from cl_bench.methods.lvt import LifelongViT
from speed.common import (
    BATCH,
    Options,
    Row,
    build_parts,
    choose_random_pixels,
    close_task,
    compute_ratio,
    get_first_phase,
    measure_in_turn,
    open_loop,
    repeat,
    shorten,
    time_steps,
)

NETS: dict[str, list[str]] = {
    "linear": ["backbone=mlp", "backbone.hidden=[]"],
    "resnet18_slim": ["backbone=resnet18_slim"],
    "resnet18": ["backbone=resnet18"],
}
"""Networks that any method can train."""

ER = ["method=er", "buffer=reservoir", "buffer.capacity=200"]
CASES = {name: (net + ER, least) for (name, net), least in zip(NETS.items(), (0.5, 0.9, 0.95))} | {
    "lvt": (["backbone=lvt", "buffer.capacity=500"], 0.95)
}
STEPS = {"linear": 156, "resnet18_slim": 8, "resnet18": 4, "lvt": 3}
"""Steps of an epoch in one repetition; 156 is an epoch of one of ten tasks of CIFAR-100."""


def measure_loop(options: Options) -> Iterator[Row]:
    """One row per network."""
    for name, (overrides, least) in CASES.items():
        options.tell(name)
        steps = 2 if options.small else STEPS[name]
        images = max(200, steps * BATCH)
        small = ["+scale=mini"] if options.small else []
        parts = build_parts(*choose_random_pixels(2 * images // 100 + 1), *overrides, *small, "scenario.num_tasks=2")
        with open_loop(parts) as trainer:
            first, second = (shorten(task, images) for task in parts.scenario.tasks)
            close_task(parts, shorten(first, 200))  # LVT replays what it stored when a task was closed
            second = shorten(second, steps * BATCH)
            ours = time_steps(trainer, second, get_first_phase(parts, second))
            ours()  # fills the reservoir; from here on every step replays
            works = {"bare step": repeat(make_bare_step(parts), steps), "our loop": ours}
            values = measure_in_turn(works, options.repetitions)
        what = f"our loop's rate / bare step's, {name}"
        yield Row("loop", what, "x", compute_ratio(values, "bare step", "our loop"), least=least, sides=values)


def make_bare_step(parts: Parts) -> Callable[[], None]:
    """The limit: one step on a fixed batch of 64 images."""
    method, x, y = parts.method, torch.randn(2 * BATCH, 3, 32, 32), torch.randint(100, (2 * BATCH,))
    net = method.get_submodule("net")
    optimizer = parts.optimizer(list(net.parameters()))

    def er_loss() -> Tensor:
        return F.cross_entropy(net(x), y)

    loss = _make_lvt_loss(method, x, y) if isinstance(method, LifelongViT) else er_loss

    def step() -> None:
        with parts.autocast:
            total = loss()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    method.train()
    return step


def _make_lvt_loss(method: LifelongViT, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """LVT's loss in its second task, in plain torch."""
    net, temperature = method.net, method.temperature
    held = net.keys_and_biases()
    old = [parameter.detach().clone() for parameter in held]
    importance = [torch.rand_like(parameter) for parameter in held]
    teacher = F.log_softmax(torch.randn(BATCH, 100) / temperature, dim=1)

    def loss() -> Tensor:
        features = net.features(x)
        new, replayed = features[:BATCH], features[BATCH:]
        remembered = net.accumulation(replayed)
        student = F.log_softmax(remembered / temperature, dim=1)
        return (
            F.cross_entropy(net.injection(new), y[:BATCH])
            + method.new_weight * F.cross_entropy(net.accumulation(new), y[:BATCH])
            + method.alpha * F.cross_entropy(remembered, y[BATCH:])
            + method.beta * temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            + method.gamma * torch.cat([(g * (p - o)).abs().flatten() for g, p, o in zip(importance, held, old)]).mean()
        )

    return loss
