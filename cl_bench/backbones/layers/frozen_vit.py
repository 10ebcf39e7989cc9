"""A ViT that is frozen once it is trained: what memory tokens and prompts are added to.

Shapes: B images, n tokens, D token width, h heads, d = D / h.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cl_bench.backbones.base import Backbone
from cl_bench.backbones.layers.vit import build_small_vit
from cl_bench.core.errors import ConfigError, require, void

SMALL = "small"
"""The ``model`` whose sizes are those of the configuration."""

Built = TypeVar("Built", bound=Callable[..., Any])


def _has_weights(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments["pretrained"] or arguments["checkpoint"])


def declare_void_sizes(built: Built) -> Built:
    """Declare which of a network's keys choose no trunk beside its other keys."""
    why = "backbone.pretrained and backbone.checkpoint choose no weights"
    built = void("model", when=lambda v: not _has_weights(v), why=why)(built)
    sizes = ("patch_size", "dim", "depth", "heads", "mlp_ratio")
    has_own = "backbone.model has sizes of its own"
    return void(*sizes, when=lambda v: _has_weights(v) and v["model"] != SMALL, why=has_own)(built)


class FrozenViT(Backbone):
    """The trunk, its images and features; a method freezes it.

    ``source`` says where its weights come from, ``weights`` (:meth:`_describe_weights`) which they are. A trunk without
    weights has None for both.

    The trunk is ``model`` with the weights of timm (``pretrained``) or of a file (``checkpoint``); its images are
    resized to the model's side (bicubic) and normalised as in its training. ``model=small`` is a ViT of the given
    sizes; its file is one that ``trainer.keep_tasks`` of such a run writes. Without weights it is untrained.

    Args:
        pretrained: download the weights of ``model``.
        checkpoint: file with the weights of ``model``, a state dict saved by torch or safetensors; None for no file.
        model: timm's name of a plain ViT, or ``small``.
        patch_size, dim, depth, heads, mlp_ratio: sizes of a trunk without weights, or of ``small``.
        image_mean, image_std: mean and standard deviation that normalised the images, one value per channel.
    """

    trunk: Any  # a VisionTransformer; timm's types of its parts are too general
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
        image_shape: tuple[int, int, int],
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        super().__init__()
        expected, fix = "null with pretrained=true", "Choose one of them."
        require(not (pretrained and checkpoint), "checkpoint", expected=expected, got=checkpoint, fix=fix)
        expected, fix = "false with model=small, which has no weights to fetch", "Set checkpoint=PATH."
        require(not (pretrained and model == SMALL), "pretrained", expected=expected, got=pretrained, fix=fix)
        self.source: str | None = None
        self.weights: dict[str, Any] | None = None
        self.frozen = False
        scale, shift = torch.ones(image_shape[0]), torch.zeros(image_shape[0])
        pixels = {"mean": list(image_mean), "std": list(image_std)}
        if (pretrained or checkpoint) and model != SMALL:
            self.trunk = _get_trunk(model, checkpoint, channels=image_shape[0])
            pixels = {key: list(self.trunk.pretrained_cfg[key]) for key in pixels}
            mean, std = map(torch.tensor, pixels.values())
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
            if checkpoint:
                _load_file(self.trunk, model, checkpoint)
        if pretrained or checkpoint:
            self.source = f"weights of {model}" + (f" from the file {Path(checkpoint).name}" if checkpoint else "")
            self.weights = self._describe_weights(model, image_shape) | pixels
        for name, values in {"scale": scale, "shift": shift}.items():
            self.register_buffer(name, values[:, None, None], persistent=False)
        self.dim: int = self.trunk.embed_dim

    def _describe_weights(self, model: str, image_shape: tuple[int, int, int]) -> dict[str, Any]:
        """What tells rows apart that look alike: the weights' name and hash, and what is done to images.

        The hash is of the tensors, so a file and a download with the same weights have the same.
        """
        digest = hashlib.sha256()
        for name, tensor in self.trunk.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy())
        images = " x ".join(map(str, image_shape[1:]))
        if self.trunk.patch_embed.img_size != image_shape[1:]:
            images += " resized to {} x {} (bicubic)".format(*self.trunk.patch_embed.img_size)
        return {"model": model, "sha256": digest.hexdigest(), "images": f"{images}, not cropped in testing"}

    def freeze(self) -> None:
        """Train the trunk no more; it stays in evaluation mode."""
        self.frozen = True
        self.trunk.requires_grad_(False)
        self.trunk.eval()

    def train(self, mode: bool = True) -> "FrozenViT":
        """Set the mode of everything except a frozen trunk, which stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
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

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, n, D), the trunk's class token and the patches, with their positions added."""
        trunk = self.trunk
        y = trunk.patch_embed(self.fit_images(x))
        return torch.cat([trunk.cls_token.expand(len(y), -1, -1), y], dim=1) + trunk.pos_embed


def project(attention: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n, D) -> queries, keys, values, (B, h, n, d) each."""
    q, k, v = attention.qkv(z).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def apply_mlp(block: Any, x: Tensor, attended: Tensor) -> Tensor:
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
    _load_file(trunk, model, checkpoint)
    return trunk


def _load_file(trunk: VisionTransformer, model: str, checkpoint: str) -> None:
    """Load a file of timm's, or of a network of ours that has the trunk under this name; heads are left out."""
    try:
        state = timm.models.load_state_dict(checkpoint, weights_only=True)
        if model == SMALL:
            state = {name.removeprefix("trunk."): value for name, value in state.items() if name.startswith("trunk.")}
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
