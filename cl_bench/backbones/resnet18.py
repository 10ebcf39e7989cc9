"""ResNet18 for small images (He et al. 2016; CIFAR stem as in Mammoth, Avalanche and GEM)."""

from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.backbones.layers.resnet import build_resnet_layers
from cl_bench.core.errors import require_positive


class ResNet18(SingleHead):
    """Four layers of two basic blocks, global average pooling, one linear head; 11,220,132 parameters at 100 classes.

    Args:
        width: channels of the first layer; 64 is the ResNet18, 20 the slim one of GEM.
    """

    def __init__(self, *, width: int, num_classes: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        require_positive(fix="64 is the ResNet18, 20 the slim one.", width=width)
        self.layers = build_resnet_layers(image_shape[0], width, num_layers=4)
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 8 width)."""
        return self.layers(x).mean(dim=(2, 3))
