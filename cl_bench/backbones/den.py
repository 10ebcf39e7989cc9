"""The growable networks of DEN, Dynamically Expandable Networks (Yoon, Yang, Lee, Hwang, ICLR 2018, section 4).

Shapes: B images, C channels, H x W pixels, K classes of the scenario. A layer has n units with inputs from m units of
the layer below. Each pair is connected by a kernel: (k, k) in a convolution, (positions,) if the input of a linear
layer is maps, () between linear layers. A unit is one feature map or one neuron: a row of the layer's weight (n, m,
*kernel).

Units are appended only, and each is stamped with the task that added it. Task t is predicted by its own head and the
units stamped t or earlier, which are the first ones of every layer, so later units cannot change the prediction.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import require, require_positive

Units = list[Tensor]
"""For each hidden layer, positions of some of its units: (number,) int64."""


class Layer(nn.Module):
    """Units with their incoming weights (n, m, *kernel) and biases (n,), initialised as in He et al. 2015.

    Args:
        gain: standard deviation of the weights times the square root of the fan-in: sqrt(2) before a ReLU.
    """

    def __init__(self, units: int, inputs: int, kernel: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.kernel, self.gain = kernel, gain
        self.weight = nn.Parameter(self._draw_weights(units, inputs))
        self.bias = nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor, units: int) -> Tensor:
        """The first ``units`` units on the first x.shape[1] inputs: (B, m, ...) -> (B, units, ...) before the ReLU."""
        # Contiguous, so that an old task's slice of a grown layer is computed by the same kernels as before.
        inputs = x.shape[1]
        weight, bias = self.weight[:units, :inputs].contiguous(), self.bias[:units]
        if len(self.kernel) == 2:
            return F.conv2d(x, weight, bias, padding=self.kernel[0] // 2)
        return F.linear(x.flatten(1), weight.flatten(1), bias)

    @torch.no_grad()
    def grow(self, units: int, inputs: int) -> None:
        """Append this many units and inputs with random weights; the old weights stay."""
        n, m = self.weight.shape[:2]
        weight = self._draw_weights(n + units, m + inputs).to(self.weight.device)
        weight[:n, :m] = self.weight
        self._set(weight, torch.cat([self.bias, self.bias.new_zeros(units)]))

    @torch.no_grad()
    def gather(self, units: Tensor, inputs: Tensor) -> None:
        """Keep ``units`` and ``inputs`` in this order; a repeated position is a copy."""
        self._set(self.weight[units][:, inputs], self.bias[units])

    def resize(self, units: int, inputs: int) -> None:
        """Allocate a saved layer's size; its weights are loaded next."""
        if self.weight.shape[:2] != (units, inputs):
            self._set(self.weight.new_zeros(units, inputs, *self.kernel), self.bias.new_zeros(units))

    def _set(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def _draw_weights(self, units: int, inputs: int) -> Tensor:
        deviation = self.gain / math.sqrt(inputs * math.prod(self.kernel))
        return deviation * torch.randn(units, inputs, *self.kernel)


class DEN(Backbone):
    """Convolutions, then linear layers, ReLU after each, and one head per task; everything except the heads can grow.

    Args:
        channels: units of the convolutions; an empty list is a multi-layer perceptron.
        kernel_size: side of the convolutions' kernels, odd; stride 1, the maps keep their size.
        pool_after: convolutions, counted from 1, with a 3 x 3 max pooling of stride 2 after them (AlexNet: 1, 2, 5).
        hidden: units of the linear layers.
    """

    def __init__(
        self,
        *,
        channels: list[int],
        kernel_size: int,
        pool_after: list[int],
        hidden: list[int],
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        usual = "The paper has [384,192] after convolutions and [312,128] without."
        require(len(hidden) > 0, "hidden", expected="one or more widths", got="an empty list", fix=usual)
        require_positive(fix=usual, hidden=hidden)
        require_positive(
            fix="The paper has [64,128,256,256,128]; an empty list is a multi-layer perceptron.", channels=channels
        )
        require(
            kernel_size % 2 == 1 and kernel_size > 0,
            "kernel_size",
            expected="an odd number above 0",
            got=kernel_size,
            fix="The paper has 5.",
        )
        require(
            set(pool_after) <= set(range(1, len(channels) + 1)),
            "pool_after",
            expected=f"numbers of convolutions, 1 to {len(channels)}",
            got=list(pool_after),
            fix="AlexNet has [1,2,5].",
        )
        inputs, height, width = image_shape
        self.num_classes = num_classes
        self.pooled = [number in pool_after for number in range(1, len(channels) + 1)] + [False] * len(hidden)
        self.layers, self.heads = nn.ModuleList(), nn.ModuleList()
        for units, pooled in zip(channels, self.pooled):
            self.layers.append(Layer(units, inputs, (kernel_size, kernel_size), math.sqrt(2)))
            inputs = units
            if pooled:
                height, width = (height + 1) // 2, (width + 1) // 2
        kernel: tuple[int, ...] = (height * width,)
        for units in hidden:
            self.layers.append(Layer(units, inputs, kernel, math.sqrt(2)))
            inputs, kernel = units, ()
        self.stamps = [[0] * units for units in [*channels, *hidden]]

    @property
    def widths(self) -> list[int]:
        """Units of each hidden layer."""
        return [len(stamps) for stamps in self.stamps]

    def get_widths_at(self, task: int) -> list[int]:
        """Units of each hidden layer when ``task`` was learned."""
        return [bisect_right(stamps, task) for stamps in self.stamps]

    def list_path(self) -> list[Layer]:
        """The hidden layers and the newest head, which predict the newest task."""
        return [*self.list_hidden(), self.get_head(len(self.heads) - 1)]

    def list_hidden(self) -> list[Layer]:
        """The layers below the heads."""
        return list(self.layers)  # type: ignore[arg-type]

    def get_head(self, task: int) -> Layer:
        """The head of ``task``."""
        return self.heads[task]  # type: ignore[return-value]

    def get_classes(self, task: int) -> slice:
        """The classes of ``task``, as positions in the class order."""
        ends = [0]
        for number in range(task + 1):
            ends.append(ends[-1] + len(self.get_head(number).bias))
        return slice(ends[-2], ends[-1])

    def extract_features_at(self, x: Tensor, task: int, known: dict[tuple[int, ...], Tensor] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, D_task), the input of the head of ``task``: only units stamped ``task`` or earlier.

        Args:
            known: maps of the same images, by the widths up to their layer; new ones are added.
        """
        known = {} if known is None else known
        widths = self.get_widths_at(task)
        for number, (layer, pooled) in enumerate(zip(self.list_hidden(), self.pooled)):
            through = tuple(widths[: number + 1])
            if through not in known:
                maps = F.relu(layer(x, widths[number]))
                known[through] = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1) if pooled else maps
            x = known[through]
        return x

    def answer(self, x: Tensor, task: int, known: dict[tuple[int, ...], Tensor] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, classes of the task) logits; ``known`` as above."""
        head = self.get_head(task)
        return head(self.extract_features_at(x, task, known), len(head.bias))

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), all units of the last hidden layer."""
        return self.extract_features_at(x, len(self.heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K): all heads' logits, each with its own units; -inf for tasks without a head."""
        scores = x.new_full((len(x), self.num_classes), -torch.inf)
        known: dict[tuple[int, ...], Tensor] = {}  # tasks share the maps of layers that did not grow between them
        for task in range(len(self.heads)):
            scores[:, self.get_classes(task)] = self.answer(x, task, known)
        return scores

    # -- growing ---------------------------------------------------------------------------------------------------

    def add_head(self, classes: int) -> None:
        """Add a head for the next task, with inputs from all units."""
        head = Layer(classes, self.widths[-1], (), 1.0)
        self.heads.append(head.to(self.list_hidden()[0].weight.device))

    def grow(self, units: int) -> None:
        """Append ``units`` new units to every hidden layer, stamped with the newest task; only its head uses them."""
        below = 0
        for layer, stamps in zip(self.list_hidden(), self.stamps):
            layer.grow(units, below)
            stamps += [len(self.heads) - 1] * units
            below = units
        self.list_path()[-1].grow(0, below)

    def remove(self, units: Units) -> None:
        """Delete units of the newest task and their outgoing weights."""
        kept = [torch.tensor([i for i in range(n) if i not in gone]) for n, gone in zip(self.widths, _to_lists(units))]
        self._gather(kept)
        self.stamps = [[stamps[i] for i in which.tolist()] for stamps, which in zip(self.stamps, kept)]

    @torch.no_grad()
    def split(self, units: Units, old: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Split each of ``units`` in two: it gets its weights of ``old`` back, and a copy with its current weights is
        appended to the layer.

        Args:
            old: weight and bias of each hidden layer before the newest task, in the layer's size of that time.

        Units of old tasks keep the old unit as input; the newest task's own units and its head have the copy as input.
        If every unit that differs from ``old`` is split, the old tasks' networks are those of ``old``.
        """
        before = [self.list_hidden()[0].weight.shape[1], *self.widths]
        task = len(self.heads) - 1
        self._gather([torch.cat([torch.arange(n), which.cpu()]) for n, which in zip(self.widths, units)])
        for stamps, which in zip(self.stamps, units):
            stamps += [task] * len(which)
        none = units[0][:0]
        head = self.list_path()[-1]
        shapes = [*old, (head.weight[:0, :0], head.bias[:0])]  # the newest head has no output for an old task
        for layer, m, below, which, (weight, bias) in zip(
            self.list_path(), before, [none, *units], [*units, none], shapes, strict=True
        ):
            n_old, m_old = weight.shape[:2]
            layer.weight[n_old:, below] = 0
            layer.weight[:n_old, m:] = 0
            layer.weight[which] = 0
            layer.weight[which, :m_old] = weight[which]
            layer.bias[which] = bias[which]

    def _gather(self, kept: Units) -> None:
        """Keep the units at positions ``kept`` of each hidden layer, in this order, also as inputs of the next."""
        device = self.list_hidden()[0].weight.device
        first, head = self.list_hidden()[0], self.list_path()[-1]
        inputs = [torch.arange(first.weight.shape[1]), *kept]
        for layer, rows, columns in zip(self.list_path(), [*kept, torch.arange(len(head.bias))], inputs):
            layer.gather(rows.to(device), columns.to(device))

    def get_extra_state(self) -> dict[str, Any]:
        """The stamp of every unit, and (classes, inputs) of every head."""
        stamps = [list(stamps) for stamps in self.stamps]
        return {"stamps": stamps, "heads": [list(self.get_head(t).weight.shape[:2]) for t in range(len(self.heads))]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Allocate the saved sizes; the layers' tensors are loaded afterwards."""
        self.stamps = [list(stamps) for stamps in state["stamps"]]
        inputs = self.list_hidden()[0].weight.shape[1]
        for layer, units in zip(self.list_hidden(), self.widths):
            layer.resize(units, inputs)
            inputs = units
        del self.heads[len(state["heads"]) :]
        for task, (classes, read) in enumerate(state["heads"]):
            if task == len(self.heads):
                self.add_head(classes)
            self.get_head(task).resize(classes, read)


def _to_lists(units: Units) -> list[list[int]]:
    return [which.tolist() for which in units]
