"""Your own pictures, one folder per class; they are decoded once into a file that is mapped into memory."""

import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.base import ImageSet
from cl_bench.data.cache import Stored, load_or_make
from cl_bench.data.picture_files import PictureFile, list_classes, list_files, to_text
from cl_bench.data.pictures import Decoder

SPLITS = ("train", "test")

LARGEST_SIDE = 4096
"""Largest side of an image in pixels."""

MEASURED = 10_000
"""Training images, evenly spread, from which mean and standard deviation are measured."""

NAMED = 20
"""Largest number of damaged pictures that a message names."""

VERSION = 2
"""Version of the decoding; with another one, the pictures are decoded again."""

CHUNK = 1000
"""Pictures that the decoding threads get at once."""


def folder(*, root: str, size: int, cache: str, background: list[int], value_range: list[float] | None) -> ImageSet:
    """The pictures in ``root/train/CLASS/`` and ``root/test/CLASS/`` as RGB images of ``size`` x ``size`` pixels.

    A picture is a file that PIL can open: by its ending or, if it has none, by its content. Sub-folders of a class are
    searched too. Names that begin with a dot and other files are left out; a line on standard error says how many.
    Each picture is scaled so that its shorter side fits, and cropped at its centre. If a file has several pictures
    (GIF, TIFF), the first is used.

    The decoded images are stored in ``cache``. Their file name depends on the pictures' names, sizes and times. So a
    second run reads no picture, and a changed picture is noticed. The arrays are memory-mapped, so a data set may be
    larger than the RAM.

    Args:
        root: the folder; classes are the sub-folders of ``train``, in alphabetical order.
        size: side of the images in pixels.
        cache: folder of the decoded images.
        background: red, green and blue, 0 to 255, behind transparent pixels.
        value_range: the values that become black and white if a picture has more than eight bits per channel; None for
            the whole range of 16 bits. Pictures of 32-bit integers or floating-point numbers need one.

    Raises:
        ConfigError: missing folders, a class without pictures or not in ``train``, or damaged pictures.
    """
    decoder = _build_decoder(size, background, value_range)
    base, left_out = Path(root), Counter[str]()
    names = _find_classes(base, left_out)
    found = {split: [list_files(base / split / name, left_out) for name in names] for split in SPLITS}
    images, labels, damaged = {}, {}, list[str]()
    for split, files in found.items():
        reader = _Reader(base, split, names, files, decoder)
        try:
            images[split], labels[split] = reader.read(Path(cache))
        except _Damaged as error:
            damaged += error.pictures
    require(
        not damaged,
        "root",
        expected=f"pictures that can be read in {base}",
        got=f"{len(damaged)} that cannot: " + "; ".join(damaged[:NAMED]) + ("; ..." if len(damaged) > NAMED else ""),
        fix="Replace or remove them.",
    )
    for split in SPLITS:
        left_out["without ending that are no pictures"] += len(images[split].facts["left_out"])
    _print_counts(base, {split: len(labels[split]) for split in SPLITS}, len(names), left_out)
    return ImageSet(
        train_images=images["train"].array,
        train_labels=labels["train"],
        test_images=images["test"].array,
        test_labels=labels["test"],
        class_names=[to_text(name) for name in names],
        superclass=None,
        mean=images["train"].facts["mean"],
        std=images["train"].facts["std"],
        checksums=(images["train"].checksum, images["test"].checksum),
    )


def _find_classes(root: Path, left_out: Counter[str]) -> list[str]:
    """The names of the classes; two or more, and the same in both splits."""
    classes = {split: list_classes(root / split, left_out) for split in SPLITS}
    names = classes["train"]
    require(
        len(names) > 1,
        "root",
        expected=f"two or more class folders in {root / 'train'}",
        got=", ".join(names) or "none",
        fix="Put the pictures of each class into a folder of its own.",
    )
    unlike = sorted(set(names) ^ set(classes["test"]))
    require(
        not unlike,
        "root",
        expected=f"the same class folders in {root / 'train'} and {root / 'test'}",
        got=", ".join(f"{to_text(name)} in {'train' if name in names else 'test'}/ only" for name in unlike),
        fix="Give each class pictures in both, or remove it.",
    )
    return names


def _build_decoder(size: int, background: list[int], value_range: list[float] | None) -> Decoder:
    require(
        0 < size <= LARGEST_SIDE,
        "size",
        expected=f"1 to {LARGEST_SIDE} pixels",
        got=size,
        fix="32 is CIFAR's size, 224 ImageNet's.",
    )
    require(
        len(background) == 3 and all(0 <= value <= 255 for value in background),
        "background",
        expected="red, green and blue, each 0 to 255",
        got=list(background),
        fix="[255,255,255] is white.",
    )
    require(
        value_range is None or (len(value_range) == 2 and value_range[0] < value_range[1]),
        "value_range",
        expected="the values that become black and white, or null for all that 16 bits can hold",
        got=value_range,
        fix="[0,1] is usual for floating-point numbers.",
    )
    red, green, blue = background
    return Decoder(size, (red, green, blue), None if value_range is None else (value_range[0], value_range[1]))


def _print_counts(root: Path, taken: dict[str, int], classes: int, left_out: Counter[str]) -> None:
    rest = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()) if count)
    print(
        f"cl_bench: {root}: took {taken['train']} training and {taken['test']} test pictures of {classes} classes; "
        f"left out: {rest or 'nothing'}",
        file=sys.stderr,
    )


class _Damaged(Exception):
    """Pictures that cannot be read, each with the reason."""

    def __init__(self, pictures: list[str]) -> None:
        super().__init__(pictures)
        self.pictures = pictures


class _Reader:
    """Decodes the pictures of a split, class by class."""

    def __init__(
        self, root: Path, split: str, names: list[str], files: list[list[PictureFile]], decoder: Decoder
    ) -> None:
        self.root, self.split, self.names, self.decoder = root, split, names, decoder
        self.files = [file for own in files for file in own]
        self.labels = np.repeat(np.arange(len(names)), [len(own) for own in files])
        self.left_out: list[int] = []  # positions of the files without ending that are not pictures
        self._refuse_empty_classes()

    def read(self, cache: Path) -> tuple[Stored, np.ndarray]:
        """(N, 3, size, size) uint8 images, decoded unless the cache has them, and their (N,) labels.

        Raises:
            _Damaged: some pictures cannot be read; it has all of them.
        """
        size = self.decoder.size
        try:
            cache.mkdir(parents=True, exist_ok=True)
            images = load_or_make(
                self._choose_file(cache), len(self.files), (3, size, size), self._decode_rows, self._describe
            )
        except ConfigError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
            raise ConfigError(
                "cache",
                expected=f"a folder with room for {len(self.files) * 3 * size * size / 2**20:,.1f} MiB of images",
                got=f"{cache} ({getattr(error, 'strerror', None) or error})",
                fix="Set scenario.source.cache=PATH to another folder, or make room.",
            ) from error
        self.left_out = images.facts["left_out"]
        return images, np.delete(self.labels, self.left_out)

    def _choose_file(self, cache: Path) -> Path:
        root, start = self.root.resolve(), len(str(self.root / self.split))
        known = [(file.path[start:], *file.state) for file in self.files]
        key = hashlib.sha256(json.dumps([VERSION, astuple(self.decoder), str(root), known]).encode()).hexdigest()
        return cache / f"{to_text(root.name)[:50]}-{self.split}-{self.decoder.size}-{key[:16]}.images"

    def _decode_rows(self) -> Iterator[np.ndarray]:
        """The images in order; after a damaged picture no more images, only further damaged ones are collected."""
        from rich.console import Console
        from rich.progress import track

        console, positions = Console(stderr=True), range(len(self.files))
        bar = track(positions, f"decoding {self.split}", console=console, disable=not console.is_terminal)
        damaged: list[str] = []
        for position, image in zip(bar, self._decode_all()):
            if image is None:
                self.left_out.append(position)
            elif isinstance(image, str):
                damaged.append(image)
            elif not damaged:
                yield image
        if damaged:
            raise _Damaged(damaged)
        self._refuse_empty_classes()

    def _decode_all(self) -> Iterator[np.ndarray | str | None]:
        with ThreadPoolExecutor() as pool, warnings.catch_warnings():  # PIL decodes outside the GIL
            warnings.simplefilter("ignore")  # about strange metadata and large pictures
            for start in range(0, len(self.files), CHUNK):
                yield from pool.map(self._decode, self.files[start : start + CHUNK])

    def _decode(self, file: PictureFile) -> np.ndarray | str | None:
        """The image; None if the file is not a picture; or the reason why it cannot be read."""
        try:
            return self.decoder.decode(Path(file.path))
        except UnidentifiedImageError:
            return f"{to_text(file.path)} (no picture that PIL knows)" if os.path.splitext(file.path)[1] else None
        except Exception as error:  # PIL raises many kinds for a damaged file
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return f"{to_text(file.path)} ({' '.join(reason.split())})"

    def _describe(self, images: np.ndarray) -> dict[str, Any]:
        mean, std = _measure_moments(images)
        return {"mean": mean, "std": std, "left_out": self.left_out}

    def _refuse_empty_classes(self) -> None:
        counts = np.bincount(np.delete(self.labels, self.left_out), minlength=len(self.names))
        empty = [str(self.root / self.split / name) for name, count in zip(self.names, counts) if not count]
        require(
            not empty,
            "root",
            expected="pictures in the folder of each class",
            got=f"none that PIL can open in {', '.join(map(to_text, empty))}",
            fix="Put some there, or remove the class.",
        )


def _measure_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in [0, 1], one value per channel."""
    spread = np.unique(np.linspace(0, len(images) - 1, min(len(images), MEASURED)).astype(int))
    sums, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(spread), 500):
        part = images[spread[start : start + 500]].astype(np.float64) / 255
        sums += part.mean(axis=(2, 3)).sum(axis=0)
        squares += np.square(part).mean(axis=(2, 3)).sum(axis=0)
    mean = sums / len(spread)
    std = np.sqrt(np.maximum(squares / len(spread) - mean**2, 1e-6))  # it is 0 if all pictures have one colour
    return mean.round(4).tolist(), std.round(4).tolist()
