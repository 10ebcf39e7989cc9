"""Vision Transformer with learnable memory (Sandler, Zhmoginov, Vladymyrov, Jackson, CVPR 2022, arXiv 2203.15243).

A frozen ViT, and for each task t a class token c_t, m memory tokens in front of every layer and a linear head. With y^l
the tokens after layer l (y^0 = patches and the ViT's own class token, each with its position's embedding; every c_t has
position 0's), a layer is

    [z; e]  = LN1( [ y^{l-1} ; c^{l-1} ; E^l ] )     one LayerNorm over input, class tokens and memory
    a       = attention(Q of z, K and V of [z; e]), by the rules below; memory emits no query
    [y^l; c^l] = u + MLP(LN2(u)),   u = [ y^{l-1} ; c^{l-1} ] + a         the residual carries the input, no memory

Who reads what (table 1; rows are queries):

    query \\ key       y     own c_t, E_t   earlier c_j, E_j        later c_j, E_j
    y                 yes   no             no                      no
    c_t               yes   yes            only with ``extension`` no

So y is computed as in the ViT alone, all tasks share one pass, and a new task changes nothing for the old ones.

Shapes: B images, N patches, n = N + 1, D token width, h heads, d = D / h, L layers, T tasks learned, m memory tokens a
layer and task, C_t classes of task t, K classes of the scenario.

Departures: y and c are computed apart from each other, since no y reads a c; the result is the same
(``tests/test_memory_vit.py``) and no gradient passes through y. The rest is in docs/methods/memory_vit.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone
from cl_bench.backbones.layers.vit import small_vit
from cl_bench.core.errors import ConfigError, require, void

Mode = Literal["extension", "concatenation"]

STD = 0.02
"""Standard deviation of memory, class tokens and heads at their start."""


def attention_rules(inputs: int, tasks: int, memory: int, mode: Mode) -> Tensor:
    """(n + T, n + T + T m) bool, True where a query reads a key; columns are y, class tokens, memories task by task."""
    query, key = torch.arange(tasks)[:, None], torch.arange(tasks)
    reads = query >= key if mode == "extension" else query == key  # (T, T)
    own_tokens = torch.cat([torch.ones(tasks, inputs), reads, reads.repeat_interleave(memory, dim=1)], dim=1)
    trunk = torch.cat([torch.ones(inputs, inputs), torch.zeros(inputs, tasks * (1 + memory))], dim=1)
    return torch.cat([trunk, own_tokens]).bool()


def _has_weights(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments["pretrained"] or arguments["checkpoint"])


@void("model", when=lambda v: not _has_weights(v), why="backbone.pretrained and backbone.checkpoint choose no weights")
@void(
    "patch_size",
    "dim",
    "depth",
    "heads",
    "mlp_ratio",
    when=_has_weights,
    why="backbone.model has sizes of its own",
)
class MemoryViT(Backbone):
    """A ViT that is frozen as soon as the first task is added, and the tokens and heads of the tasks.

    The trunk is ``model`` with timm's weights (``pretrained``) or a file's (``checkpoint``), fed with images resized to
    the model's side (bicubic) and normalised as it was trained; or else a ViT of the given sizes, not trained yet.

    Args:
        pretrained: fetch the weights of ``model``.
        checkpoint: file with the weights of ``model``, as torch or safetensors save a state dict; None for no file.
        model: timm's name of a plain ViT.
        patch_size, dim, depth, heads, mlp_ratio: sizes of the trunk where there are no weights.
        attention: ``extension`` (a task reads earlier tasks' tokens) or ``concatenation`` (tasks are independent).
        memory: m, memory tokens a layer and task; 0 trains the class token and head only.
        class_token: False lets the heads read the trunk's own class token; needs ``memory`` = 0.
        image_mean, image_std: what the images were normalised with, a value a channel.
    """

    trunk: Any  # a VisionTransformer, whose parts timm types too loosely
    mask: Tensor
    scale: Tensor
    shift: Tensor

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
        num_classes: int,
        image_shape: tuple[int, int, int],
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        super().__init__()
        require(memory >= 0, "memory", expected="0 or more tokens", got=memory, fix="The paper's default is 5.")
        require(
            class_token or memory == 0,
            "class_token",
            expected="true where there is memory, which only class tokens read",
            got=class_token,
            fix="Set memory=0 to train heads only.",
        )
        require(
            not (pretrained and checkpoint),
            "checkpoint",
            expected="null beside pretrained=true",
            got=checkpoint,
            fix="Choose one of them.",
        )
        self.attention, self.num_memory, self.class_token = attention, memory, class_token
        self.num_classes = num_classes
        self.source: str | None = None
        channels = image_shape[0]
        scale, shift = torch.ones(channels), torch.zeros(channels)
        if pretrained or checkpoint:
            self.trunk = _pretrained(model) if checkpoint is None else _from_file(model, checkpoint)
            self.source = f"weights of {model}" + (f" from the file {Path(checkpoint).name}" if checkpoint else "")
            require(
                self.trunk.in_chans == channels,
                "model",
                expected=f"a network for images of {channels} channels",
                got=model,
                fix="Set pretrained=false and checkpoint=null.",
            )
            mean, std = (torch.tensor(self.trunk.pretrained_cfg[key]) for key in ("mean", "std"))
            scale, shift = torch.tensor(image_std) / std, (torch.tensor(image_mean) - mean) / std
        else:
            self.trunk = small_vit(
                patch_size=patch_size,
                dim=dim,
                depth=depth,
                heads=heads,
                mlp_ratio=mlp_ratio,
                num_classes=0,
                image_shape=image_shape,
            )
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.register_buffer("mask", torch.zeros(0), persistent=False)
        self.dim: int = self.trunk.embed_dim
        self.memories = nn.ParameterList()  # (L, m, D) a task
        self.tokens = nn.ParameterList()  # (1, D) a task
        self.heads = nn.ModuleList()

    @property
    def sizes(self) -> list[int]:
        """Classes of each task learned."""
        return [cast(nn.Linear, head).out_features for head in self.heads]

    def add_task(self, num_classes: int) -> None:
        """Freeze everything there is, then add memory, class token and head of a new task."""
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
            rules = attention_rules(positions, len(self.tokens), self.num_memory, self.attention)
            self.mask = rules[positions:].to(device)  # the trunk's rows are the trunk alone
        self.train(self.training)

    def newest(self) -> list[nn.Parameter]:
        """The parameters of the task added last: L m D + D + (D + 1) C_t of them."""
        own = [self.memories[-1], self.tokens[-1]] if self.class_token else []
        return [p for p in (*own, *self.heads[-1].parameters()) if p.numel()]

    def train(self, mode: bool = True) -> "MemoryViT":
        """Training mode never reaches the frozen trunk."""
        super().train(mode)
        if len(self.heads):
            self.trunk.eval()
        return self

    def fitted(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W'), resized (bicubic) and normalised as the trunk expects."""
        size = self.trunk.patch_embed.img_size
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic")
        return x * self.scale + self.shift

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), the trunk's own class token after its final LayerNorm."""
        return self.trunk.forward_head(self.trunk.forward_features(self.fitted(x)), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits of all heads side by side, -inf for classes of tasks not learned."""
        logits = [head(output) for head, output in zip(self.heads, self.outputs(x).unbind(1))]
        missing = self.num_classes - sum(self.sizes)
        return torch.cat([*logits, x.new_full((len(x), missing), -torch.inf)], dim=1)

    def newest_logits(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_T), the head of the task added last."""
        return self.heads[-1](self.outputs(x)[:, -1])

    def outputs(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D), what each task's head reads, in one pass."""
        if not len(self.tokens):
            return self.features(x)[:, None].expand(-1, len(self.heads), -1)
        trunk = self.trunk
        y = trunk.patch_embed(self.fitted(x))  # (B, N, D)
        y = torch.cat([trunk.cls_token.expand(len(y), -1, -1), y], dim=1) + trunk.pos_embed
        c = (torch.cat([*self.tokens]) + trunk.pos_embed[:, 0]).expand(len(y), -1, -1)  # (B, T, D), all at position 0
        memory = torch.cat([*self.memories], dim=1)  # (L, T m, D)
        for block, e in zip(trunk.blocks, memory):
            y, c = _layer(block, y, c, e.expand(len(y), -1, -1), self.mask)
        return trunk.norm(c)

    def get_extra_state(self) -> list[int]:
        """Classes of each task learned."""
        return self.sizes

    def set_extra_state(self, state: list[int]) -> None:
        """Grow to the tasks of a saved state; their values are loaded afterwards."""
        for num_classes in state[len(self.heads) :]:
            self.add_task(num_classes)


def _layer(block: Any, y: Tensor, c: Tensor, e: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One block: (B, n, D) inputs, (B, T, D) class tokens, (B, T m, D) memory -> inputs and class tokens after it."""
    tasks = c.shape[1]
    q, k, v = _project(block.attn, block.norm1(y))
    qc, kc, vc = _project(block.attn, block.norm1(torch.cat([c, e], dim=1)))
    own = F.scaled_dot_product_attention(q, k, v)
    read = F.scaled_dot_product_attention(
        qc[:, :, :tasks], torch.cat([k, kc], dim=2), torch.cat([v, vc], dim=2), attn_mask=mask
    )
    return _close(block, y, own), _close(block, c, read)


def _project(attention: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n, D) -> queries, keys, values, (B, h, n, d) each."""
    q, k, v = attention.qkv(z).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _close(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Projection, residual, MLP, residual: (B, n, D), (B, h, n, d) -> (B, n, D)."""
    x = x + block.ls1(block.attn.proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _created(model: str, *, pretrained: bool) -> VisionTransformer:
    """timm's ``model`` without its classifier, refused unless it is a plain ViT."""
    trunk: Any = timm.create_model(model, pretrained=pretrained, num_classes=0)
    plain = isinstance(trunk, VisionTransformer) and _is_plain(trunk)
    require(
        plain,
        "model",
        expected="a plain ViT with a class token at position 0 and no other extra token",
        got=model,
        fix="The paper's is vit_base_patch32_224.augreg_in21k.",
    )
    return trunk


def _is_plain(trunk: Any) -> bool:
    return (
        trunk.global_pool == "token"
        and trunk.num_prefix_tokens == 1
        and not trunk.no_embed_class
        and isinstance(trunk.norm_pre, nn.Identity)
        and isinstance(trunk.blocks[0].attn.q_norm, nn.Identity)
    )


def _pretrained(model: str) -> VisionTransformer:
    try:
        return _created(model, pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # no network, no such name, no weights: timm and its hub raise many kinds
        raise ConfigError(
            "pretrained",
            expected=f"weights of {model} from timm",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="Fetch the weights file elsewhere and set backbone.checkpoint=PATH, "
            "or set backbone.pretrained=false for a trunk that is trained first (method.warm_up).",
        ) from error


def _from_file(model: str, checkpoint: str) -> VisionTransformer:
    trunk = _created(model, pretrained=False)
    try:
        state = timm.models.load_state_dict(checkpoint, weights_only=True)
        missing, surplus = trunk.load_state_dict(state, strict=False)
        problem = [*missing, *(name for name in surplus if not name.startswith("head."))]
    except Exception as error:  # no such file, not a state dict, other shapes: as many kinds again
        problem = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    require(
        not problem,
        "checkpoint",
        expected=f"a file with the weights of {model} (a state dict saved by torch or safetensors)",
        got=f"{checkpoint} ({', '.join(problem[:3])})",
        fix="Set backbone.model to the file's network, or take another file.",
    )
    return trunk
