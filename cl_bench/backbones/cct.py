"""CCT, the Compact Convolutional Transformer (Hassani et al., arXiv 2104.05704, 2021), for small images.

    x_0 = flatten( [MaxPool(ReLU(Conv2d))] x n ) + positions                tokenizer, n = ``conv_layers`` (section 3.3)
    z   = LN( x + MHSA(LN(x)) ),   x = z + MLP(z)                            each block
    w   = softmax over tokens of  g(LN(x_L)),   g: R^D -> R linear
    out = sum over tokens of  w_i LN(x_L)_i                                  sequence pooling               (Eq. 1 to 3)

Convolutions are 3 x 3 without bias, pooling 3 / 2 / 1 halves the map, positions are learned. Sequence pooling takes the
place of a class token. A block normalises its input again after the attention, as the authors' code does: the paper's
text describes the usual pre-norm block.

Shapes: B images, n tokens, D = dim, h heads, K classes.

Departures: g has no bias, which the softmax would not see. Otherwise none from the authors' code for CIFAR, except its
training (docs/methods/cct.md).
"""

from itertools import pairwise

import torch
from timm.layers import Attention, DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from cl_bench.backbones.base import LEAST_SIDE, SingleHead, check_heads, check_layers
from cl_bench.backbones.layers.memory_format import put_channels_innermost
from cl_bench.core.errors import require, require_fraction, require_positive

TOKENIZER_CHANNELS = 64
"""Of the convolutions before the last one, in the authors' code."""


class Block(nn.Module):
    """z = LN(x + MHSA(LN(x))), then z + MLP(z)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, attention_dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads=heads, attn_drop=attention_dropout)  # q, k, v without bias
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> the same shape."""
        z = self.norm2(x + self.drop_path(self.attention(self.norm1(x))))
        return z + self.drop_path(self.mlp(z))


class SequencePooling(nn.Module):
    """The mean over tokens, weighted by softmax(g(token))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, D)."""
        return (self.score(x).softmax(dim=1).transpose(1, 2) @ x).squeeze(1)


class CCT(SingleHead):
    """Tokenizer, blocks, sequence pooling and a linear head. CCT-7/3x1 is depth 7 and one convolution of 3 x 3.

    Args:
        dim, depth, heads: width of a token, number of blocks, attention heads per block.
        mlp_ratio: width of the MLPs relative to ``dim``.
        conv_layers: convolutions of the tokenizer; each halves the map.
        attention_dropout: of the attention maps.
        drop_path: stochastic depth of the last block; it grows linearly from 0.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        conv_layers: int,
        attention_dropout: float,
        drop_path: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        usual = "See configs/backbone/cct.yaml."
        require_positive(fix=usual, dim=dim, heads=heads, mlp_ratio=mlp_ratio, conv_layers=conv_layers)
        require_fraction(fix=usual, below_one=True, attention_dropout=attention_dropout, drop_path=drop_path)
        for key, layers in {"depth": depth, "conv_layers": conv_layers}.items():
            check_layers(key, layers)
        check_heads(dim, heads)
        channels, *sides = image_shape
        for _ in range(conv_layers):
            sides = [(side + 1) // 2 for side in sides]
        expected = f"fewer, so that {LEAST_SIDE} x {LEAST_SIDE} tokens or more are left of {image_shape[1:]} pixels"
        require(min(sides) >= LEAST_SIDE, "conv_layers", expected=expected, got=conv_layers, fix="1 or 2 are usual.")

        widths = [channels, *[TOKENIZER_CHANNELS] * (conv_layers - 1), dim]
        self.tokenizer = nn.Sequential(*(layer for pair in pairwise(widths) for layer in _build_conv_layers(*pair)))
        self.positions = nn.Parameter(trunc_normal_(torch.empty(1, sides[0] * sides[1], dim), std=0.2))
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, attention_dropout, rate) for rate in rates))
        self.norm, self.pooling = nn.LayerNorm(dim), SequencePooling(dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(_draw_weights)
        put_channels_innermost(self.tokenizer)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        tokens = self.tokenizer(x).flatten(2).transpose(1, 2) + self.positions
        return self.pooling(self.norm(self.blocks(tokens)))


def _build_conv_layers(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


def _draw_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
