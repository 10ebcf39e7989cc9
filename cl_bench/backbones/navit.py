"""NaViT: a Vision Transformer for several images in one sequence (Dehghani et al., NeurIPS 2023, arXiv 2307.06304).

    t_ij = W_e patch_ij + b_e + r_i + c_j                    factorised positions: one table of rows, one of columns
    s    = [tokens of image 1, tokens of image 2, ..., padding]                                          a sequence
    A    = softmax( RMS(W_q u) RMS(W_k u)^T / sqrt(d) + M ),  u = LN(s),  M = 0 if both tokens are of one image,
           else -inf                                                                             block-diagonal mask
    s   <- s + W_o A W_v u;   s <- s + MLP(LN(s))                                                    one of the blocks
    y_b  = W_o' softmax( RMS(W_q' p) RMS(W_k' v)^T / sqrt(d) over the tokens of image b ) W_v' v,   v = LN(s)
    f_b  = y_b + MLP(LN(y_b))                                            masked attention pooling by a learned query p

RMS scales each head's vector to root mean square 1, times a learned gain (query-key normalisation); W_q, W_k, W_v and
the LayerNorms have no bias. The head is linear on f_b. f_b does not depend on the other images of sequence and batch.

In training, a share of the images of each batch is processed at lower resolutions (NaViT samples a resolution for each
image), and a part of each image's tokens is dropped. Smaller images have fewer tokens, so more of them fit into a
sequence. In evaluation every image has its own resolution and all its tokens.

Which images and tokens is drawn by torch's generator of the images' device, as dropout is, so that the draws are part
of a checkpoint and of a captured step. How many is fixed by the size of the batch, so all shapes are known on the host:
the layout of the sequences is made once for each size, and no step waits for the device.

Shapes: B images, n tokens of an image, D = dim, h heads, d = D / h, R sequences of S tokens, at most m images in each.

Departures: images of a data set have one size, so the lower resolutions are scales of it, with its aspect ratio; the
paper draws a new side for each image. The part of dropped tokens is one number; the paper also draws it for each image,
or lets it depend on the resolution. A batch is packed as a whole, so that no image is left for the next one.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn

from cl_bench.backbones.base import SingleHead, check_heads, check_layers, check_patches
from cl_bench.core.errors import require, require_fraction, require_positive, void


@dataclass(frozen=True)
class Layout:
    """Which token and which image is where in the sequences of a batch.

    Attributes:
        source: (R, S) the token in each place, as a position among all tokens; their number for padding.
        owner: (R, S) the image of the token in each place; -1 for padding.
        images: (R, m) the images of each sequence; -1 where there is none.
        place: (B,) where each image is in ``images``, flattened.
    """

    source: Tensor
    owner: Tensor
    images: Tensor
    place: Tensor

    def mask_attention(self) -> Tensor:
        """(R, 1, S, S) whether two tokens are of one image. Padding is an image of its own: a softmax needs a token."""
        return (self.owner[:, :, None] == self.owner[:, None, :]).unsqueeze(1)

    def mask_pooling(self) -> Tensor:
        """(R, 1, m, S) whether a token is of an image; where there is no image, every token, as a softmax needs one."""
        own = self.images[:, :, None] == self.owner[:, None, :]
        return (own | (self.images == -1)[:, :, None]).unsqueeze(1)


def lay_out(sizes: Sequence[int], length: int, device: torch.device) -> Layout:
    """Put each image into the first sequence that has room for its tokens.

    Args:
        sizes: tokens of each image, the largest first.
        length: tokens of a sequence, at least those of an image; sequences are cut to the longest.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    first = 0  # sequences before it have no room for an image of this size
    for image, size in enumerate(sizes):
        if image and size != sizes[image - 1]:
            first = 0
        while first < len(rows) and room[first] < size:
            first += 1
        if first == len(rows):
            rows.append([])
            room.append(length)
        rows[first].append(image)
        room[first] -= size
    width, most = length - min(room), max(map(len, rows))
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + size)
    source, owner, images = [], [], []
    place = [0] * len(sizes)
    for r, row in enumerate(rows):
        padding = [-1] * (width - sum(sizes[i] for i in row))
        owner.append([i for i in row for _ in range(sizes[i])] + padding)
        source.append([t for i in row for t in range(begins[i], begins[i + 1])] + [begins[-1]] * len(padding))
        images.append(row + [-1] * (most - len(row)))
        for slot, i in enumerate(row):
            place[i] = r * most + slot
    return Layout(*(torch.tensor(table, device=device) for table in (source, owner, images, place)))


_look_up_layout = functools.cache(lay_out)  # never emptied: a captured step has the addresses of its layout


class Attention(nn.Module):
    """Attention with query-key normalisation from some tokens to others, where a mask allows it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """(R, m, D) queries, (R, S, D), (R, 1, m, S) bool -> (R, m, D)."""
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (R, h, ., d)
            for layer, tokens in ((self.q, x), (self.k, context), (self.v, context))
        )
        q, k = (norm(t.to(norm.weight.dtype)).to(v.dtype) for norm, t in ((self.norm_q, q), (self.norm_k, k)))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block: attention and MLP with residuals."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.attention = Attention(dim, heads)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(R, S, D), (R, 1, S, S) bool -> (R, S, D)."""
        u = self.norm1(x)
        x = x + self.attention(u, u, mask)
        return x + self.mlp(self.norm2(x))


class AttentionPooling(nn.Module):
    """One vector for each image of a sequence: a learned query attends to the tokens of the image."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = Attention(dim, heads)
        self.norm = nn.LayerNorm(dim, bias=False)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(R, S, D), (R, 1, m, S) bool -> (R, m, D)."""
        y = self.attention(self.query.expand(len(x), mask.shape[2], -1), x, mask)
        return y + self.mlp(self.norm(y))


@void("low_scales", when=lambda v: v["low_share"] == 0, why="backbone.low_share=0 lowers no resolution")
class NaViT(SingleHead):
    """Packed Vision Transformer and a linear head; no dropout of activations.

    Args:
        patch_size: side of a patch in pixels; must divide the images' sides.
        dim, depth, heads: width of a token, number of blocks, attention heads per block.
        mlp_ratio: width of the MLPs relative to ``dim``.
        images_per_sequence: a sequence has room for this number of images of full resolution.
        low_share: part of the images of a training batch that is processed at a lower resolution, rounded to whole
            images.
        low_scales: the lower resolutions, as parts of the images' sides; rounded to whole patches, at least two. Each
            has an equal share.
        token_drop: part of each image's tokens that is dropped in training.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        images_per_sequence: int,
        low_share: float,
        low_scales: list[float],
        token_drop: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        usual = "See configs/backbone/navit.yaml."
        require_positive(fix=usual, patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        require_positive(fix="2 is usual.", images_per_sequence=images_per_sequence)
        require_fraction(fix="0 lowers no resolution.", low_share=low_share)
        require_fraction(fix="0 drops no token.", below_one=True, token_drop=token_drop)
        check_layers("depth", depth)
        check_patches(patch_size, image_shape)
        check_heads(dim, heads)
        channels, height, width = image_shape
        self.patch_size, self.images_per_sequence, self.token_drop = patch_size, images_per_sequence, token_drop
        self.low_share = low_share
        grid = height // patch_size, width // patch_size
        self.low_grids = _list_low_grids(low_scales, grid) if low_share else []
        self.draws = low_share > 0 or token_drop > 0
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.rows = nn.Parameter(torch.zeros(grid[0], dim))
        self.columns = nn.Parameter(torch.zeros(grid[1], dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, bias=False)
        self.pool = AttentionPooling(dim, heads, mlp_ratio)
        self.head = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for parameter in (self.rows, self.columns, self.pool.query):
            trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), the pooled vector of each image."""
        order, groups = self._choose_resolutions(x)
        tokens = [self._drop(self._embed(images)) for images in groups]  # (b, n, D), fewer and fewer tokens
        sizes = tuple(t.shape[1] for t in tokens for _ in range(len(t)))
        # Under vmap, methods pass one image. What torch.func makes there must not be kept.
        look_up = lay_out if len(x) == 1 else _look_up_layout
        layout = look_up(sizes, self.images_per_sequence * sizes[0], x.device)
        flat = torch.cat([t.flatten(0, 1) for t in tokens])
        flat = F.pad(flat, (0, 0, 0, 1))  # the padding, a token of zeros
        packed = flat.index_select(0, layout.source.flatten()).unflatten(0, layout.source.shape)
        mask = layout.mask_attention()
        for block in self.blocks:
            packed = block(packed, mask)
        pooled = self.pool(self.norm(packed), layout.mask_pooling()).flatten(0, 1)
        found = pooled.index_select(0, layout.place)
        return found if order is None else found.index_select(0, order.argsort())

    def _choose_resolutions(self, x: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Images (B, C, H, W) -> a random order of them, and in this order the images of each resolution.

        The order is None if all have their own resolution.
        """
        low = round(self.low_share * len(x)) if self.training else 0
        if low == 0:
            return None, [x]
        order = torch.rand(len(x), device=x.device).argsort()
        ends = [low * i // len(self.low_grids) for i in range(len(self.low_grids) + 1)]
        counts = [len(x) - low, *(end - begin for begin, end in itertools.pairwise(ends))]
        full, *lower = x.index_select(0, order).split(counts)
        groups = [full] + [
            F.interpolate(images, [side * self.patch_size for side in grid], mode="bilinear", antialias=True)
            for images, grid in zip(lower, self.low_grids)
            if len(images)
        ]
        return order, groups if len(full) else groups[1:]

    def _embed(self, images: Tensor) -> Tensor:
        """(b, C, H', W') -> (b, n, D)."""
        grid = self.patches(images).movedim(1, 3)  # (b, H' / patch_size, W' / patch_size, D)
        return (grid + self.rows[: grid.shape[1], None] + self.columns[: grid.shape[2]]).flatten(1, 2)

    def _drop(self, tokens: Tensor) -> Tensor:
        """(b, n, D) -> the tokens that are kept, others for each image; all of them in evaluation."""
        count = tokens.shape[1]
        kept = max(1, round((1 - self.token_drop) * count))
        if not self.training or kept == count:
            return tokens
        which = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)[:, :kept]
        return tokens.gather(1, which[:, :, None].expand(-1, -1, tokens.shape[2]))


def _list_low_grids(scales: list[float], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of patches of each lower resolution, the largest first."""
    require(
        len(scales) > 0 and all(0 < scale < 1 for scale in scales),
        "low_scales",
        expected="one or more numbers between 0 and 1",
        got=list(scales),
        fix="[0.5] is half the side, a quarter of the tokens.",
    )
    rounded = [tuple(max(2, round(scale * side)) for side in grid) for scale in sorted(scales, reverse=True)]
    return [(rows, columns) for rows, columns in rounded]
