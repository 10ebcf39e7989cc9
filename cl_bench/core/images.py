"""Images that do not fit on the training device. They stay in the host's RAM, or in a memory-mapped file, and are sent
to the device batch by batch.

Shapes: N images of a set, B of a batch, C channels, H x W pixels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor copied to the device; for CUDA from pinned memory, so that the host does not wait for the bus."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def send_together(vectors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Host vectors of one length and type, (n,) each, copied to the device at once: a small copy costs as much as a
    kernel."""
    if device.type == "cpu" or not vectors:
        return vectors
    return send(torch.stack(list(vectors)), device).unbind()


class HostImages:
    """(N, C, H, W) uint8 images in one or several host tensors, used like one tensor.

    Indexing by positions, a mask or a slice gives a tensor on the training device.

    Args:
        sources: (M, C, H, W) uint8 each, on any device; of a memory-mapped one, only requested images are read.
        where: (N, 2) int64 on the CPU, the source and the row of each image.
        device: the device of a batch.
    """

    def __init__(self, sources: Sequence[Tensor], where: Tensor, device: torch.device) -> None:
        self.sources, self.where, self.device = tuple(sources), where, device
        self.shape = torch.Size((len(where), *self.sources[0].shape[1:]))

    @classmethod
    def from_rows(cls, source: Tensor, rows: Tensor, device: torch.device) -> Tensor:
        """The images at ``rows`` (N,) of one tensor; the type says Tensor, since it is used like one."""
        return cast(Tensor, cls([source], torch.stack([torch.zeros_like(rows), rows], dim=1), device))

    @classmethod
    def concatenate(cls, parts: Sequence[Tensor]) -> Tensor:
        """Several sets of images as one, in their order; nothing is copied."""
        sources: list[Tensor] = []
        where: list[Tensor] = []
        device = torch.device("cpu")
        for part in parts:
            if isinstance(part, HostImages):
                where.append(part.where + torch.tensor([len(sources), 0]))
                sources += part.sources
                device = part.device
            else:
                rows = torch.arange(len(part))
                where.append(torch.stack([torch.full_like(rows, len(sources)), rows], dim=1))
                sources.append(part)
        return cast(Tensor, cls(sources, torch.cat(where), device))

    def move_to(self, device: torch.device) -> Tensor:
        """The same images, for another device."""
        return cast(Tensor, HostImages(self.sources, self.where, device))

    def cpu(self) -> Tensor:
        """All images, in the host's RAM."""
        return self[:].cpu()

    def __len__(self) -> int:
        return len(self.where)

    def numel(self) -> int:
        """The number of pixel values, one byte each."""
        return self.shape.numel()

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        """Positions (B,), a mask (N,) or a slice -> (B, C, H, W) on the device."""
        where = self.where[which.cpu() if isinstance(which, Tensor) else which]
        source, row = where.unbind(1)
        if len(self.sources) == 1:
            return self._send(self.sources[0], row)
        images = torch.empty((len(where), *self.shape[1:]), dtype=torch.uint8, device=self.device)
        for number, tensor in enumerate(self.sources):
            (positions,) = torch.nonzero(source == number, as_tuple=True)
            if len(positions):
                images[send(positions, self.device)] = self._send(tensor, row[positions])
        return images

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Positions (B,) -> (B, C, H, W) on the device; ``dim``, as in a tensor's method, is always 0."""
        return self[index]

    def _send(self, source: Tensor, rows: Tensor) -> Tensor:
        images = source.index_select(0, rows.to(source.device))  # whole images; source[rows] goes pixel by pixel
        return send(images, self.device)
