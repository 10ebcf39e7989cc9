"""A multi-layer perceptron on flattened pixels."""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.core.errors import require_positive

BATCH_NORM_EPS = 1e-6
"""That of the code of GDumb (Prabhu et al. 2020)."""


class MLP(SingleHead):
    """Linear layers with ReLU between them.

    Args:
        hidden: widths of the hidden layers; an empty list is a linear classifier.
        norm: ``none``, or ``batch``: every layer, the last one too, is without a bias and followed by BatchNorm, as in
            the code of GDumb.
        init: first weights, ``default`` for torch's, or ``truncated_normal``: a normal distribution of standard
            deviation 0.1, cut at 0.2, and biases of 0.1, as in the code of A-GEM (Chaudhry et al. 2019).
    """

    def __init__(
        self,
        *,
        hidden: list[int],
        norm: Literal["none", "batch"],
        init: Literal["default", "truncated_normal"],
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        require_positive(fix="An empty list is a linear classifier.", hidden=hidden)
        widths = [math.prod(image_shape), *hidden]
        layers = [nn.Sequential(*_build_layer(a, b, norm), nn.ReLU(inplace=True)) for a, b in pairwise(widths)]
        self.trunk = nn.Sequential(nn.Flatten(), *layers)
        head = _build_layer(widths[-1], num_classes, norm)
        self.head = nn.Sequential(*head) if len(head) > 1 else head[0]
        if init == "truncated_normal":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.trunc_normal_(layer.weight, std=0.1, a=-0.2, b=0.2)
                    if layer.bias is not None:
                        nn.init.constant_(layer.bias, 0.1)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), D the last hidden width or the number of pixels."""
        return self.trunk(x)


def _build_layer(width_in: int, width_out: int, norm: str) -> list[nn.Module]:
    if norm == "none":
        return [nn.Linear(width_in, width_out)]
    return [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out, eps=BATCH_NORM_EPS)]
