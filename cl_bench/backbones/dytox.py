"""Network of DyTox (Douillard, Rame, Couairon, Cord, CVPR 2022): a ConViT encoder, and a decoder with task tokens.

    x_0 = patches of the image + learned positions;  x_l = SAB_l(x_{l-1})                   the encoder, once per image
    e_i = TAB(theta_i, x_L),  i = 1..t                                                      the decoder, once per task
    logits = concatenation over i of Linear_i(LayerNorm_i(e_i))

SAB is ConViT's block with gated positional self-attention (d'Ascoli et al. 2021), as in timm: with gate g_h, s =
sigmoid and the offset (dx, dy) between two patches, the attention of a head, whose rows are scaled to sum 1, is

    A = (1 - s(g_h)) softmax(q k^T / sqrt(d)) + s(g_h) softmax(v_h . [dx, dy, dx^2 + dy^2])

All tasks share TAB; each task adds a token theta_i (D), a LayerNorm and a Linear.

Shapes: B images, n patches, D = dim, h heads, t tasks so far, C classes so far, K classes of the scenario.

Departures: none in the network. The release can also pass all tokens at once with masks; its authors do not use that,
and it is not implemented here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models.convit import GPSA, Block
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone, check_layers
from cl_bench.core.errors import require, require_fraction, require_positive


class TaskAttention(nn.Module):
    """TAB: a task token attends to the patches and itself, z = [theta; x], u = LN(z).

    q = W_q u_theta, k = W_k u, v = W_v u;  c = theta + W_o softmax(q k^T / sqrt(D / h)) v;  e = c + MLP(LN(c)).
    Only the token is updated, so the cost is linear in the number of patches. LN, W_k and W_v act on each row of z
    separately, so keys and values of the patches are computed once for all tokens (:meth:`project_patches`).
    """

    def __init__(self, *, dim: int, heads: int, mlp_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def project_patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, n, D) -> their keys and values, (B, h, n, D / h) each."""
        u = self.norm1(x)
        return self._split_heads(self.k(u)), self._split_heads(self.v(u))

    def forward(self, token: Tensor, patches: tuple[Tensor, Tensor]) -> Tensor:
        """Token (1, 1, D), keys and values of the patches -> (B, D)."""
        keys, values = patches
        batch = len(keys)
        u = self.norm1(token)
        q, k, v = (self._split_heads(layer(u)).expand(batch, -1, -1, -1) for layer in (self.q, self.k, self.v))
        k, v = torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)  # (B, h, n + 1, D / h)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 1, -1)
        token = token.expand(batch, 1, -1)
        c = token + self.drop_path(self.out(attended))
        return (c + self.drop_path(self.mlp(self.norm2(c))))[:, 0]

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, n, D) -> (B, h, n, D / h)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Classifier(nn.Sequential):
    """LayerNorm and Linear with their default initialisation: (B, width) -> (B, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, classes))


class DyTox(Backbone):
    """Patch embedding, SABs, one TAB; a token and a classifier for every task.

    A new network has one task with all K classes (the paper's "joint" transformer, 10.723 M parameters on CIFAR-100),
    so any method can train it; :mod:`cl_bench.methods.dytox` removes that task and adds tasks one by one.

    Args:
        patch_size: side of a patch in pixels.
        dim: D.
        depth: SABs before the TAB.
        heads: h, of every block.
        mlp_ratio: width of the MLPs relative to D.
        locality_strength: initial locality strength of the positional attention.
        drop_path: probability of skipping the TAB's residual branches for an image in training; it rises linearly from
            0 over the blocks before.
        task_tokens: ablation switch of the token expansion; without it all tasks share the first one's token.
        independent_classifiers: ablation switch; without it one classifier has all embeddings as input, and each task
            starts with a new one.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: int,
        locality_strength: float,
        drop_path: float,
        task_tokens: bool,
        independent_classifiers: bool,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        usual = "See configs/backbone/dytox.yaml."
        require_positive(fix=usual, patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        check_layers("depth", depth)
        require(dim % heads == 0, "dim", expected=f"a multiple of {heads} heads", got=dim, fix=f"Try {heads * 32}.")
        require_fraction(fix="The paper's code has 0.1.", below_one=True, drop_path=drop_path)
        channels, height, width = image_shape
        require(
            height == width and height % patch_size == 0,
            "patch_size",
            expected=f"a divisor of the side of square images, here {height} x {width}",
            got=patch_size,
            fix="The paper has 4 for 32 x 32 pixels.",
        )
        self.num_classes, self.dim = num_classes, dim
        self.task_tokens, self.independent_classifiers = task_tokens, independent_classifiers
        drops = torch.linspace(0, drop_path, depth + 1).tolist()
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(1, (height // patch_size) ** 2, dim))
        self.sabs = nn.Sequential(
            *(
                Block(
                    dim, heads, mlp_ratio, drop_path=drop, norm_layer=nn.LayerNorm, locality_strength=locality_strength
                )
                for drop in drops[:-1]
            )
        )
        self.tab = TaskAttention(dim=dim, heads=heads, mlp_ratio=mlp_ratio, drop_path=drops[-1])
        self._initialise()
        self.sizes: list[int] = []  # classes of each task
        self.tokens = nn.ParameterList()
        self.classifiers = nn.ModuleList()
        self.grow(num_classes)

    def _initialise(self) -> None:
        trunc_normal_(self.positions, std=0.02)
        gated: list[GPSA] = []
        for module in (*self.sabs.modules(), *self.tab.modules()):
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, GPSA):
                gated.append(module)
        for attention in gated:
            attention.local_init()  # heads attend to neighbouring patches, values start as the identity

    def grow(self, classes: int) -> None:
        """Add a task: a new random token, not a copy, and a classifier of its own."""
        self.sizes.append(classes)
        device = self.positions.device
        if self.task_tokens or not self.tokens:
            self.tokens.append(nn.Parameter(trunc_normal_(torch.zeros(1, 1, self.dim), std=0.02).to(device)))
        if self.independent_classifiers:
            self.classifiers.append(Classifier(self.dim, classes).to(device))
        else:
            together = Classifier(self.dim * len(self.tokens), sum(self.sizes))
            self.classifiers = nn.ModuleList([together.to(device)])

    def clear(self) -> None:
        """Remove all tasks."""
        self.sizes, self.tokens, self.classifiers = [], nn.ParameterList(), nn.ModuleList()

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, n, D): the patches after the SABs."""
        return self.sabs(self.patches(x).flatten(2).transpose(1, 2) + self.positions)

    def compute_embeddings(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> e_1..e_t, (B, D) each: one pass of the encoder, and one of the TAB per token."""
        patches = self.tab.project_patches(self.encode(x))
        return [self.tab(token, patches) for token in self.tokens]

    def classify(self, embeddings: list[Tensor]) -> Tensor:
        """e_1..e_t -> (B, C): the input of classifier i is e_i, or one classifier has all of them as input."""
        if not self.independent_classifiers:
            return self.classifiers[0](torch.cat(embeddings, dim=1))
        read = embeddings if self.task_tokens else embeddings * len(self.sizes)
        return torch.cat([classifier(e) for classifier, e in zip(self.classifiers, read)], dim=1)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, t D), the embeddings of all tasks concatenated."""
        return torch.cat(self.compute_embeddings(x), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K), -inf for classes without a classifier yet."""
        if not self.sizes:
            return x.new_full((len(x), self.num_classes), -torch.inf)
        return F.pad(
            self.classify(self.compute_embeddings(x)), (0, self.num_classes - sum(self.sizes)), value=-torch.inf
        )

    def list_encoder_parameters(self) -> list[nn.Parameter]:
        """Patch embedding, positions and SABs."""
        return [self.positions, *self.patches.parameters(), *self.sabs.parameters()]

    def list_old_parameters(self) -> list[nn.Parameter]:
        """Tokens and classifiers of all tasks except the newest, without those shared in an ablation."""
        return [*list(self.tokens)[:-1], *(p for old in self.classifiers[:-1] for p in old.parameters())]

    def get_extra_state(self) -> dict[str, Any]:
        """Classes of each task, which determine the shapes."""
        return {"sizes": list(self.sizes)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Grow to the shapes of a saved network; if it has them already, parameters stay the same objects."""
        if state["sizes"] != self.sizes:
            self.clear()
            for classes in state["sizes"]:
                self.grow(classes)
