"""Augmentation and normalisation of whole batches of uint8 images on the device.

Shapes: B images, C channels, H x W pixels, p = ``crop_padding``.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cl_bench.core.errors import require
from cl_bench.core.images import send_together


class Transform:
    """Random crop, random horizontal flip, optional RandAugment, then normalisation; each image has its own draw.

    The same distribution as torchvision's ``RandomCrop(H, padding=p)``, ``RandomHorizontalFlip()``, ``ToTensor()``,
    ``Normalize(mean, std)`` on each image. A CPU generator draws, so a seed gives the same crops and flips on every
    device.

    Args:
        mean, std: one value per channel, for pixels in [0, 1].
        crop_padding: black pixels added on each side before an H x W window is cropped; 0 = no crop.
        flip: mirror each image with probability 1/2.
        rand_augment: images (B, C, H, W) uint8 and the CPU generator -> images, after crop and flip; None for none.
        mean_image: (C, H, W) subtracted instead of ``mean``, which is then its mean; None for ``mean``.
    """

    def __init__(
        self,
        *,
        mean: list[float],
        std: list[float],
        crop_padding: int,
        flip: bool,
        rand_augment: Callable[[Tensor, Generator], Tensor] | None = None,
        mean_image: Tensor | None = None,
    ) -> None:
        require(
            crop_padding >= 0, "crop_padding", expected="0 or more pixels", got=crop_padding, fix="Set 0 for no crop."
        )
        require(
            len(mean) == len(std) and min(std, default=0) > 0,
            "std",
            expected=f"{len(mean)} values above 0, one per channel",
            got=std,
            fix="Give mean and std of the training images, one value per channel.",
        )
        self.mean, self.std = list(mean), list(std)
        self.crop_padding, self.flip, self.rand_augment = crop_padding, flip, rand_augment
        self._scale = (1.0 / (255.0 * torch.tensor(std))).view(-1, 1, 1)
        subtracted = torch.tensor(mean).view(-1, 1, 1) if mean_image is None else mean_image
        self._shift = -subtracted / torch.tensor(std).view(-1, 1, 1)  # (C, 1, 1) or (C, H, W)

    def to(self, device: torch.device) -> "Transform":
        """This transform, with its constants on ``device``."""
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        return self

    def augment(self, images: Tensor, generator: Generator) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32, augmented and normalised."""
        moves = self.draw_moves(images.shape, generator)
        return self.apply(images, send_together(moves, images.device), generator)

    def draw_moves(self, shape: Sequence[int], generator: Generator) -> list[Tensor]:
        """The random window of each of (B, C, H, W) images, and whether it is mirrored.

        Returns:
            For crop and flip, if used, (B,) int64 on the CPU: the index that :meth:`apply` selects.
        """
        batch, channels, height, width = shape
        moves = []
        if p := self.crop_padding:
            row, column = torch.randint(2 * p + 1, (2, batch), generator=generator)
            across = width + 2 * p
            images = torch.arange(batch) * (channels * (height + 2 * p) * across)
            moves.append(images + row * across + column)
        if self.flip:
            mirrored = torch.randint(2, (batch,), generator=generator)
            moves.append(torch.arange(batch) + batch * mirrored)  # index in the images followed by their mirror images
        return moves

    def apply(self, images: Tensor, moves: Sequence[Tensor], generator: Generator) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32, cropped and flipped as drawn, RandAugmented, normalised.

        Args:
            moves: from :meth:`draw_moves`, on the device of the images.
            generator: for the draws of ``rand_augment``.
        """
        left = iter(moves)
        if self.crop_padding:
            images = self._view_windows(images).index_select(0, next(left))
        if self.flip:
            images = torch.cat([images, images.flip(3)]).index_select(0, next(left))
        if self.rand_augment is not None:
            images = self.rand_augment(images, generator)
        return self.normalise(images)

    def _view_windows(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> a view of the padded images with one H x W window starting at every pixel.

        On the CPU, to select whole windows is several times faster than to index by row and column, pixel by pixel.
        """
        channels, height, width = images.shape[1:]
        p = self.crop_padding
        padded = F.pad(images, (p, p, p, p)).contiguous()
        step = padded.stride()
        last = (channels - 1) * step[1] + (height - 1) * step[2] + (width - 1) * step[3]  # last pixel of a window
        return padded.as_strided((padded.numel() - last, channels, height, width), (1, *step[1:]))

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, C, H, W) float32, normalised and not augmented."""
        return images.float().mul_(self._scale).add_(self._shift)

    def recover_pixels(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`, up to rounding: (B, C, H, W) float -> uint8."""
        return ((images - self._shift) / self._scale).round().clamp(0, 255).to(torch.uint8)
