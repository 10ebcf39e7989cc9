"""Network of the Lifelong Vision Transformer (Wang, Liu, Duan, Kong, Tao, CVPR 2022, pp. 171-181).

A convolutional stem, stages of attention blocks with decreasing resolution, two linear heads. As in LeViT: 1 x 1
convolutions with BatchNorm, no LayerNorm, no class token, no absolute positions. The key of the attention is a
parameter of the block, the same for all inputs ("external key"), and so is its bias; the loss that protects both is in
:mod:`cl_bench.methods.lvt`.

Shapes: B images, s x s map, n = s^2 keys, n_q queries (n, or n / 4 if the block shrinks the map), h heads,
d_k = key_dim, d_v = value_dim, K classes.

Departures from the sources (docs/methods/lvt.md says why): the attention bias B starts at 0.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone, check_layers
from cl_bench.backbones.layers.resnet import build_resnet_layers
from cl_bench.core.errors import require, require_fraction, require_positive


class Attention(nn.Module):
    """Inter-task attention: A = softmax( BN(K_w Q) + B sqrt(d_k) ), out = BN0(W_o GELU(A V)).

    Q = BN(W_q x) and V = BN(W_v x) come from the input. The key K_w (h d_k -> h n, dense over heads) and the bias B
    (n, h), indexed by |dx| s + |dy|, do not. BN normalises the scores, so there is no 1 / sqrt(d_k).
    """

    distance: Tensor

    def __init__(
        self,
        *,
        dim_in: int,
        dim_out: int,
        size: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dropout: float,
        stride: int,
    ) -> None:
        super().__init__()
        self.size, self.heads, self.value_dim, self.bias_scale = size, heads, value_dim, math.sqrt(key_dim)
        keys = size * size
        self.query = nn.Sequential(
            nn.Conv2d(dim_in, heads * key_dim, 1, stride, bias=False), nn.BatchNorm2d(heads * key_dim)
        )
        self.value = nn.Sequential(
            nn.Conv2d(dim_in, heads * value_dim, 1, bias=False), nn.BatchNorm2d(heads * value_dim)
        )
        self.key = nn.Conv2d(heads * key_dim, heads * keys, 1, bias=False)  # K_w
        self.norm = nn.BatchNorm2d(heads * keys)
        self.bias = nn.Parameter(torch.zeros(keys, heads))  # B
        out_norm = nn.BatchNorm2d(dim_out)
        nn.init.zeros_(out_norm.weight)
        self.out = nn.Sequential(nn.GELU(), nn.Conv2d(heads * value_dim, dim_out, 1), out_norm, nn.Dropout(dropout))
        self.register_buffer("distance", _compute_distances(size, stride), persistent=False)  # (n_q, n)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, s, s) -> (B, dim_out, s / stride, s / stride)."""
        batch, h = len(x), self.heads
        q = self.query(x)  # (B, h d_k, s_q, s_q)
        v = self.value(x).view(batch, h, self.value_dim, -1)  # (B, h, d_v, n)
        scores = self.norm(self.key(q)).view(batch, h, -1, q.shape[2] * q.shape[3])  # (B, h, n, n_q)
        bias = F.embedding(self.distance, self.bias) * self.bias_scale  # (n_q, n, h)
        attention = (scores + bias.permute(2, 1, 0)).softmax(dim=2)  # over the keys
        out = v @ attention  # (B, h, d_v, n_q)
        return self.out(out.reshape(batch, h * self.value_dim, *q.shape[2:]))


def _compute_distances(size: int, stride: int) -> Tensor:
    """(n_q, n) row |dx| s + |dy| of B for each pair of a query's and a key's position."""
    grid = torch.cartesian_prod(torch.arange(size), torch.arange(size))  # (n, 2)
    queries = torch.cartesian_prod(torch.arange(0, size, stride), torch.arange(0, size, stride))  # (n_q, 2)
    apart = (queries[:, None] - grid[None]).abs()  # (n_q, n, 2)
    return apart[..., 0] * size + apart[..., 1]


class FeedForward(nn.Sequential):
    """1 x 1 convolution to ``ratio`` times the width, GELU, and back; no norm inside."""

    def __init__(self, dim: int, ratio: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(dim, ratio * dim, 1),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Conv2d(ratio * dim, dim, 1),
            nn.Dropout(dropout),
        )


class Block(nn.Module):
    """y = x + attention(x), or attention(x) alone if the block shrinks the map; then y + FFN(y)."""

    def __init__(self, attention: Attention, feed_forward: FeedForward, residual: bool) -> None:
        super().__init__()
        self.attention, self.feed_forward, self.residual = attention, feed_forward, residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, s, s) -> (B, dim_out, s / stride, s / stride)."""
        y = self.attention(x)
        if self.residual:
            y = x + y
        return y + self.feed_forward(y)


class LVT(Backbone):
    """Stem, stages, average pooling, and two bias-free heads: injection and accumulation.

    ``forward`` uses the accumulation head, as at test time.

    Args:
        width: channels of the stem's first layer.
        stem_layers: ResNet18 layers in the stem; each except the first halves the map.
        dims: channels of each stage; the first must be ``width * 2^(stem_layers - 1)``.
        depths, heads: blocks and attention heads of each stage; the shrinking block before a stage has twice as many
            heads as the previous stage.
        key_dim, value_dim: d_k and d_v, channels per head.
        mlp_ratio: width of the FFN relative to the stage's.
        dropout: after each projection of attention and FFN.
    """

    def __init__(
        self,
        *,
        width: int,
        stem_layers: int,
        dims: list[int],
        depths: list[int],
        heads: list[int],
        key_dim: int,
        value_dim: int,
        mlp_ratio: int,
        dropout: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        _check_stages(dims, depths, heads)
        usual = "See configs/backbone/lvt.yaml."
        require_positive(fix=usual, width=width, stem_layers=stem_layers, key_dim=key_dim, value_dim=value_dim)
        require_positive(fix=usual, mlp_ratio=mlp_ratio)
        require_fraction(fix="The paper's code has 0.1.", below_one=True, dropout=dropout)
        check_layers("stem_layers", stem_layers)
        _check_stem(width, stem_layers, dims, image_shape)
        size = image_shape[1] // 2 ** (stem_layers - 1)
        self.stem = build_resnet_layers(image_shape[0], width, stem_layers)
        for module in self.stem.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

        build_attention = partial(Attention, key_dim=key_dim, value_dim=value_dim, dropout=dropout)

        def build_block(dim_in: int, dim_out: int, num_heads: int, stride: int) -> Block:
            attention = build_attention(dim_in=dim_in, dim_out=dim_out, size=size, heads=num_heads, stride=stride)
            return Block(attention, FeedForward(dim_out, mlp_ratio, dropout), residual=stride == 1)

        blocks: list[Block] = []
        for i, dim in enumerate(dims):
            if i > 0:
                blocks.append(build_block(dims[i - 1], dim, 2 * heads[i - 1], stride=2))
                size //= 2
            blocks += [build_block(dim, dim, heads[i], stride=1) for _ in range(depths[i])]
        self.stages = nn.Sequential(*blocks)
        self.injection = nn.Linear(dims[-1], num_classes, bias=False)
        self.accumulation = nn.Linear(dims[-1], num_classes, bias=False)
        for head in (self.injection, self.accumulation):
            nn.init.kaiming_normal_(head.weight, nonlinearity="linear")

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dims[-1])."""
        return self.stages(self.stem(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits of the accumulation head."""
        return self.accumulation(self.features(x))

    def keys_and_biases(self) -> list[nn.Parameter]:
        """K_w and B of every attention, the parameters that the inter-task penalty acts on."""
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        return [parameter for a in attentions for parameter in (*a.key.parameters(), a.bias)]


def _check_stages(dims: list[int], depths: list[int], heads: list[int]) -> None:
    """Refuse lists of stages of different lengths, and numbers of blocks or heads that cannot be."""
    require(
        len(dims) == len(depths) == len(heads) > 0,
        "dims",
        expected="dims, depths and heads of the same length, one entry per stage",
        got=f"{len(dims)}, {len(depths)} and {len(heads)} entries",
        fix="The two-stage model has dims=[256,512], depths=[2,2], heads=[4,8].",
    )
    require_positive(fix="See configs/backbone/lvt.yaml.", depths=depths, heads=heads)
    check_layers("depths", max(depths))


def _check_stem(width: int, stem_layers: int, dims: list[int], image_shape: tuple[int, int, int]) -> None:
    """Refuse a stem whose output does not fit the first stage, or images that the stages cannot halve."""
    stem_dim = width * 2 ** (stem_layers - 1)
    require(
        dims[0] == stem_dim,
        "dims",
        expected=f"a first stage of width * 2^(stem_layers - 1) = {stem_dim} channels",
        got=list(dims),
        fix=f"Set dims[0]={stem_dim}, or change width or stem_layers.",
    )
    smallest = 2 ** (stem_layers + len(dims) - 2)
    require(
        image_shape[1] == image_shape[2] and image_shape[1] % smallest == 0,
        "stem_layers",
        expected=f"square images, side a multiple of {smallest} ({stem_layers} stem layers, {len(dims)} stages)",
        got=f"images of {image_shape[1]} x {image_shape[2]}",
        fix="Use fewer stem layers or stages.",
    )
