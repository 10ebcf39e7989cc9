"""Images that are not simply one tensor on the training device, but are used like one.

:class:`HostImages` do not fit there: they stay in the host's RAM, or in a memory-mapped file, and are sent to the
device batch by batch. :class:`RearrangedImages` are stored once for many tasks: each task moves their pixels to other
places when a batch is looked up.

Shapes: N images of a set, B of a batch, C channels, H x W pixels, V views (one per task).
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
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


class RearrangedImages:
    """(N, C, H, W) uint8 images of which only the originals are stored; their pixels are moved when they are looked up.

    Indexing by positions, a mask or a slice gives a tensor on the device of ``maps``.

    Args:
        source: (M, C, H, W) uint8, the originals.
        rows: (N,) int64, the original of each image.
        views: (N,) int64, the view of each image.
        maps: (V, H W) int64, for each pixel of a view the position of the original's pixel that it shows; H W means
            black.
    """

    def __init__(self, source: Tensor, rows: Tensor, views: Tensor, maps: Tensor) -> None:
        self.source, self.rows, self.views, self.maps = source, rows, views, maps
        self.shape = torch.Size((len(rows), *source.shape[1:]))

    @classmethod
    def of_view(cls, source: Tensor, rows: Tensor, view: int, maps: Tensor) -> Tensor:
        """The originals at ``rows`` in one view; the type says Tensor, since it is used like one."""
        return cast(Tensor, cls(source, rows, torch.tensor(view).expand(len(rows)), maps))

    def change_tensors(self, change: Callable[[Tensor], Tensor], change_source: Callable[[Tensor], Tensor]) -> Tensor:
        """The same images with these functions applied to what they consist of."""
        rest = (change(tensor) for tensor in (self.rows, self.views, self.maps))
        return cast(Tensor, RearrangedImages(change_source(self.source), *rest))

    def cpu(self) -> Tensor:
        """All images, in the host's RAM."""
        return self[:].cpu()

    def __len__(self) -> int:
        return len(self.rows)

    def numel(self) -> int:
        """The number of pixel values, as if each image were stored."""
        return self.shape.numel()

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        """Positions (B,), a mask (N,) or a slice -> (B, C, H, W) on the device."""
        images = self.source.index_select(0, self.rows[which])
        places = self.maps.index_select(0, self.views[which])[:, None].expand(-1, images.shape[1], -1)
        return F.pad(images.flatten(2), (0, 1)).gather(2, places).view(images.shape)  # the added pixel is black

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Positions (B,) -> (B, C, H, W) on the device; ``dim``, as in a tensor's method, is always 0."""
        return self[index]


def get_stored(images: Tensor) -> Tensor:
    """The tensor in which these images, or their originals, are stored."""
    return images.source if isinstance(images, RearrangedImages) else images


def are_on_host(images: Tensor) -> bool:
    """Whether a batch of these images has to be sent to the device."""
    return isinstance(get_stored(images), HostImages)


def concatenate_images(parts: Sequence[Tensor]) -> Tensor:
    """Several sets of images as one, in their order; only images that are stored on the device are copied."""
    first = parts[0]
    if isinstance(first, RearrangedImages):
        others = [p for p in parts if isinstance(p, RearrangedImages)]
        if len(others) == len(parts) and all(p.source is first.source and p.maps is first.maps for p in others):
            rows, views = torch.cat([p.rows for p in others]), torch.cat([p.views for p in others])
            return cast(Tensor, RearrangedImages(first.source, rows, views, first.maps))
    parts = [part[:] if isinstance(part, RearrangedImages) else part for part in parts]
    return HostImages.concatenate(parts) if any(isinstance(p, HostImages) for p in parts) else torch.cat(list(parts))
