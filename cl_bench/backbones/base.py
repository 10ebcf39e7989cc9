"""What a network is.

Shapes: B images, C channels, H x W pixels, D features, K classes of the scenario.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_bench.core.errors import require

MOST_LAYERS = 1000
"""The largest number of layers of one kind: building more takes minutes and then fails for lack of memory."""


LEAST_SIDE = 2
"""The smallest side of the last map of a network that pools or attends to it: one pixel or token is none."""


def check_layers(key: str, layers: int) -> None:
    """Refuse a number of layers that must be a mistake."""
    require(0 < layers <= MOST_LAYERS, key, expected=f"1 to {MOST_LAYERS} layers", got=layers, fix="2 to 24 are usual.")


def check_heads(dim: int, heads: int) -> None:
    """Refuse attention heads that do not divide the width of a token."""
    expected, fix = f"a divisor of dim = {dim}", "64 or 32 channels per head are usual."
    require(dim % heads == 0, "heads", expected=expected, got=heads, fix=fix)


def check_patches(patch_size: int, image_shape: tuple[int, int, int]) -> None:
    """Refuse patches that do not tile the images, or leave less than a map of :data:`LEAST_SIDE`."""
    _, height, width = image_shape
    require(
        height % patch_size == 0 and width % patch_size == 0 and min(height, width) >= LEAST_SIDE * patch_size,
        "patch_size",
        expected=f"a divisor of both sides of images of {height} x {width}, below them",
        got=patch_size,
        fix="4 suits 32 x 32 pixels, 2 suits 8 x 8.",
    )


class Backbone(nn.Module, ABC):
    """A network with one head over all K classes."""

    draws: bool = False
    """Whether a training pass draws random numbers other than those of ``nn.Dropout``."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), the input of the head."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits."""


class SingleHead(Backbone):
    """A network with one linear head on its features."""

    head: nn.Module
    """(B, D) -> (B, K)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) logits."""
        return self.head(self.features(x))


def turn_into_buffers(module: nn.Module) -> None:
    """Freeze a network: its weights become buffers of the same names, so that they are in its state but not trained."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


@torch.no_grad()
def check_single_images(net: Backbone, image_shape: tuple[int, ...], key: str) -> None:
    """Refuse to train a network on batches of one image if BatchNorm would get one value per channel.

    This happens if a map has shrunk to one pixel; torch cannot normalise a single value.

    Args:
        image_shape: (C, H, W).
        key: the setting that gives such batches.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    values: list[int] = []
    handles = [norm.register_forward_pre_hook(lambda _, x: values.append(x[0][:, 0].numel())) for norm in norms]
    training = net.training
    net.eval()(torch.zeros(1, *image_shape, device=next(net.parameters()).device))
    net.train(training)
    for handle in handles:
        handle.remove()
    require(
        min(values, default=2) > 1,
        key,
        expected=f"2 or more, since BatchNorm in this network normalises one pixel of each {image_shape[1]} x "
        f"{image_shape[2]} image, and cannot normalise a single value",
        got=1,
        fix="Raise it, or use larger images or a network without BatchNorm (backbone=mlp, vit).",
    )
