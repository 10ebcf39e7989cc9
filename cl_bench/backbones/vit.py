"""A plain Vision Transformer (Dosovitskiy et al., ICLR 2021) for small images, as a baseline.

timm's ``VisionTransformer`` unchanged: patch embedding, learned positions, class token, pre-norm blocks, a linear head.
No part of it depends on tasks.

Departures: the sizes are ours; the network has as many parameters as the Lifelong Vision Transformer
(docs/methods/vit.md).
"""

from torch import Tensor

from cl_bench.backbones.base import SingleHead
from cl_bench.backbones.layers.vit import build_small_vit


class ViT(SingleHead):
    """Class token of a plain ViT and a linear head; no dropout.

    Args:
        patch_size: side of a patch in pixels; must divide the images' side.
        dim, depth, heads: width of a token, number of blocks, attention heads per block.
        mlp_ratio: width of the MLP relative to ``dim``.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        net = build_small_vit(
            patch_size=patch_size,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            image_shape=image_shape,
        )
        self.head = net.get_classifier()
        net.reset_classifier(0)
        self.net = net

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim), the class token after the final LayerNorm."""
        return self.net(x)
