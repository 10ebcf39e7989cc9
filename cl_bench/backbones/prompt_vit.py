"""A frozen ViT that takes prompts, for the methods that learn them, and one linear head over all classes.

y^0 are the ViT's class token and the patches, with the embeddings of their positions. Prompts enter in two ways:

    tokens     y^0 = [ class token ; P ; patches ]              prompts P get no position (Wang et al., CVPR 2022)
    prefixes   attention( Q, [ P_K ; K ], [ P_V ; V ] )         in a layer; P_K and P_V are keys and values as they are,
                                                                without norm and projection (Wang et al., ECCV 2022)

Without prompts the outputs are those of the ViT alone. The query of an image is the ViT's own class token after the
last norm, which is also ``features``.

Shapes: B images, N patches, P prompt tokens of an image, D token width, h heads, d = D / h, K classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.backbones.layers.frozen_vit import FrozenViT, apply_mlp, declare_void_sizes, project

Prefix = tuple[Tensor, Tensor]
"""Keys and values before those of a layer, (B, P, D) each."""


@declare_void_sizes
class PromptViT(FrozenViT, SingleHead):
    """A ViT that is frozen by its method, and a head on what it makes of images and prompts.

    Args:
        pretrained, checkpoint, model, patch_size, dim, depth, heads, mlp_ratio, image_mean, image_std: of the trunk,
            see :class:`~cl_bench.backbones.layers.frozen_vit.FrozenViT`.
    """

    head: nn.Linear

    def __init__(
        self,
        *,
        pretrained: bool,
        checkpoint: str | None,
        model: str,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        super().__init__(
            pretrained=pretrained,
            checkpoint=checkpoint,
            model=model,
            patch_size=patch_size,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            image_shape=image_shape,
            image_mean=image_mean,
            image_std=image_std,
        )
        self.head = nn.Linear(self.dim, num_classes)

    def encode(self, x: Tensor, tokens: Tensor | None = None, prefixes: Mapping[int, Prefix] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, 1 + P + N, D) after the last norm: class token, prompt tokens, patches.

        Args:
            tokens: (B, P, D), prompts between class token and patches.
            prefixes: layer from 0 -> its prefix.
        """
        y = self.embed(x)
        if tokens is not None:
            y = torch.cat([y[:, :1], tokens, y[:, 1:]], dim=1)
        for number, block in enumerate(self.trunk.blocks):
            y = _apply_layer(block, y, (prefixes or {}).get(number))
        return self.trunk.norm(y)


def _apply_layer(block: Any, y: Tensor, prefix: Prefix | None) -> Tensor:
    """One block: (B, n, D) -> (B, n, D)."""
    q, k, v = project(block.attn, block.norm1(y))
    if prefix is not None:
        before_k, before_v = (p.unflatten(2, (k.shape[1], -1)).transpose(1, 2).to(k.dtype) for p in prefix)
        k, v = torch.cat([before_k, k], dim=2), torch.cat([before_v, v], dim=2)
    return apply_mlp(block, y, F.scaled_dot_product_attention(q, k, v))
