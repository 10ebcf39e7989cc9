"""Vision Transformer with learnable memory (Sandler, Zhmoginov, Vladymyrov, Jackson, CVPR 2022, arXiv 2203.15243).

A frozen ViT, and for each task t a class token c_t, m memory tokens before every layer and a linear head. y^l are the
tokens after layer l; y^0 are the patches and the ViT's own class token, each with the embedding of its position; every
c_t has the embedding of position 0. A layer is

    [z; e]  = LN1( [ y^{l-1} ; c^{l-1} ; E^l ] )     one LayerNorm over input, class tokens and memory tokens
    a       = attention(Q of z, K and V of [z; e]), by the rules below; memory tokens are never queries
    [y^l; c^l] = u + MLP(LN2(u)),   u = [ y^{l-1} ; c^{l-1} ] + a         no residual for the memory tokens

and the logits of task t are W_t LN(c_t^L) + b_t.

Which query attends to which key (table 1):

    query \\ key       y     own c_t, E_t   earlier c_j, E_j        later c_j, E_j
    y                 yes   no             no                      no
    c_t               yes   yes            only with ``extension`` no

With ``reads`` = k < m, c_t attends in a layer only to the k rows of each E_j that match it best: those with the highest
sum over heads of q . k, q the query of c_t and k the key of the row. They are chosen for each image and each task j.

So y is the same as in the ViT alone, all tasks share one pass, and a new task changes nothing for the old ones.

Shapes: B images, N patches, n = N + 1, D token width, h heads, d = D / h, L layers, T tasks learned, m memory tokens
per layer and task, C_t classes of task t, K classes of the scenario.

Departures: y and c are computed separately, since no y attends to a c; the result is the same
(``tests/test_memory_vit.py``) and no gradient goes through y. The rest is in docs/methods/memory_vit.md.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_bench.backbones.layers.frozen_vit import FrozenViT, apply_mlp, declare_void_sizes, project
from cl_bench.core.errors import require, require_nonnegative

Mode = Literal["extension", "concatenation"]

STD = 0.02
"""Standard deviation of new memory tokens, class tokens and heads."""


def build_attention_rules(inputs: int, tasks: int, memory: int, mode: Mode) -> Tensor:
    """(n + T, n + T + T m) bool, True where a query attends to a key; columns: y, class tokens, each task's memory."""
    query, key = torch.arange(tasks)[:, None], torch.arange(tasks)
    reads = query >= key if mode == "extension" else query == key  # (T, T)
    own_tokens = torch.cat([torch.ones(tasks, inputs), reads, reads.repeat_interleave(memory, dim=1)], dim=1)
    trunk = torch.cat([torch.ones(inputs, inputs), torch.zeros(inputs, tasks * (1 + memory))], dim=1)
    return torch.cat([trunk, own_tokens]).bool()


@declare_void_sizes
class MemoryViT(FrozenViT):
    """A ViT that is frozen when the first task is added, and the tokens and heads of the tasks.

    Args:
        pretrained, checkpoint, model, patch_size, dim, depth, heads, mlp_ratio, image_mean, image_std: of the trunk,
            see :class:`~cl_bench.backbones.layers.frozen_vit.FrozenViT`.
        attention: ``extension`` (a task attends to earlier tasks' tokens) or ``concatenation`` (tasks are independent).
        memory: m, memory tokens per layer and task; 0 trains the class token and head only.
        class_token: if False, the heads have the trunk's own class token as input; needs ``memory`` = 0.
        reads: k, how many memory tokens of each task a class token attends to in a layer; None for all m.
    """

    mask: Tensor

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
        attention: Mode,
        memory: int,
        class_token: bool,
        reads: int | None,
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
        require_nonnegative(fix="The paper's default is 5.", memory=memory)
        expected, fix = "true with memory tokens: only class tokens attend to them", "Set memory=0 to train heads only."
        require(class_token or memory == 0, "class_token", expected=expected, got=class_token, fix=fix)
        expected = f"1 to memory={memory}, or null for all"
        require(reads is None or 0 < reads <= memory, "reads", expected=expected, got=reads, fix="Leave it out.")
        self.attention, self.num_memory, self.reads = attention, memory, memory if reads is None else reads
        self.class_token, self.num_classes = class_token, num_classes
        self.register_buffer("mask", torch.zeros(0), persistent=False)
        self.memories, self.tokens = nn.ParameterList(), nn.ParameterList()  # (L, m, D) and (1, D) per task
        self.heads = nn.ModuleList()

    @property
    def sizes(self) -> list[int]:
        """Classes of each task learned."""
        return [cast(nn.Linear, head).out_features for head in self.heads]

    def add_task(self, num_classes: int) -> None:
        """Freeze everything, then add memory tokens, class token and head of a new task."""
        self.freeze()
        self.requires_grad_(False)
        device = self.trunk.pos_embed.device
        head = nn.Linear(self.dim, num_classes, device=device)
        nn.init.normal_(head.weight, std=STD)
        nn.init.zeros_(head.bias)
        self.heads.append(head)
        if self.class_token:
            self.tokens.append(nn.Parameter(STD * torch.randn(1, self.dim, device=device)))
            size = (len(self.trunk.blocks), self.num_memory, self.dim)
            self.memories.append(nn.Parameter(STD * torch.randn(size, device=device)))
            positions = self.trunk.pos_embed.shape[1]
            rules = build_attention_rules(positions, len(self.tokens), self.num_memory, self.attention)
            self.mask = rules[positions:].to(device)  # without the rows of the trunk's own tokens
        self.train(self.training)

    def list_newest(self) -> list[nn.Parameter]:
        """The parameters of the newest task: L m D + D + (D + 1) C_t of them."""
        own = [self.memories[-1], self.tokens[-1]] if self.class_token else []
        return [p for p in (*own, *self.heads[-1].parameters()) if p.numel()]

    def thaw_tasks(self) -> list[nn.Parameter]:
        """The parameters of all tasks, which can be trained again until the next task is added."""
        found = [p for p in (*self.memories, *self.tokens, *self.heads.parameters()) if p.numel()]
        return [p.requires_grad_() for p in found]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits of all heads concatenated, -inf for classes of tasks not learned."""
        logits = [head(output) for head, output in zip(self.heads, self.compute_outputs(x).unbind(1))]
        missing = self.num_classes - sum(self.sizes)
        return torch.cat([*logits, x.new_full((len(x), missing), -torch.inf)], dim=1)

    def compute_newest_logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_T), logits of the newest task's head."""
        return self.heads[-1](self.compute_outputs(x)[:, -1])

    def compute_outputs(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D), the input of each task's head, in one pass."""
        if not len(self.tokens):
            return self.features(x)[:, None].expand(-1, len(self.heads), -1)
        trunk = self.trunk
        y = self.embed(x)
        c = (torch.cat([*self.tokens]) + trunk.pos_embed[:, 0]).expand(len(y), -1, -1)  # (B, T, D), all at position 0
        memory = torch.cat([*self.memories], dim=1)  # (L, T m, D)
        for block, e in zip(trunk.blocks, memory):
            y, c = _apply_layer(block, y, c, e.expand(len(y), -1, -1), self.mask, self.num_memory, self.reads)
        return trunk.norm(c)

    def get_extra_state(self) -> list[int]:
        """Classes of each task learned."""
        return self.sizes

    def set_extra_state(self, state: list[int]) -> None:
        """Add the tasks of a saved state; their values are loaded afterwards."""
        for num_classes in state[len(self.heads) :]:
            self.add_task(num_classes)


def _apply_layer(
    block: Any, y: Tensor, c: Tensor, e: Tensor, mask: Tensor, memory: int, reads: int
) -> tuple[Tensor, Tensor]:
    """One block: (B, n, D) inputs, (B, T, D) class tokens, (B, T m, D) memory -> inputs and class tokens after it."""
    tasks = c.shape[1]
    q, k, v = project(block.attn, block.norm1(y))
    qc, kc, vc = project(block.attn, block.norm1(torch.cat([c, e], dim=1)))
    own = F.scaled_dot_product_attention(q, k, v)
    qc = qc[:, :, :tasks]
    if reads < memory:
        picked = pick_reads(qc, kc[:, :, tasks:], memory, reads)
        mask = mask & torch.cat([picked.new_ones(*picked.shape[:3], mask.shape[1] - picked.shape[3]), picked], dim=3)
    read = F.scaled_dot_product_attention(qc, torch.cat([k, kc], dim=2), torch.cat([v, vc], dim=2), attn_mask=mask)
    return apply_mlp(block, y, own), apply_mlp(block, c, read)


def pick_reads(q: Tensor, k: Tensor, memory: int, reads: int) -> Tensor:
    """(B, h, T, d) queries, (B, h, T m, d) keys -> (B, 1, T, T m) bool, the ``reads`` best of each task's m keys."""
    match = torch.einsum("bhtd,bhsd->bts", q, k).unflatten(2, (-1, memory))  # (B, T, T, m)
    best = match.topk(reads, dim=3).indices
    return torch.zeros_like(match, dtype=torch.bool).scatter(3, best, True).flatten(2)[:, None]
