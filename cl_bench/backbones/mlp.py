"""A multi-layer perceptron on flattened pixels."""

import math
from itertools import pairwise

from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.core.errors import require_positive


class MLP(SingleHead):
    """Linear layers with ReLU between them.

    Args:
        hidden: widths of the hidden layers; an empty list is a linear classifier.
    """

    def __init__(self, *, hidden: list[int], num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        require_positive(fix="An empty list is a linear classifier.", hidden=hidden)
        widths = [math.prod(image_shape), *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU(inplace=True)) for a, b in pairwise(widths)]
        self.trunk = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), D the last hidden width or the number of pixels."""
        return self.trunk(x)
