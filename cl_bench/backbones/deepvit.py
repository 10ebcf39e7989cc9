"""DeepViT (Zhou et al., arXiv 2103.11886, 2021): a Vision Transformer whose attention heads exchange their maps.

    A   = softmax(Q K^T / sqrt(d))                       the maps of all heads
    A'  = Norm(Theta^T A)                                A'_g = Norm_g( sum over heads h of Theta_hg A_h )
    out = W_o concat over heads g of A'_g V_g                                                             (Eq. 3)

Theta is learned, one matrix per block. In deep transformers the maps of neighbouring blocks become alike; mixing the
heads keeps them apart. Everything else is the plain ViT of :mod:`cl_bench.backbones.vit`.

Shapes: B images, n tokens (patches and the class token), D = dim, h heads, d = D / h, K classes.

Departures:

1. Theta starts at the identity plus normal noise of standard deviation 0.02. The authors' code has a 1 x 1 convolution
   with random weights and a bias; the bias has no effect, since BatchNorm follows.
2. Norm is BatchNorm over images and map positions, one per head, as in the authors' code. ``layer`` is LayerNorm over
   the heads, as in ports: it has no running statistics, which drift from task to task.
3. Mixing and Norm are computed in fp32 under bf16, too: they keep the small differences between entries of a map.
4. Q, K and V have biases, as timm's ViT. No dropout, no stochastic depth. The sizes are ours (docs/methods/deepvit.md).
"""

from typing import Any, Literal

import torch
from timm.layers import Attention
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead
from cl_bench.backbones.layers.vit import build_small_vit

NormName = Literal["batch", "layer"]


class HeadNorm(nn.LayerNorm):
    """LayerNorm over the heads at each position of the maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, h, n, n) -> the same shape."""
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class ReAttention(nn.Module):
    """The attention of the module's equations.

    Args:
        attention: timm's, whose projections are taken over with their weights.
        norm: Norm.
    """

    def __init__(self, attention: Attention, norm: NormName) -> None:
        super().__init__()
        heads = attention.num_heads
        self.heads, self.scale = heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.theta = nn.Parameter(torch.eye(heads) + 0.02 * torch.randn(heads, heads))
        self.norm = nn.BatchNorm2d(heads) if norm == "batch" else HeadNorm(heads)

    def compute_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, D) -> A and A', (B, h, n, n) each, and V, (B, h, n, d)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        maps = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            return maps, self.norm(torch.einsum("hg,bhij->bgij", self.theta, maps.to(self.theta.dtype))), v

    def forward(self, x: Tensor, **masks: object) -> Tensor:
        """(B, n, D) -> (B, n, D); timm's block also passes masks, which are None here."""
        _, mixed, v = self.compute_maps(x)
        return self.proj((mixed.to(v.dtype) @ v).transpose(1, 2).flatten(2))


class DeepViT(SingleHead):
    """Class token of a ViT with re-attention, and a linear head.

    Args:
        patch_size: side of a patch in pixels; must divide the images' side.
        dim, depth, heads: width of a token, number of blocks, attention heads per block.
        mlp_ratio: width of the MLP relative to ``dim``.
        norm: of the mixed maps.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        norm: NormName,
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
        blocks: Any = net.blocks
        for block in blocks:
            block.attn = ReAttention(block.attn, norm)
        self.net = net

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim), the class token after the final LayerNorm."""
        return self.net(x)
