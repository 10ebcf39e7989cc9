"""ResNet18 for small images (He et al. 2016; CIFAR stem as in Mammoth, Avalanche and GEM)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.backbones.layers.cosine import CosineHead
from cl_bench.backbones.layers.resnet import build_resnet_layers
from cl_bench.core.errors import require_positive


class ResNet18(SingleHead):
    """Four layers of two basic blocks, global average pooling, one head; 11,220,132 parameters at 100 classes.

    Args:
        width: channels of the first layer; 64 is the ResNet18, 20 the slim one of GEM.
        head: ``linear``, or ``cosine`` (:class:`~cl_bench.backbones.layers.cosine.CosineHead`).
        variant: ``standard``, or ``agem``: the RESNET-S of the code of A-GEM (Chaudhry et al. 2019), where the eps of
            BatchNorm is 0.001, and the first weights of a k x k convolution are uniform in +- 1 / sqrt(k C_in), not
            1 / sqrt(k k C_in).
    """

    def __init__(
        self,
        *,
        width: int,
        head: Literal["linear", "cosine"],
        variant: Literal["standard", "agem"],
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        require_positive(fix="64 is the ResNet18, 20 the slim one.", width=width)
        self.layers = build_resnet_layers(image_shape[0], width, num_layers=4)
        if variant == "agem":
            _change_to_agem(self.layers)
        self.head = nn.Linear(8 * width, num_classes) if head == "linear" else CosineHead(8 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 8 width)."""
        return self.layers(x).mean(dim=(2, 3))


@torch.no_grad()
def _change_to_agem(layers: nn.Module) -> None:
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            module.weight *= math.sqrt(module.kernel_size[0])
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
