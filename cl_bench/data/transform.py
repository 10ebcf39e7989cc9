"""Augmentation and normalisation of whole batches of uint8 images on the device.

Shapes: B images, C channels, H x W pixels, p = ``crop_padding``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cl_bench.errors import require


class Transform:
    """Random crop, random horizontal flip, whatever else is given, normalise; every image with its own draw.

    The same distribution as torchvision's ``RandomCrop(H, padding=p)``, ``RandomHorizontalFlip()``, ``ToTensor()``,
    ``Normalize(mean, std)`` on each image. Draws come from a CPU generator, so a seed draws the same crops and flips on
    every device.

    Args:
        mean, std: a value a channel, for pixels in [0, 1].
        crop_padding: black pixels added on each side before an H x W window is cut; 0 = no crop.
        flip: mirror each image with probability 1/2.
        rand_augment: images (B, C, H, W) uint8 and the CPU generator -> images, after crop and flip; None for no more.
    """

    def __init__(
        self,
        *,
        mean: list[float],
        std: list[float],
        crop_padding: int,
        flip: bool,
        rand_augment: Callable[[Tensor, Generator], Tensor] | None = None,
    ) -> None:
        require(
            crop_padding >= 0, "crop_padding", expected="0 or more pixels", got=crop_padding, fix="Set 0 for no crop."
        )
        require(
            len(mean) == len(std) and min(std, default=0) > 0,
            "std",
            expected=f"{len(mean)} values above 0, one a channel",
            got=std,
            fix="Give mean and std of the training images, a value a channel.",
        )
        self.mean, self.std = list(mean), list(std)
        self.crop_padding, self.flip, self.rand_augment = crop_padding, flip, rand_augment
        self._scale = (1.0 / (255.0 * torch.tensor(std))).view(-1, 1, 1)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1)

    def to(self, device: torch.device) -> "Transform":
        """Put the constants on ``device``; returns self."""
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def train(self, images: Tensor, generator: Generator) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32, augmented and normalised."""
        if self.crop_padding:
            images = self._crop(images, generator)
        if self.flip:
            mirrored = torch.randint(2, (len(images),), generator=generator)
            which = torch.arange(len(images)) + len(images) * mirrored  # of the images and their mirror images
            which = which.to(images.device, non_blocking=True)
            images = torch.cat([images, images.flip(3)]).index_select(0, which)
        if self.rand_augment is not None:
            images = self.rand_augment(images, generator)
        return self.plain(images)

    def _crop(self, images: Tensor, generator: Generator) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W): an H x W window of each padded image.

        One gather of whole windows out of a view that starts one at every pixel: several times as fast on the CPU as
        indexing by row and column, which goes pixel by pixel.
        """
        batch, channels, height, width = images.shape
        p = self.crop_padding
        row, column = torch.randint(2 * p + 1, (2, batch), generator=generator)
        padded = F.pad(images, (p, p, p, p))
        step = padded.stride()
        corners = torch.arange(batch) * step[0] + row * step[2] + column * step[3]
        last = (channels - 1) * step[1] + (height - 1) * step[2] + (width - 1) * step[3]  # pixel of a window
        windows = padded.as_strided((padded.numel() - last, channels, height, width), (1, *step[1:]))
        return windows.index_select(0, corners.to(images.device, non_blocking=True))

    def plain(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32, normalised only."""
        return images.float().mul_(self._scale).add_(self._shift)

    def pixels(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`plain`, up to rounding: (B, C, H, W) float -> uint8."""
        return ((images - self._shift) / self._scale).round().clamp(0, 255).to(torch.uint8)
