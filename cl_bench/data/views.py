"""The second view of contrastive learning: resized crop, mirror image, colour jitter, grey; other draws for each image.

The recipe of SCR (Mai et al. 2021), which is that of supervised contrastive learning (Khosla et al. 2020). Shapes: B
images, C channels, H x W pixels in [0, 1]. The CPU draws; nothing waits for the device.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cl_bench.core.images import send

AREA = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)
"""Part of the image that is cropped, and its width divided by its height, uniform in the logarithm."""

BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
"""Largest changes: factors in [1 - v, 1 + v], and parts of the colour circle in [-v, v]."""

JITTER, GREY, MIRROR = 0.8, 0.2, 0.5
"""Probabilities."""

DRAWS = 11
"""Uniform numbers that an image needs."""


def draw_view(images: Tensor, generator: Generator) -> Tensor:
    """(B, C, H, W) float -> another random view of each image, of the same size.

    Departures from torchvision's operations: boxes have fractional corners and are cut to the image's size instead of
    drawn again; the colour operations come in one order.
    """
    return make_view(images, send(torch.rand(len(images), DRAWS, generator=generator), images.device))


def make_view(images: Tensor, uniform: Tensor) -> Tensor:
    """The views of images (B, C, H, W) that the numbers (B, DRAWS) in [0, 1) stand for."""
    u = uniform.T[:, :, None, None, None]  # (DRAWS, B, 1, 1, 1)
    views = _crop(images, *uniform.T[:5])
    jittered = _scale(views, u[5], BRIGHTNESS, torch.zeros_like(views))
    jittered = _scale(jittered, u[6], CONTRAST, _to_grey(jittered).mean(dim=(2, 3), keepdim=True))
    if images.shape[1] == 3:
        jittered = _scale(jittered, u[7], SATURATION, _to_grey(jittered))
        jittered = _turn_hue(jittered, (2 * u[8] - 1).squeeze(1) * HUE)
    views = torch.where(u[9] < JITTER, jittered, views)
    return torch.where(u[10] < GREY, _to_grey(views).expand_as(views), views)


def _crop(images: Tensor, area: Tensor, ratio: Tensor, down: Tensor, across: Tensor, mirror: Tensor) -> Tensor:
    """A box of each image in the image's size, bilinear; numbers (B,) in [0, 1)."""
    height, width = images.shape[2:]
    pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
    ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio)
    box_height, box_width = (pixels / ratio).sqrt().clamp(max=height), (pixels * ratio).sqrt().clamp(max=width)
    columns = torch.arange(width, device=images.device) + 0.5
    rows = torch.arange(height, device=images.device) + 0.5
    columns = torch.where(mirror[:, None] < MIRROR, width - columns, columns)
    x = ((width - box_width) * across)[:, None] + columns * (box_width / width)[:, None]  # (B, W) in the image
    y = ((height - box_height) * down)[:, None] + rows * (box_height / height)[:, None]  # (B, H)
    grid = torch.stack(
        [
            (2 * x / width - 1)[:, None, :].expand(-1, height, -1),
            (2 * y / height - 1)[:, :, None].expand(-1, -1, width),
        ],
        dim=3,
    )
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _scale(images: Tensor, uniform: Tensor, strength: float, origin: Tensor) -> Tensor:
    """Distances from ``origin`` times a factor in [1 - strength, 1 + strength]."""
    return (origin + (1 + strength * (2 * uniform - 1)) * (images - origin)).clamp(0, 1)


def _to_grey(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W), ITU-R 601 luma."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def _turn_hue(images: Tensor, part: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] with the hue turned by ``part`` (B, 1, 1) of the colour circle."""
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    k = (torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1) + (sixths + 6 * part)[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)
