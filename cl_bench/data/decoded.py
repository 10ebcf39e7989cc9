"""Picture files as a data set: decoded once into a file that is mapped into memory, whatever says which are which."""

import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.base import ImageSet
from cl_bench.data.cache import Stored, load_or_make
from cl_bench.data.picture_files import PictureFile, to_text
from cl_bench.data.pictures import Decoder

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


@dataclass(frozen=True)
class Part:
    """The picture files of the training or of the test set.

    Attributes:
        name: ``train`` or ``test``.
        folder: the folder above all of them; a cache does not depend on what is above it.
        files: of each class.
        places: where each class has its files, for messages.
    """

    name: str
    folder: Path
    files: list[list[PictureFile]]
    places: list[str]

    @property
    def flat(self) -> list[PictureFile]:
        """All files, class by class."""
        return [file for own in self.files for file in own]


def read_pictures(
    root: Path,
    names: list[str],
    parts: Sequence[Part],
    *,
    decoder: Decoder,
    cache: str,
    left_out: Counter[str],
    notes: Sequence[str] = (),
) -> ImageSet:
    """The pictures of two parts as RGB images; they are decoded unless the cache has them.

    The decoded images are stored in ``cache``. Their file name depends on the pictures' names, sizes and times. So a
    second run reads no picture, and a changed picture is noticed. The arrays are memory-mapped, so a data set may be
    larger than the RAM.

    Args:
        root: the folder of the data set, for messages.
        names: of the classes.
        parts: the training and the test part.
        left_out: what was left out, with its number; a line on standard error says so.
        notes: what else this line says.

    Raises:
        ConfigError: a class without pictures, damaged pictures, or no room for the cache.
    """
    images, labels, damaged = {}, {}, list[str]()
    for part in parts:
        reader = _Reader(root, part, decoder)
        try:
            images[part.name], labels[part.name] = reader.read(Path(cache))
        except _Damaged as error:
            damaged += error.pictures
    require(
        not damaged,
        "root",
        expected=f"pictures that can be read in {root}",
        got=f"{len(damaged)} that cannot: " + "; ".join(damaged[:NAMED]) + ("; ..." if len(damaged) > NAMED else ""),
        fix="Replace or remove them.",
    )
    for part in parts:
        left_out["without ending that are no pictures"] += len(images[part.name].facts["left_out"])
    _print_counts(root, {name: len(own) for name, own in labels.items()}, len(names), left_out, notes)
    return ImageSet(
        train_images=images["train"].array,
        train_labels=labels["train"],
        test_images=images["test"].array,
        test_labels=labels["test"],
        class_names=names,
        superclass=None,
        mean=images["train"].facts["mean"],
        std=images["train"].facts["std"],
        checksums=(images["train"].checksum, images["test"].checksum),
    )


Files = list[list[PictureFile]]


def draw_test_files(files: Files, names: list[str], fraction: float, seed: int) -> tuple[Files, Files]:
    """The training and the test files of each class: ``fraction`` of them, at least one, is drawn for the test.

    Args:
        files: of each class, in order. The draw of a class depends on the seed, its number and the number of its files.

    Raises:
        ConfigError: a class has no training file left.
    """
    train, test = [], []
    for number, own in enumerate(files):
        count = max(1, round(fraction * len(own)))
        require(
            count < len(own),
            "test_fraction",
            expected="at least one training picture per class beside the test pictures",
            got=f"{len(own)} pictures of {names[number]} at {fraction}",
            fix="Lower test_fraction, or give the class more pictures.",
        )
        drawn = set(np.random.default_rng([seed, number]).permutation(len(own))[:count].tolist())
        train.append([file for i, file in enumerate(own) if i not in drawn])
        test.append([file for i, file in enumerate(own) if i in drawn])
    return train, test


def check_drawing(fraction: float, seed: int, test: str | None, searched: str) -> None:
    """Refuse to draw test pictures if there are some, and to draw none if there are none.

    Args:
        test: where test pictures are; None for nowhere.
        searched: where they would be.
    """
    require(
        0 <= seed < 2**32, "split_seed", expected="a whole number in [0, 2^32)", got=seed, fix="Use a smaller seed."
    )
    if test is not None:
        expected, right, fix = f"0, since there are test pictures: {test}", fraction == 0, "Leave it out."
    else:
        expected, right = f"a number between 0 and 1, since there are no test pictures in {searched}", 0 < fraction < 1
        fix = "scenario.source.test_fraction=0.2 draws a fifth of each class for the test."
    require(right, "test_fraction", expected=expected, got=fraction, fix=fix)


def build_decoder(size: int, background: list[int], value_range: list[float] | None) -> Decoder:
    """The decoder with these settings, see :class:`~cl_bench.data.pictures.Decoder`; wrong ones are refused."""
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


def _print_counts(
    root: Path, taken: dict[str, int], classes: int, left_out: Counter[str], notes: Sequence[str]
) -> None:
    rest = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()) if count)
    print(
        f"cl_bench: {root}: took {taken['train']} training and {taken['test']} test pictures of {classes} classes; "
        f"left out: {'; '.join([rest or 'nothing', *notes])}",
        file=sys.stderr,
    )


class _Damaged(Exception):
    """Pictures that cannot be read, each with the reason."""

    def __init__(self, pictures: list[str]) -> None:
        super().__init__(pictures)
        self.pictures = pictures


class _Reader:
    """Decodes the pictures of a part, class by class."""

    def __init__(self, root: Path, part: Part, decoder: Decoder) -> None:
        self.root, self.part, self.decoder, self.files = root, part, decoder, part.flat
        self.labels = np.repeat(np.arange(len(part.files)), [len(own) for own in part.files])
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
        root, start = self.root.resolve(), len(str(self.part.folder))
        known = [(file.path[start:], *file.state) for file in self.files]
        key = hashlib.sha256(json.dumps([VERSION, astuple(self.decoder), str(root), known]).encode()).hexdigest()
        return cache / f"{to_text(root.name)[:50]}-{self.part.name}-{self.decoder.size}-{key[:16]}.images"

    def _decode_rows(self) -> Iterator[np.ndarray]:
        """The images in order; after a damaged picture no more images, only further damaged ones are collected."""
        from rich.console import Console
        from rich.progress import track

        console, positions = Console(stderr=True), range(len(self.files))
        bar = track(positions, f"decoding {self.part.name}", console=console, disable=not console.is_terminal)
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
        mean, std = measure_moments(images)
        return {"mean": mean, "std": std, "left_out": self.left_out}

    def _refuse_empty_classes(self) -> None:
        counts = np.bincount(np.delete(self.labels, self.left_out), minlength=len(self.part.places))
        empty = [place for place, count in zip(self.part.places, counts) if not count]
        require(
            not empty,
            "root",
            expected="training and test pictures of each class",
            got=f"none that PIL can open in {', '.join(empty[:NAMED])}{'; ...' if len(empty) > NAMED else ''}",
            fix="Put some there, or remove the class.",
        )


def measure_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in [0, 1], one value per channel."""
    spread = np.unique(np.linspace(0, len(images) - 1, min(len(images), MEASURED)).astype(int))
    sums, squares = np.zeros(images.shape[1]), np.zeros(images.shape[1])
    for start in range(0, len(spread), 500):
        part = images[spread[start : start + 500]].astype(np.float64) / 255
        sums += part.mean(axis=(2, 3)).sum(axis=0)
        squares += np.square(part).mean(axis=(2, 3)).sum(axis=0)
    mean = sums / len(spread)
    std = np.sqrt(np.maximum(squares / len(spread) - mean**2, 1e-6))  # it is 0 if all pictures have one colour
    return mean.round(4).tolist(), std.round(4).tolist()
