"""DETR: a transformer that answers with a set of boxes (Carion et al., ECCV 2020).

A CNN's last map, with a sine of each position (section 3.2 and supplement A.4 of the paper), goes through an encoder. N
object queries go through a decoder that attends to it. Two heads, shared by all decoder layers, give K + 1 classes (the
last is "no object") and a box. Encoder and decoder normalise after each sum; the decoder's content starts at 0.

``queries=plain``: the paper's. A query is a learned vector, added to queries and keys of self-attention and to the
queries of cross-attention.

``queries=anchors``: a query is a learned box; the boxes begin as a grid. Cross-attention adds the product of content
with content and that of position with position, the sine of the box's centre (Conditional DETR, Meng et al., ICCV
2021). Each layer corrects the box of the layer before it, without gradient between them (DAB-DETR, Liu et al., ICLR
2022; the box head begins at no correction).

Departures: docs/methods/detr.md.
"""

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.base import LEAST_SIDE, Backbone, check_heads, check_layers
from cl_bench.core.errors import require, require_fraction, require_positive

GROUPS = 8
"""Groups of the CNN's GroupNorm."""

TEMPERATURES = {"plain": 10000.0, "anchors": 20.0}
"""Of the sine: DETR's, and that of DAB-DETR's released code."""

ANCHOR_SIDE = 0.25
"""Width and height of the first boxes."""


class DETR(Backbone):
    """CNN, encoder, decoder and two heads.

    Args:
        channels: of the CNN's maps; each has half the side of the one before, and so has the last map of ``dim``.
        dim, heads, feedforward: width of a token, attention heads, width of the two-layer networks.
        encoder_layers, decoder_layers: how many.
        num_queries: N, the largest number of boxes of an image; a square for ``anchors``.
        queries: see the module.
        dropout: of attention weights and of what each layer adds.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        channels: list[int],
        dim: int,
        heads: int,
        feedforward: int,
        encoder_layers: int,
        decoder_layers: int,
        num_queries: int,
        queries: Literal["plain", "anchors"],
        dropout: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        usual = "See configs/backbone/detr.yaml and detr_shapes.yaml."
        require_positive(fix=usual, dim=dim, heads=heads, feedforward=feedforward, num_queries=num_queries)
        require_fraction(fix=usual, below_one=True, dropout=dropout)
        check_layers("encoder_layers", encoder_layers)
        check_layers("decoder_layers", decoder_layers)
        check_heads(dim, heads)
        side = math.isqrt(num_queries)
        require(
            queries == "plain" or side**2 == num_queries,
            "num_queries",
            expected="a square, since anchors begin as a grid",
            got=num_queries,
            fix="16 and 100 are squares.",
        )
        self.anchored = queries == "anchors"
        self.cnn, rows, columns = _build_cnn(image_shape, list(channels), dim)
        grid = torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns).flip(1)
        self.temperature = TEMPERATURES[queries]
        self.register_buffer("positions", embed_sine(grid, dim // 2, self.temperature), persistent=False)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, feedforward, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, heads, feedforward, dropout, apart=self.anchored) for _ in range(decoder_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.class_head, self.box_head = nn.Linear(dim, num_classes + 1), _build_mlp(dim, dim, dim, 4)
        if self.anchored:
            line = (torch.arange(side) + 0.5) / side
            boxes = F.pad(torch.cartesian_prod(line, line), (0, 2), value=ANCHOR_SIDE)
            self.query = nn.Parameter(torch.logit(boxes))
            self.query_position = _build_mlp(2 * dim, dim, dim)
            for parameter in self.box_head[-1].parameters():
                nn.init.zeros_(parameter)
        else:
            self.query = nn.Parameter(torch.randn(num_queries, dim))

    def detect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> class logits (L, B, N, K + 1) and boxes (L, B, N, 4) after each of L decoder layers."""
        contents, boxes = self._decode(x)
        return self.class_head(contents), boxes

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim), the mean of the queries' last contents."""
        return self._decode(x)[0][-1].mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K), for each class the largest logit of a query: whether the image shows the class."""
        return self.detect(x)[0][-1, :, :, :-1].amax(dim=1)

    def _decode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Contents (L, B, N, dim) and boxes (L, B, N, 4) after each decoder layer."""
        tokens = self.cnn(x).flatten(2).transpose(1, 2)
        for layer in self.encoder:
            tokens = layer(tokens, self.positions)
        query = self.query.expand(len(x), -1, -1)
        content = query.new_zeros(len(x), query.shape[1], tokens.shape[2])
        contents, boxes = [], []
        for layer in self.decoder:
            if self.anchored:
                anchor = query.sigmoid()
                half = tokens.shape[2] // 2
                where = embed_sine(anchor, half, self.temperature)
                content = layer(content, self.query_position(where), tokens, self.positions, where[..., : 2 * half])
            else:
                content = layer(content, query, tokens, self.positions, query)
            contents.append(self.norm(content))
            moved = self.box_head(contents[-1]) + (query if self.anchored else 0)
            boxes.append(moved.float().sigmoid())
            query = moved.detach() if self.anchored else query
        return torch.stack(contents), torch.stack(boxes)


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer network, each added and normalised."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.feedforward = _build_feedforward(dim, feedforward, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T, D) and their positions (T, D) -> (B, T, D)."""
        placed = x + positions
        x = self.norms[0](x + self.dropout(self.attention(placed, placed, x)))
        return self.norms[1](x + self.dropout(self.feedforward(x)))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the tokens, and a two-layer network.

    Args:
        apart: whether cross-attention compares positions apart from contents.
    """

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float, *, apart: bool) -> None:
        super().__init__()
        self.among, self.cross = Attention(dim, heads, dropout), Attention(dim, heads, dropout, apart=apart)
        self.feedforward = _build_feedforward(dim, feedforward, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout, self.apart = nn.Dropout(dropout), apart

    def forward(self, x: Tensor, place: Tensor, tokens: Tensor, positions: Tensor, where: Tensor) -> Tensor:
        """Contents (B, N, D) of the queries -> (B, N, D).

        Args:
            place: (B, N, D), positions of the queries for self-attention.
            tokens, positions: (B, T, D) and (T, D) of the encoder.
            where: (B, N, D), positions of the queries for cross-attention.
        """
        placed = x + place
        x = self.norms[0](x + self.dropout(self.among(placed, placed, x)))
        if self.apart:
            seen = self.cross(x, tokens, tokens, where, positions)
        else:
            seen = self.cross(x + where, tokens + positions, tokens)
        x = self.norms[1](x + self.dropout(seen))
        return self.norms[2](x + self.dropout(self.feedforward(x)))


class Attention(nn.Module):
    """Attention of several heads; with ``apart`` the scores are content with content plus position with position.

    The product of two sines falls with their distance. So each query begins by looking around its box; each head has a
    learned factor, 1 at first.
    """

    def __init__(self, dim: int, heads: int, dropout: float, *, apart: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        if apart:
            self.scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, where: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Queries (B, N, D), keys and values (B, T, D) -> (B, N, D); with ``apart`` positions (B, N, D) and (T, D)."""
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        nearness = None
        if where is not None and positions is not None:
            nearness = (self.scale * (where @ positions.T)[:, None]).to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=nearness, dropout_p=dropout)
        return self.out(seen.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def embed_sine(coordinates: Tensor, dim: int, temperature: float) -> Tensor:
    """(..., C) coordinates in [0, 1] -> (..., C * dim), the sines and cosines of each, one coordinate after the other.

    sin and cos of 2 pi p / temperature^(2i / dim), i = 0 ... dim / 2 - 1 (Vaswani et al. 2017, scaled to the image).
    """
    rates = temperature ** (torch.arange(0, dim, 2, device=coordinates.device) / dim)
    angles = 2 * math.pi * coordinates[..., None] / rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-3)


def _build_cnn(image_shape: tuple[int, int, int], channels: list[int], dim: int) -> tuple[nn.Module, int, int]:
    """Convolutions that halve the map's side at each width, and the rows and columns of the last map."""
    before, *side = image_shape
    layers: list[nn.Module] = []
    for stage, width in enumerate([*channels, dim]):
        require(
            width > 0 and width % GROUPS == 0,
            "channels" if stage < len(channels) else "dim",
            expected=f"multiples of {GROUPS}, the groups of GroupNorm",
            got=width,
            fix="See configs/backbone/detr_shapes.yaml.",
        )
        for stride in (2, 1) if stage else (2,):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.GroupNorm(GROUPS, width), nn.ReLU()]
            before = width
        side = [(pixels + 1) // 2 for pixels in side]
    require(
        min(side) >= LEAST_SIDE,
        "channels",
        expected=f"few enough maps that the last one is {LEAST_SIDE} x {LEAST_SIDE} or larger",
        got=f"{channels}, which leave {side[0]} x {side[1]} of {image_shape[1]} x {image_shape[2]} pixels",
        fix="Use fewer, or larger images.",
    )
    return nn.Sequential(*layers), side[0], side[1]


def _build_mlp(*widths: int) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _build_feedforward(dim: int, width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, dim))
