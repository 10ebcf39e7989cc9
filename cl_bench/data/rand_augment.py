"""RandAugment in batches (Cubuk, Zoph, Shlens, Le, 2020), the variant of timm's ``rand-m9-mstd0.5-inc1``.

Every image gets its own two operations, drawn with replacement from fifteen. Each is applied with probability 1/2, at
its own magnitude, N(m, s^2) clipped to [0, 10]. "inc1" means that operations distort more as the magnitude grows. The
images with the same operation are changed together, on the device. The CPU draws, so nothing waits for the device.

Shapes: b images that drew an operation, C = 1 or 3 channels, H x W pixels; images are uint8. An argument is what the
magnitude means for an operation: degrees, pixels, a threshold, (b, 1, 1, 1) float32.

The operations are PIL's, as timm calls them with bicubic interpolation; where PIL uses integers, they do too.
Departures from timm, tested in tests/test_rand_augment.py:

- autocontrast divides integers exactly, PIL multiplies by a rounded quotient: at most one grey level of difference, and
  only if the quotient is an integer;
- bicubic interpolation uses float32 instead of float64: at most one grey level of difference, and a pixel on the edge
  of the image, within rounding, may count as outside;
- posterize to 0 bits gives a black image, as in the PIL of the method's published results; PIL refuses it now.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from cl_bench.core.errors import ConfigError
from cl_bench.core.images import send

OPERATIONS_PER_IMAGE = 2
PROBABILITY = 0.5
HIGHEST = 10.0
"""timm's defaults: n, p, and the largest magnitude."""

Argument = Callable[[Tensor, Tensor, int], Tensor]
"""Magnitudes (b,) in [0, 10], signs (b,) of -1 or 1, the image's side in pixels -> (b,) arguments, in float64."""


@dataclass(frozen=True)
class Operation:
    """One of the fifteen operations.

    Attributes:
        name: in timm.
        argument: magnitude -> argument.
        apply: images (b, C, H, W), arguments (b, 1, 1, 1), fill (C) -> (b, C, H, W).
    """

    name: str
    argument: Argument
    apply: Callable[[Tensor, Tensor, list[int]], Tensor]


class RandAugment:
    """Applies two random operations to each image.

    Args:
        magnitude, deviation: m and s of the magnitude's N(m, s^2).
        fill: (C) grey levels of pixels that a shear, shift or rotation brings into the image.
    """

    def __init__(self, *, magnitude: float, deviation: float, fill: list[int]) -> None:
        self.magnitude, self.deviation, self.fill = magnitude, deviation, fill

    @classmethod
    def parse(cls, policy: str, fill: list[int]) -> "RandAugment":
        """The RandAugment that timm's string ``rand-m{M}-mstd{S}-inc1`` describes."""
        match = re.fullmatch(r"rand-m(\d+)-mstd(\d+(?:\.\d+)?)-inc1", policy)
        if match is None or len(fill) not in (1, 3):
            raise ConfigError(
                "rand_augment",
                expected="null, or rand-m{M}-mstd{S}-inc1 with numbers M and S, for images of 1 or 3 channels",
                got=f"{policy}, for images of {len(fill)} channels",
                fix="DeiT and DyTox use rand-m9-mstd0.5-inc1.",
            )
        return cls(magnitude=float(match[1]), deviation=float(match[2]), fill=fill)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """(B, C, H, W) uint8 -> the same shape, augmented; ``generator`` is on the CPU."""
        images = images.clone()
        for _ in range(OPERATIONS_PER_IMAGE):
            chosen, magnitude, sign = self.draw(len(images), generator)
            positions = [torch.nonzero(chosen == number).flatten() for number in range(len(OPERATIONS))]
            arguments = [
                operation.argument(magnitude[which], sign[which], images.shape[-1]).float()
                for operation, which in zip(OPERATIONS, positions)
            ]
            sizes = [len(which) for which in positions]
            on_device = (send(torch.cat(parts), images.device).split(sizes) for parts in (positions, arguments))
            for operation, which, argument in zip(OPERATIONS, *on_device):
                if len(which):
                    images[which] = operation.apply(images[which], argument.view(-1, 1, 1, 1), self.fill)
        return images

    def draw(self, size: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For ``size`` images: (size,) operation, -1 for none, (size,) magnitude, (size,) sign; all on the CPU."""
        chosen = torch.randint(len(OPERATIONS), (size,), generator=generator)
        applied = torch.rand(size, generator=generator) < PROBABILITY
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        magnitude = (self.magnitude + self.deviation * noise).clamp(0.0, HIGHEST)
        sign = 2.0 * torch.randint(2, (size,), generator=generator) - 1.0
        return torch.where(applied, chosen, -1), magnitude, sign


# -- magnitude -> argument ---------------------------------------------------------------------------------------------


def _to_zero(magnitude: Tensor, sign: Tensor, side: int) -> Tensor:
    return torch.zeros_like(magnitude)


def _to_signed(strongest: float) -> Argument:
    """From 0 to plus or minus ``strongest``."""
    return lambda magnitude, sign, side: sign * (magnitude / HIGHEST * strongest)


def _to_pixels(magnitude: Tensor, sign: Tensor, side: int) -> Tensor:
    """Pixels, up to 45 % of the side."""
    return sign * (magnitude / HIGHEST * 0.45) * side


def _to_bits(magnitude: Tensor, sign: Tensor, side: int) -> Tensor:
    """Leading bits that are kept, 4 to 0."""
    return 4 - (magnitude / HIGHEST * 4).floor()


def _to_threshold(magnitude: Tensor, sign: Tensor, side: int) -> Tensor:
    """Smallest grey level that is inverted, 256 to 0."""
    return 256 - (magnitude / HIGHEST * 256).floor().clamp(max=256)


def _to_addend(magnitude: Tensor, sign: Tensor, side: int) -> Tensor:
    """Grey levels added to dark pixels, 0 to 110."""
    return (magnitude / HIGHEST * 110).floor().clamp(max=128)


def _to_factor(magnitude: Tensor, sign: Tensor, side: int) -> Tensor:
    """Factor on the difference from the degenerate image, 1 to 0.1 or 1.9."""
    return (1.0 + sign * (magnitude / HIGHEST * 0.9)).clamp(min=0.1)


# -- grey levels through a table of each image and channel -----------------------------------------------------------


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Images (b, C, H, W) and tables (b, C, 256) -> table[image]."""
    return table.gather(2, images.flatten(2).long()).view(images.shape).to(torch.uint8)


def _count_levels(images: Tensor) -> Tensor:
    """(b, C, H, W) -> (b, C, 256) pixels of each grey level, int64."""
    levels = images.flatten(2).long()
    counts = torch.zeros((*levels.shape[:2], 256), dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, levels, torch.ones_like(levels))


def _stretch_contrast(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    """Stretch each channel to 0..255."""
    low, high = images.amin(dim=(2, 3), keepdim=True).long(), images.amax(dim=(2, 3), keepdim=True).long()
    stretched = (images.long() - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.to(torch.uint8), images)


def _equalize(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    """Spread each channel's grey levels evenly."""
    counts = _count_levels(images)
    brightest = images.amax(dim=(2, 3)).long().unsqueeze(2)  # (b, C, 1)
    step = (counts.sum(dim=2, keepdim=True) - counts.gather(2, brightest)) // 255
    darker = counts.cumsum(dim=2) - counts
    table = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step.unsqueeze(3) > 0, _look_up(images, table), images)


def _invert(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    """Keep the leading bits."""
    size = torch.exp2(8 - argument).long()  # of the steps between the levels that are left
    return (images.long() // size * size).to(torch.uint8)


def _solarize(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    return torch.where(images < argument, images, 255 - images)


def _solarize_add(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    return torch.where(images < 128, (images + argument).clamp(max=255).to(torch.uint8), images)


# -- towards or away from a degenerate image -------------------------------------------------------------------------


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor (images - degenerate), cut to 0..255 and truncated, as ``PIL.Image.blend``."""
    start = degenerate.float()
    return (start + factor * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def _to_grey(images: Tensor) -> Tensor:
    """(b, C, H, W) -> (b, 1, H, W), PIL's luma of three channels, the channel itself where there is one."""
    if images.shape[1] == 1:
        return images
    weights = send(torch.tensor([19595, 38470, 7471]).view(3, 1, 1), images.device)
    return (((images.long() * weights).sum(dim=1, keepdim=True) + 0x8000) >> 16).to(torch.uint8)


def _enhance_color(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    return _blend(_to_grey(images), images, argument)


def _enhance_contrast(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    pixels = images.shape[2] * images.shape[3]
    total = _to_grey(images).long().sum(dim=(1, 2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), images, argument)  # the mean, rounded


def _enhance_brightness(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    return _blend(torch.zeros_like(images), images, argument)


def _enhance_sharpness(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    """The degenerate image is smoothed by 3 x 3 pixels of weight 1 around one of weight 5; the rim is left alone."""
    smooth = images.clone()
    whole = images.long()
    windows = sum(whole[:, :, y : y - 2 or None, x : x - 2 or None] for y in range(3) for x in range(3))
    smooth[:, :, 1:-1, 1:-1] = ((2 * (windows + 4 * whole[:, :, 1:-1, 1:-1]) + 13) // 26).to(torch.uint8)  # rounded
    return _blend(smooth, images, argument)


# -- affine maps -----------------------------------------------------------------------------------------------------


def _shear_x(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    x, y = _compute_centres(images)
    return _sample_bicubic(images, x + argument * y, y.expand_as(argument * y), fill)


def _shear_y(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    x, y = _compute_centres(images)
    return _sample_bicubic(images, x.expand_as(argument * x), y + argument * x, fill)


def _translate_x(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    x, y = _compute_centres(images)
    return _sample_bicubic(images, x + argument, y, fill)


def _translate_y(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    x, y = _compute_centres(images)
    return _sample_bicubic(images, x, y + argument, fill)


def _rotate(images: Tensor, argument: Tensor, fill: list[int]) -> Tensor:
    """Degrees, counter-clockwise around the middle."""
    x, y = _compute_centres(images)
    x_middle, y_middle = images.shape[3] / 2, images.shape[2] / 2
    cosine, sine = torch.cos(-argument * (math.pi / 180)), torch.sin(-argument * (math.pi / 180))
    across, down = x - x_middle, y - y_middle
    return _sample_bicubic(
        images, x_middle + cosine * across + sine * down, y_middle - sine * across + cosine * down, fill
    )


def _compute_centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, H, W) x and y of the pixels' centres: the first one is at 0.5."""
    height, width = images.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5, torch.arange(width, device=images.device) + 0.5, indexing="ij"
    )
    return x[None, None], y[None, None]


def _sample_bicubic(images: Tensor, x: Tensor, y: Tensor, fill: list[int]) -> Tensor:
    """The images at positions (b or 1, 1, H, W), PIL's cubic (slope parameter -1), ``fill`` outside."""
    batch, channels, height, width = images.shape
    x, y = (position.expand(batch, 1, height, width) for position in (x, y))
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, across = _find_neighbours(x, width)
    rows, down = _find_neighbours(y, height)
    pixels = images.flatten(2).float()

    def get_pixel(row: Tensor, column: Tensor) -> Tensor:
        return pixels.gather(2, (row * width + column).flatten(2).expand(-1, channels, -1)).view(images.shape)

    value = _interpolate_cubic(
        [_interpolate_cubic([get_pixel(row, column) for column in columns], across) for row in rows], down
    )
    colour = send(torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1), images.device)
    return torch.where(inside, value.clamp(0, 255).to(torch.uint8), colour)


def _find_neighbours(position: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """The four pixels around each position along one axis, the rim repeated, and the way from the second one."""
    second = (position - 0.5).floor()
    return [(second.long() + i).clamp(0, size - 1) for i in (-1, 0, 1, 2)], position - 0.5 - second


def _interpolate_cubic(v: list[Tensor], d: Tensor) -> Tensor:
    """Four values and the way from the second one -> the cubic there; exact on flat parts."""
    slope, bend, twist = v[2] - v[0], 2 * (v[0] - v[1]) + v[2] - v[3], v[1] - v[0] + v[3] - v[2]
    return v[1] + d * (slope + d * (bend + d * twist))


OPERATIONS = (
    Operation("AutoContrast", _to_zero, _stretch_contrast),
    Operation("Equalize", _to_zero, _equalize),
    Operation("Invert", _to_zero, _invert),
    Operation("Rotate", _to_signed(30.0), _rotate),
    Operation("PosterizeIncreasing", _to_bits, _posterize),
    Operation("SolarizeIncreasing", _to_threshold, _solarize),
    Operation("SolarizeAdd", _to_addend, _solarize_add),
    Operation("ColorIncreasing", _to_factor, _enhance_color),
    Operation("ContrastIncreasing", _to_factor, _enhance_contrast),
    Operation("BrightnessIncreasing", _to_factor, _enhance_brightness),
    Operation("SharpnessIncreasing", _to_factor, _enhance_sharpness),
    Operation("ShearX", _to_signed(0.3), _shear_x),
    Operation("ShearY", _to_signed(0.3), _shear_y),
    Operation("TranslateXRel", _to_pixels, _translate_x),
    Operation("TranslateYRel", _to_pixels, _translate_y),
)
