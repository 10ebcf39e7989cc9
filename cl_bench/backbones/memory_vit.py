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

So y is the same as in the ViT alone, all tasks share one pass, and a new task changes nothing for the old ones.

Shapes: B images, N patches, n = N + 1, D token width, h heads, d = D / h, L layers, T tasks learned, m memory tokens
per layer and task, C_t classes of task t, K classes of the scenario.

Departures: y and c are computed separately, since no y attends to a c; the result is the same
(``tests/test_memory_vit.py``) and no gradient goes through y. The rest is in docs/methods/memory_vit.md.
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
from cl_bench.backbones.layers.vit import build_small_vit
from cl_bench.core.errors import ConfigError, require, require_nonnegative, void

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
    """A ViT that is frozen when the first task is added, and the tokens and heads of the tasks.

    The trunk is ``model`` with the weights of timm (``pretrained``) or of a file (``checkpoint``); its images are
    resized to the model's side (bicubic) and normalised as in its training. Otherwise it is an untrained ViT of the
    given sizes.

    Args:
        pretrained: download the weights of ``model``.
        checkpoint: file with the weights of ``model``, a state dict saved by torch or safetensors; None for no file.
        model: timm's name of a plain ViT.
        patch_size, dim, depth, heads, mlp_ratio: sizes of a trunk without weights.
        attention: ``extension`` (a task attends to earlier tasks' tokens) or ``concatenation`` (tasks are independent).
        memory: m, memory tokens per layer and task; 0 trains the class token and head only.
        class_token: if False, the heads have the trunk's own class token as input; needs ``memory`` = 0.
        image_mean, image_std: mean and standard deviation that normalised the images, one value per channel.
    """

    trunk: Any  # a VisionTransformer; timm's types of its parts are too general
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
        require_nonnegative(fix="The paper's default is 5.", memory=memory)
        expected, fix = "true with memory tokens: only class tokens attend to them", "Set memory=0 to train heads only."
        require(class_token or memory == 0, "class_token", expected=expected, got=class_token, fix=fix)
        expected, fix = "null with pretrained=true", "Choose one of them."
        require(not (pretrained and checkpoint), "checkpoint", expected=expected, got=checkpoint, fix=fix)
        self.attention, self.num_memory = attention, memory
        self.class_token, self.num_classes = class_token, num_classes
        self.source: str | None = None
        scale, shift = torch.ones(image_shape[0]), torch.zeros(image_shape[0])
        if pretrained or checkpoint:
            self.trunk = _get_trunk(model, checkpoint, channels=image_shape[0])
            self.source = f"weights of {model}" + (f" from the file {Path(checkpoint).name}" if checkpoint else "")
            mean, std = (torch.tensor(self.trunk.pretrained_cfg[key]) for key in ("mean", "std"))
            scale, shift = torch.tensor(image_std) / std, (torch.tensor(image_mean) - mean) / std
        else:
            self.trunk = build_small_vit(
                patch_size=patch_size,
                dim=dim,
                depth=depth,
                heads=heads,
                mlp_ratio=mlp_ratio,
                num_classes=0,
                image_shape=image_shape,
            )
        for name, values in {"scale": scale, "shift": shift}.items():
            self.register_buffer(name, values[:, None, None], persistent=False)
        self.register_buffer("mask", torch.zeros(0), persistent=False)
        self.dim: int = self.trunk.embed_dim
        self.memories, self.tokens = nn.ParameterList(), nn.ParameterList()  # (L, m, D) and (1, D) per task
        self.heads = nn.ModuleList()

    @property
    def sizes(self) -> list[int]:
        """Classes of each task learned."""
        return [cast(nn.Linear, head).out_features for head in self.heads]

    def add_task(self, num_classes: int) -> None:
        """Freeze everything, then add memory tokens, class token and head of a new task."""
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

    def train(self, mode: bool = True) -> "MemoryViT":
        """Set the mode of everything except a frozen trunk, which stays in evaluation mode."""
        super().train(mode)
        if len(self.heads):
            self.trunk.eval()
        return self

    def fit_images(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W'), resized (bicubic) and normalised for the trunk."""
        size = self.trunk.patch_embed.img_size
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bicubic")
        return x * self.scale + self.shift

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), the trunk's own class token after its final LayerNorm."""
        return self.trunk.forward_head(self.trunk.forward_features(self.fit_images(x)), pre_logits=True)

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
        y = trunk.patch_embed(self.fit_images(x))  # (B, N, D)
        y = torch.cat([trunk.cls_token.expand(len(y), -1, -1), y], dim=1) + trunk.pos_embed
        c = (torch.cat([*self.tokens]) + trunk.pos_embed[:, 0]).expand(len(y), -1, -1)  # (B, T, D), all at position 0
        memory = torch.cat([*self.memories], dim=1)  # (L, T m, D)
        for block, e in zip(trunk.blocks, memory):
            y, c = _apply_layer(block, y, c, e.expand(len(y), -1, -1), self.mask)
        return trunk.norm(c)

    def get_extra_state(self) -> list[int]:
        """Classes of each task learned."""
        return self.sizes

    def set_extra_state(self, state: list[int]) -> None:
        """Add the tasks of a saved state; their values are loaded afterwards."""
        for num_classes in state[len(self.heads) :]:
            self.add_task(num_classes)


def _apply_layer(block: Any, y: Tensor, c: Tensor, e: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One block: (B, n, D) inputs, (B, T, D) class tokens, (B, T m, D) memory -> inputs and class tokens after it."""
    tasks = c.shape[1]
    q, k, v = _project(block.attn, block.norm1(y))
    qc, kc, vc = _project(block.attn, block.norm1(torch.cat([c, e], dim=1)))
    own = F.scaled_dot_product_attention(q, k, v)
    read = F.scaled_dot_product_attention(
        qc[:, :, :tasks], torch.cat([k, kc], dim=2), torch.cat([v, vc], dim=2), attn_mask=mask
    )
    return _apply_mlp(block, y, own), _apply_mlp(block, c, read)


def _project(attention: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n, D) -> queries, keys, values, (B, h, n, d) each."""
    q, k, v = attention.qkv(z).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _apply_mlp(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Projection, residual, MLP, residual: (B, n, D), (B, h, n, d) -> (B, n, D)."""
    x = x + block.ls1(block.attn.proj(attended.transpose(1, 2).flatten(2)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _get_trunk(model: str, checkpoint: str | None, channels: int) -> VisionTransformer:
    """``model`` with the weights of a file, or without one with timm's; refuse another number of image channels."""
    trunk: Any = _download_trunk(model) if checkpoint is None else _load_trunk(model, checkpoint)
    require(
        trunk.in_chans == channels,
        "model",
        expected=f"a network for images of {channels} channels",
        got=model,
        fix="Set pretrained=false and checkpoint=null.",
    )
    return trunk


def _create_trunk(model: str, *, pretrained: bool) -> VisionTransformer:
    """timm's ``model`` without its classifier; refuse anything but a plain ViT."""
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


def _download_trunk(model: str) -> VisionTransformer:
    try:
        return _create_trunk(model, pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # no network, no such name, no weights: timm and its hub raise many kinds of errors
        raise ConfigError(
            "pretrained",
            expected=f"weights of {model} from timm",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="Download the weights file elsewhere and set backbone.checkpoint=PATH, "
            "or set backbone.pretrained=false for a trunk that is trained first (method.warm_up).",
        ) from error


def _load_trunk(model: str, checkpoint: str) -> VisionTransformer:
    trunk = _create_trunk(model, pretrained=False)
    try:
        state = timm.models.load_state_dict(checkpoint, weights_only=True)
        missing, surplus = trunk.load_state_dict(state, strict=False)
        problem = [*missing, *(name for name in surplus if not name.startswith("head."))]
    except Exception as error:  # no such file, not a state dict, other shapes: also many kinds
        problem = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
    require(
        not problem,
        "checkpoint",
        expected=f"a file with the weights of {model} (a state dict saved by torch or safetensors)",
        got=f"{checkpoint} ({', '.join(problem[:3])})",
        fix="Set backbone.model to the file's network, or take another file.",
    )
    return trunk
