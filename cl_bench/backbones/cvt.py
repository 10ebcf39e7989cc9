"""CvT, the Convolutional vision Transformer (Wu et al., ICCV 2021, arXiv 2103.15808), for small images.

Each stage makes a smaller map of tokens by an overlapping convolution, and transforms it by blocks whose queries, keys
and values are convolutions of the map:

    X_i = LN( Conv2d(X_{i-1}) )                            token embedding, kernel k_i, stride s_i         (section 3.1)
    q = Linear(BN(DW(X)))    k = Linear(BN(DW_s(X)))    v = Linear(BN(DW_s(X)))                                  (Eq. 2)
    X = X + W_o concat over heads of softmax(q k^T / sqrt(d)) v,   then   X = X + MLP(LN(X))

DW is a depth-wise 3 x 3 convolution and DW_s one with stride ``kv_stride``, so there are fewer keys than queries; X on
the right is LN(X). There are no position embeddings: the convolutions know the positions.

Shapes: B images, H x W map of tokens, D channels, h heads, d = D / h, n queries, m keys, K classes.

Departures:

1. The features are the mean over the last map. The paper has a class token in the last stage. It skips the
   convolutions, so that in the last block the one of the queries would get no gradient.
2. The strides are 2, 2, 2 with kernels of 3 pixels, for images of 32 pixels; the paper has 4, 2, 2 with 7, 3, 3.
3. The scores are divided by sqrt(d). The authors' code divides them by sqrt(D).
4. The linear layer of the keys has no bias: the softmax does not see what is added to all keys.
5. No stochastic depth (the authors have 0.1 in the last stage).
"""

from itertools import pairwise

import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from cl_bench.backbones.base import LEAST_SIDE, SingleHead, check_layers
from cl_bench.core.errors import require, require_positive


class ConvProjection(nn.Module):
    """Linear(BN(DW(X))): one of q, k and v."""

    def __init__(self, dim: int, stride: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.linear = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, n, D), n = ceil(H / stride) ceil(W / stride)."""
        return self.linear(self.norm(self.conv(x)).flatten(2).transpose(1, 2))


class ConvAttention(nn.Module):
    """Attention with convolutional projections."""

    def __init__(self, dim: int, heads: int, kv_stride: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = ConvProjection(dim, 1)
        self.key, self.value = ConvProjection(dim, kv_stride, bias=False), ConvProjection(dim, kv_stride)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same shape."""
        projections = (self.query, self.key, self.value)
        q, k, v = (p(x.permute(0, 3, 1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in projections)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """X + attention(LN(X)), then X + MLP(LN(X))."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, kv_stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = ConvAttention(dim, heads, kv_stride), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stage(nn.Module):
    """Token embedding and blocks."""

    def __init__(self, embedding: nn.Conv2d, blocks: list[Block]) -> None:
        super().__init__()
        self.embedding, self.norm = embedding, nn.LayerNorm(embedding.out_channels)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D_before, H, W) -> (B, D, ceil(H / s), ceil(W / s))."""
        return self.blocks(self.norm(self.embedding(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class CvT(SingleHead):
    """Stages, LayerNorm, the mean over the map, and a linear head.

    Args:
        dims, depths, heads: channels, blocks and attention heads of each stage.
        kernels, strides: of each stage's token embedding; kernels are odd.
        kv_stride: of the convolutions that give keys and values.
        mlp_ratio: width of the MLPs relative to their stage.
    """

    def __init__(
        self,
        *,
        dims: list[int],
        depths: list[int],
        heads: list[int],
        kernels: list[int],
        strides: list[int],
        kv_stride: int,
        mlp_ratio: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        lists = {"dims": dims, "depths": depths, "heads": heads, "kernels": kernels, "strides": strides}
        require_positive(fix="See configs/backbone/cvt.yaml.", kv_stride=kv_stride, mlp_ratio=mlp_ratio)
        _check(lists, kv_stride, image_shape)
        self.stages = nn.Sequential(
            *(
                Stage(
                    nn.Conv2d(before, dim, kernel, stride, kernel // 2),
                    [Block(dim, h, mlp_ratio, kv_stride) for _ in range(depth)],
                )
                for (before, dim), depth, h, kernel, stride in zip(
                    pairwise([image_shape[0], *dims]), depths, heads, kernels, strides
                )
            )
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        return self.norm(self.stages(x).permute(0, 2, 3, 1)).mean(dim=(1, 2))


def _check(lists: dict[str, list[int]], kv_stride: int, image_shape: tuple[int, int, int]) -> None:
    usual, stages = "See configs/backbone/cvt.yaml.", len(lists["dims"])
    for key, values in lists.items():
        require_positive(fix=usual, **{key: values})
        require(
            len(values) == stages > 0,
            key,
            expected=f"one number for each of the {stages} stages that backbone.dims has",
            got=list(values),
            fix=usual,
        )
    check_layers("depths", sum(lists["depths"]))
    odd = all(kernel % 2 for kernel in lists["kernels"])
    require(odd, "kernels", expected="odd numbers", got=list(lists["kernels"]), fix=usual)
    whole = all(dim % h == 0 for dim, h in zip(lists["dims"], lists["heads"]))
    expected = f"divisors of dims = {list(lists['dims'])}"
    require(whole, "heads", expected=expected, got=list(lists["heads"]), fix="64 channels per head are usual.")
    side = min(image_shape[1:])
    for stride in [*lists["strides"], kv_stride]:
        side = -(-side // stride)  # rounded up
    require(
        side >= LEAST_SIDE,
        "strides",
        expected=f"{LEAST_SIDE} x {LEAST_SIDE} keys or more in the last stage for images of {image_shape[1]} x "
        f"{image_shape[2]} and kv_stride={kv_stride}",
        got=list(lists["strides"]),
        fix="2,2,2 suit 32 x 32 pixels, 1,1,2 suit 8 x 8.",
    )
