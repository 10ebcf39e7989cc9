"""Networks of convolutions and attention that timm has, with larger maps for small images.

EfficientViT (Liu et al., CVPR 2023: cascaded group attention), MobileViT (Mehta and Rastegari, ICLR 2022), MobileViTv2
(Mehta and Rastegari, 2022: separable self-attention), LeViT (Graham et al., ICCV 2021), CoaT and CoaT-Lite (Xu et al.,
ICCV 2021). They divide the side of an image by 32 or 64, so one token or less would be left of 32 x 32 pixels. Here
``stride`` says by how much they divide it. Layers are timm's, and so are their number, widths and first weights:

    EfficientViT, LeViT     the last of the four stride-2 convolutions of the stem get stride 1
    MobileViT v1, v2        the stem's convolution gets stride 1, then that of the first stage that has one, and so on
    CoaT                    the first patches are smaller, e.g. 2 x 2 instead of 4 x 4

Shapes: B images, C channels, D features, K classes.

Departures: the strides; the head is one linear layer on what timm gives its classifier (LeViT's and EfficientViT's
have a BatchNorm before it, LeViT's a second head for distillation).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import timm
from timm.models.coat import PatchEmbed
from torch import Tensor, nn

from cl_bench.backbones.base import LEAST_SIDE, SingleHead
from cl_bench.backbones.layers.memory_format import put_channels_innermost
from cl_bench.backbones.layers.timm import check_options, keep_no_biases, say
from cl_bench.core.errors import ConfigError, require


class Family(NamedTuple):
    """How the networks of a family are made finer.

    Attributes:
        stride: by how much timm's network divides the side of an image.
        least: the smallest stride that it can be given.
        sized: whether it is built for one size of images.
        refine: makes the strides of a network smaller: network, factor by which, side of the images.
    """

    stride: int
    least: int
    sized: bool
    refine: Callable[[Any, int, int], None]


def _list_strided(trunk: nn.Module) -> list[nn.Conv2d]:
    """The convolutions with a stride, from the image on."""
    return [layer for layer in trunk.modules() if isinstance(layer, nn.Conv2d) and layer.stride[0] > 1]


def _remove_strides(layers: list[nn.Conv2d], factor: int) -> None:
    """Give the first layers stride 1 that together have ``factor``."""
    for layer in layers[: factor.bit_length() - 1]:
        layer.stride = (1, 1)


def _refine_stem(trunk: nn.Module, factor: int, side: int) -> None:
    _remove_strides(_list_strided(trunk)[:4][::-1], factor)


def _refine_all(trunk: nn.Module, factor: int, side: int) -> None:
    _remove_strides(_list_strided(trunk), factor)


def _refine_patches(trunk: Any, factor: int, side: int) -> None:
    conv = trunk.patch_embed1.proj
    trunk.patch_embed1 = PatchEmbed(
        img_size=side,
        patch_size=conv.stride[0] // factor,
        in_chans=conv.in_channels,
        embed_dim=conv.out_channels,
        norm_layer=nn.LayerNorm,
    )


FAMILIES = {
    "efficientvit_m": Family(64, 4, True, _refine_stem),
    "levit_": Family(64, 4, True, _refine_stem),
    "mobilevit_": Family(32, 1, False, _refine_all),
    "mobilevitv2_": Family(32, 1, False, _refine_all),
    "coat_": Family(32, 8, True, _refine_patches),
}
"""By the beginning of timm's names."""

SMALL_STEM = "_s8"
"""The end of the names of LeViTs whose stem divides by 8 instead of 16; they are left out."""


class Hybrid(SingleHead):
    """A trunk of timm's with smaller strides, and a linear head.

    Args:
        name: as timm spells it, e.g. ``efficientvit_m0``.
        stride: side of the images over side of the last map, a power of 2; 8 leaves 4 x 4 of 32 x 32 pixels.
        options: arguments of timm's ``create_model``: numbers, true or false, and lists of them.
    """

    def __init__(
        self,
        *,
        name: str,
        stride: int,
        options: dict[str, Any],
        num_classes: int,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        family = _find_family(name)
        check_options(options)
        channels, height, width = image_shape
        _check_stride(stride, family, name, (height, width))
        factor = family.stride // stride
        size: dict[str, Any] = {"img_size": height * factor} if family.sized else {}
        try:
            trunk: Any = timm.create_model(name, num_classes=0, in_chans=channels, **size, **options)
        except Exception as error:  # an unknown option, lists of the wrong length, widths that heads do not divide
            expected, fix = f"arguments of {name}", "Leave options empty."
            raise ConfigError("options", expected=expected, got=say(error), fix=fix) from error
        family.refine(trunk, factor, height)
        keep_no_biases(trunk)
        put_channels_innermost(trunk)
        self.trunk, self.head = trunk, nn.Linear(trunk.num_features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D), what timm gives the classifier."""
        return self.trunk(x)


def _find_family(name: str) -> Family:
    known = [name for name in timm.list_models() if name.startswith(tuple(FAMILIES)) and not name.endswith(SMALL_STEM)]
    require(
        name in known,
        "name",
        expected=f"one of {', '.join(known)}",
        got=name,
        fix="backbone=timm takes any model of timm.",
    )
    return next(family for beginning, family in FAMILIES.items() if name.startswith(beginning))


def _check_stride(stride: int, family: Family, name: str, size: tuple[int, int]) -> None:
    possible = [2**i for i in range(family.stride.bit_length()) if 2**i >= family.least]
    require(
        stride in possible,
        "stride",
        expected=f"one of {', '.join(map(str, possible))} for {name}",
        got=stride,
        fix="8 or 16 suit 32 x 32 pixels.",
    )
    fits = size[0] == size[1] and size[0] % stride == 0 and size[0] >= LEAST_SIDE * stride
    require(
        fits,
        "stride",
        expected=f"a divisor of the sides of square images, of {size[0]} x {size[1]} here, that leaves a map of "
        f"{LEAST_SIDE} x {LEAST_SIDE} or more",
        got=stride,
        fix="4 suits 28 x 28 pixels, 8 or 16 suit 32 x 32; scenario.source.size=64 resizes pictures in folders.",
    )
