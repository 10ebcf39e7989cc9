"""The LeNet of Additive Parameter Decomposition (Yoon, Kim, Yang, Hwang, ICLR 2020), its weights decomposed.

Every weight tensor of the trunk is, for task i (section 3.1 of the paper),

    theta_i = sigma * M_i + tau_i,    M_i = sigmoid(v_i)

with sigma shared by all tasks, one scalar in v_i per output unit or filter, and tau_i sparse. After a consolidation
(:mod:`cl_bench.methods.apd`) the tasks of a group also share a frozen tau~_g, which is added to tau_i. Biases and the
head belong to one task and are not decomposed. The shapes never change; a new task adds a :class:`TaskPart`.

The trunk: convolution - ReLU - local response normalisation - max pooling 3 / 2, twice, then fully connected layers
with ReLU; 3 x 32 x 32 -> 20 -> 50 channels -> 3200 -> 800 -> 500, 2,986,500 shared weights.

Shapes: B images, L layers, D features (the last hidden width), K classes of the scenario, K_i classes of task i.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import require, require_positive

NO_GROUP = -1
"""Group of a task without a tau~ in a layer."""


class TaskPart(nn.Module):
    """The parameters of one task: v, tau and bias of each layer, and its head.

    tau starts as a copy of sigma, and the bias at 0. v starts from a normal distribution with variance 2 / (output
    units), truncated at two standard deviations, so M starts near 1/2.
    """

    def __init__(self, sigma: Sequence[Tensor], num_classes: int) -> None:
        super().__init__()
        units = [len(s) for s in sigma]
        self.v = nn.ParameterList(_draw_truncated_normal(n) for n in units)
        self.tau = nn.ParameterList(s.detach().clone() for s in sigma)
        self.bias = nn.ParameterList(torch.zeros(n) for n in units)
        self.head = nn.Linear(units[-1], num_classes)
        self.to(sigma[0].device)  # drawn on the CPU, so that a seed draws the same on every device


def _draw_truncated_normal(units: int) -> Tensor:
    std = (2.0 / units) ** 0.5
    return nn.init.trunc_normal_(torch.empty(units), std=std, a=-2 * std, b=2 * std)


class ResponseNorm(nn.Module):
    """Local response normalisation: x / (1 + alpha * mean of x^2 over the ``size`` channels around)^0.75.

    The equation of torch's ``LocalResponseNorm``. Its pooling over channels took more than half of a step on a CPU;
    here the mean is a 1 x 1 convolution.
    """

    band: Tensor

    def __init__(self, channels: int, size: int, alpha: float) -> None:
        super().__init__()
        index = torch.arange(channels)
        near = (index[:, None] - index[None]).abs() <= size // 2
        self.register_buffer("band", (near / size)[:, :, None, None], persistent=False)  # (C, C, 1, 1)
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        scale = 1.0 + self.alpha * F.conv2d(x.square(), self.band)
        return x * (scale * scale.sqrt()).rsqrt()  # scale^-0.75


class APDNet(Backbone):
    """A multi-head LeNet with one set of trunk weights per task.

    Args:
        channels: channels of the convolutions; a pooling after each halves the map.
        kernel: side of their kernels, odd.
        hidden: widths of the fully connected layers.
    """

    def __init__(
        self,
        *,
        channels: list[int],
        kernel: int,
        hidden: list[int],
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        usual = "The paper's network has channels=[20,50], hidden=[800,500]."
        require_positive(fix=usual, channels=channels, hidden=hidden)
        for key, widths in {"channels": channels, "hidden": hidden}.items():
            require(len(widths) > 0, key, expected="one or more widths", got="an empty list", fix=usual)
        require(kernel > 0 and kernel % 2 == 1, "kernel", expected="an odd number", got=kernel, fix="The paper's is 5.")
        height, width = (side // 2 ** len(channels) for side in image_shape[1:])
        require(
            min(height, width) > 0,
            "channels",
            expected=f"at most {min(image_shape[1:]).bit_length() - 1} convolutions, since each halves the map",
            got=list(channels),
            fix="Use fewer convolutions; backbone=apd_digits is for 8 x 8 pixels.",
        )
        shapes: list[tuple[int, ...]] = [(b, a, kernel, kernel) for a, b in pairwise([image_shape[0], *channels])]
        shapes += [(b, a) for a, b in pairwise([channels[-1] * height * width, *hidden])]
        self.sigma = nn.ParameterList(nn.init.kaiming_normal_(torch.empty(s), nonlinearity="relu") for s in shapes)
        self.tasks = nn.ModuleList()
        self.local = nn.ParameterList()  # tau~ of every group of every layer
        self.groups: list[list[int]] = [[] for _ in shapes]  # [layer][task]: index in local
        self.norms = nn.ModuleList(ResponseNorm(c, size=9, alpha=1e-3) for c in channels)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)  # n pixels to n // 2, padded on the far side only
        self.num_classes = num_classes

    @property
    def layers(self) -> range:
        """Numbers of the decomposed layers."""
        return range(len(self.sigma))

    @property
    def parts(self) -> list[TaskPart]:
        """The parameters of each task."""
        return [part for part in self.tasks if isinstance(part, TaskPart)]

    def add_task(self, num_classes: int) -> None:
        """Add a task; v, biases and heads of the earlier tasks are frozen, their tau is not."""
        for part in self.parts:
            part.requires_grad_(False)
            part.tau.requires_grad_(True)
        self.tasks.append(TaskPart(list(self.sigma), num_classes))
        for groups in self.groups:
            groups.append(NO_GROUP)

    def get_adaptive(self, task: int, layer: int, threshold: float = 0.0) -> Tensor:
        """tau~ + tau of a task in a layer; tau is 0 where |tau| <= ``threshold``."""
        tau = self.parts[task].tau[layer]
        if threshold:
            tau = F.hardshrink(tau, threshold)
        group = self.groups[layer][task]
        return tau if group == NO_GROUP else self.local[group] + tau

    def compute_weights(self, task: int, threshold: float = 0.0) -> list[Tensor]:
        """theta of a task, one tensor per layer; tau is 0 where |tau| <= ``threshold``."""
        return [
            sigma * torch.sigmoid(v).view(-1, *[1] * (sigma.dim() - 1)) + self.get_adaptive(task, layer, threshold)
            for layer, (sigma, v) in enumerate(zip(self.sigma, self.parts[task].v))
        ]

    def share(self, local: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> None:
        """Replace every tau~; ``groups[layer][task]`` is the index in ``local``, or :data:`NO_GROUP`."""
        self.local = nn.ParameterList(nn.Parameter(shared, requires_grad=False) for shared in local)
        self.groups = [list(of_tasks) for of_tasks in groups]

    def extract_task_features(self, x: Tensor, task: int, threshold: float = 0.0) -> Tensor:
        """(B, C, H, W) -> (B, D) with the weights of a task."""
        layers = list(zip(self.compute_weights(task, threshold), self.parts[task].bias))
        for (weight, bias), norm in zip(layers, self.norms):
            x = self.pool(norm(F.relu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))))
        x = x.flatten(1)
        for weight, bias in layers[len(self.norms) :]:
            x = F.relu(F.linear(x, weight, bias))
        return x

    def compute_task_logits(self, x: Tensor, task: int, threshold: float = 0.0) -> Tensor:
        """(B, C, H, W) -> (B, K_i) with the weights and the head of a task."""
        return self.parts[task].head(self.extract_task_features(x, task, threshold))

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D) with the weights of the newest task."""
        self._require_a_task()
        return self.extract_task_features(x, len(self.tasks) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K), each task's logits with its own weights; -inf for classes without a head."""
        self._require_a_task()
        logits = torch.cat([self.compute_task_logits(x, task) for task in range(len(self.tasks))], dim=1)
        return F.pad(logits, (0, self.num_classes - logits.shape[1]), value=-torch.inf)

    def get_extra_state(self) -> dict[str, Any]:
        """Classes of each task, shapes of every tau~, and the groups that share them."""
        return {
            "classes": [part.head.out_features for part in self.parts],
            "local": [list(shared.shape) for shared in self.local],
            "groups": [list(of_tasks) for of_tasks in self.groups],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Allocate tensors of the saved sizes; their values are loaded afterwards."""
        del self.tasks[len(state["classes"]) :]
        for num_classes in state["classes"][len(self.tasks) :]:
            self.add_task(num_classes)
        local = list(self.local)
        if [list(shared.shape) for shared in local] != state["local"]:
            local = [self.sigma[0].new_zeros(shape) for shape in state["local"]]
        self.share(local, state["groups"])

    def _require_a_task(self) -> None:
        require(
            len(self.tasks) > 0,
            "backbone",
            expected="method=apd, which adds a part to this network for each task",
            got="a method that adds none",
            fix="Use method=apd, or another backbone.",
        )
