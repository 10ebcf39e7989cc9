"""(d), (e): the data path and the buffer by themselves, on one core."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cl_bench.buffers.base import Context
from cl_bench.buffers.reservoir import Reservoir
from cl_bench.core.types import Batch
from cl_bench.data.transform import Transform
from speed.common import BATCH, Options, Row, compute_ratio, make_random_pixels, measure_in_turn, repeat

CAPACITY = 200


@contextmanager
def use_one_core() -> Iterator[None]:
    """Both sides on one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Pictures(Dataset[tuple[Any, int]]):
    """Images as torchvision's CIFAR100 hands them out: a PIL image an item, transformed by itself."""

    def __init__(self, pixels: Tensor, labels: Tensor, transform: transforms.Compose | None) -> None:
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
        self.targets, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, which: int) -> tuple[Any, int]:
        """One image, (C, H, W), or a picture if there is no transform; and its class."""
        image = Image.fromarray(self.pixels[which])
        return self.transform(image) if self.transform else image, self.targets[which]


def make_per_sample_transform(mean: list[float], std: list[float]) -> transforms.Compose:
    """The usual pipeline of CIFAR."""
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def measure_data_path(options: Options) -> Iterator[Row]:
    """A shuffled, augmented epoch in batches of 32: torchvision in a DataLoader, and ours."""
    source = make_random_pixels(per_class=2 if options.small else 16)
    images, labels = torch.from_numpy(source.train_images), torch.from_numpy(source.train_labels)
    pictures = Pictures(images, labels, make_per_sample_transform(source.mean, source.std))
    loader = DataLoader(pictures, batch_size=BATCH, shuffle=True, num_workers=0, drop_last=True)
    transform = Transform(mean=source.mean, std=source.std, crop_padding=4, flip=True)
    generator = torch.Generator().manual_seed(0)

    def theirs() -> None:
        for _ in loader:
            pass

    def ours() -> None:
        for which in torch.randperm(len(labels), generator=generator).split(BATCH)[: len(loader)]:
            transform.augment(images.index_select(0, which), generator), labels[which]

    names = "torchvision, DataLoader", "our batches"
    with use_one_core():
        epochs = measure_in_turn({names[0]: repeat(theirs, 1), names[1]: repeat(ours, 10)}, options.repetitions)
    values = {name: [seconds / len(loader) for seconds in epochs[name]] for name in names}
    yield Row(
        "data", "augmented batch of 32, theirs / ours", "x", compute_ratio(values, *names), least=8.0, sides=values
    )


def measure_reservoir(options: Options) -> Iterator[Row]:
    """Add a batch of 32 and draw one: a reservoir that goes image by image, and ours."""
    source = make_random_pixels(per_class=1)
    raw, y = torch.from_numpy(source.train_images[:BATCH]), torch.from_numpy(source.train_labels[:BATCH])
    batch = Batch(x=raw.float(), y=y, raw=raw, task=0)
    times = 5 if options.small else 200
    for augment in (True, False):
        steps: list[object] = (
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
        )
        steps += [transforms.ConvertImageDtype(torch.float32), transforms.Normalize(source.mean, source.std)]
        pipeline = transforms.Compose(steps)
        transform = Transform(mean=source.mean, std=source.std, crop_padding=4 * augment, flip=augment)
        context = Context(
            image_shape=(3, 32, 32),
            num_classes=100,
            transform=transform,
            generator=torch.Generator().manual_seed(0),
            device=torch.device("cpu"),
        )
        buffer, plain = Reservoir(capacity=CAPACITY, context=context), PlainReservoir(CAPACITY)

        def theirs(plain: "PlainReservoir" = plain, pipeline: transforms.Compose = pipeline) -> None:
            for image, label in zip(raw, y):
                plain.add(image, label)
            drawn = random.sample(plain.memory, BATCH)
            torch.stack([pipeline(image) for image, _ in drawn]), torch.stack([label for _, label in drawn])

        def ours(buffer: Reservoir = buffer) -> None:
            buffer.add(batch)
            buffer.sample(BATCH)

        names = "image by image", "our reservoir"
        with use_one_core():
            for _ in range(2 * CAPACITY // BATCH):  # both are full before they are measured
                theirs()
                ours()
            works = {names[0]: repeat(theirs, max(1, times // 10)), names[1]: repeat(ours, times)}
            values = measure_in_turn(works, options.repetitions)
        what = f"add 32 and draw 32{', augmented' if augment else ', normalised only'}, theirs / ours"
        yield Row("buffer", what, "x", compute_ratio(values, *names), least=10.0, sides=values)


class PlainReservoir:
    """Algorithm R as one writes it in Python: a list of uint8 images, offered and transformed one after another."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, 0
        self.memory: list[tuple[Tensor, Tensor]] = []

    def add(self, image: Tensor, label: Tensor) -> None:
        """Offer one image."""
        self.seen += 1
        if len(self.memory) < self.capacity:
            self.memory.append((image, label))
        elif (slot := random.randrange(self.seen)) < self.capacity:
            self.memory[slot] = (image, label)
