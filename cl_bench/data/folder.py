"""Pictures of your own: a folder a class, decoded once into a file that is mapped into memory."""

import hashlib
import json
import os
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.base import ImageSet
from cl_bench.data.cache import Stored, load_or_make
from cl_bench.data.pictures import Decoder, list_endings

SPLITS = ("train", "test")

LARGEST_SIDE = 4096
"""Pixels that the side of an image may have."""

MEASURED = 10_000
"""Training images, evenly spread, that mean and standard deviation are measured on."""

NAMED = 20
"""Damaged pictures that a message names; of more it says how many."""

VERSION = 2
"""Of what is made of a picture file; another one takes no notice of what was decoded before."""

CHUNK = 1000
"""Pictures that are handed to the decoding threads at once."""


def folder(*, root: str, size: int, cache: str, background: list[int], value_range: list[float] | None) -> ImageSet:
    """The pictures in ``root/train/CLASS/`` and ``root/test/CLASS/`` as RGB images of ``size`` x ``size`` pixels.

    Pictures are what PIL can open, by their ending or, where a file has none, by its content; those in sub-folders of a
    class are taken too. What begins with a dot and other files are left out, and a line on standard error says so.
    Each picture is scaled so that its shorter side fits, and cut around its centre. Of several in one file (GIF, TIFF)
    the first is taken.

    The decoded images lie in ``cache``, under a name made of the pictures' names, sizes and times: a second run reads
    no picture, and a changed picture is noticed. The arrays are memory-mapped, so a set may be larger than the memory.

    Args:
        root: the folder; classes are the sub-folders of ``train``, in alphabetical order.
        size: side of the images in pixels.
        cache: folder of the decoded images.
        background: red, green and blue, 0 to 255, behind transparent pixels.
        value_range: the values that become black and white where a picture has more than eight bits a channel; None for
            the whole range of 16 bits. Pictures of 32-bit integers or floating-point numbers are refused without one.

    Raises:
        ConfigError: no such folders, a class without pictures or unknown in ``train``, or pictures that are damaged.
    """
    decoder = _build_decoder(size, background, value_range)
    place, left_out = Path(root), Counter[str]()
    classes = {split: _list_classes(place / split, left_out) for split in SPLITS}
    names = classes["train"]
    require(
        len(names) > 1,
        "root",
        expected=f"two or more class folders in {place / 'train'}",
        got=", ".join(names) or "none",
        fix="Put the pictures of each class into a folder of its own.",
    )
    unlike = sorted(set(names) ^ set(classes["test"]))
    require(
        not unlike,
        "root",
        expected=f"the same class folders in {place / 'train'} and {place / 'test'}",
        got=", ".join(f"{_to_text(name)} in {'train' if name in names else 'test'}/ only" for name in unlike),
        fix="Give each class pictures in both, or take it away.",
    )
    found = {split: [_list_files(place / split / name, left_out) for name in names] for split in SPLITS}
    images, labels, damaged = {}, {}, list[str]()
    for split, files in found.items():
        reader = _Reader(place, split, names, files, decoder)
        try:
            images[split], labels[split] = reader.read(Path(cache))
        except _Damaged as error:
            damaged += error.pictures
    require(
        not damaged,
        "root",
        expected=f"pictures that can be read in {place}",
        got=f"{len(damaged)} that cannot: " + "; ".join(damaged[:NAMED]) + ("; ..." if len(damaged) > NAMED else ""),
        fix="Replace them or take them away.",
    )
    for split in SPLITS:
        left_out["without ending that are no pictures"] += len(images[split].facts["left_out"])
    _print_counts(place, {split: len(labels[split]) for split in SPLITS}, len(names), left_out)
    return ImageSet(
        train_images=images["train"].array,
        train_labels=labels["train"],
        test_images=images["test"].array,
        test_labels=labels["test"],
        class_names=[_to_text(name) for name in names],
        superclass=None,
        mean=images["train"].facts["mean"],
        std=images["train"].facts["std"],
        checksums=(images["train"].checksum, images["test"].checksum),
    )


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


def _print_counts(place: Path, taken: dict[str, int], classes: int, left_out: Counter[str]) -> None:
    rest = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()) if count)
    print(
        f"cl_bench: {place}: took {taken['train']} training and {taken['test']} test pictures of {classes} classes; "
        f"left out: {rest or 'nothing'}",
        file=sys.stderr,
    )


# -- which files are pictures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file, and what of it changes with its content: size, and times of content and entry in nanoseconds."""

    path: str
    state: tuple[int, ...]


def _list_entries(place: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name."""
    try:
        with os.scandir(place) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ConfigError(
            "root",
            expected=f"a folder {place} with a folder of pictures a class",
            got=getattr(error, "strerror", None) or str(error),
            fix="Point scenario.source.root=PATH at the folder that holds train/ and test/.",
        ) from error


def _get_state(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of what the entry is or links to; None where that is nothing."""
    try:
        return entry.stat()
    except OSError:
        return None


def _skip_hidden(entry: os.DirEntry[str], left_out: Counter[str]) -> bool:
    if entry.name.startswith("."):  # .ipynb_checkpoints, ._1.png, .DS_Store
        left_out["whose names begin with a dot"] += 1
        return True
    return False


def _list_classes(place: Path, left_out: Counter[str]) -> list[str]:
    """The names of the class folders in ``place``."""
    names = []
    for entry in _list_entries(place):
        if _skip_hidden(entry, left_out):
            continue
        state = _get_state(entry)
        require(
            state is not None,
            "root",
            expected=f"class folders in {place}",
            got=f"{entry.path}, a link that leads nowhere",
            fix="Mend the link or take it away.",
        )
        if state is not None and stat.S_ISDIR(state.st_mode):
            names.append(entry.name)
        else:
            left_out["beside the class folders"] += 1
    return names


def _list_files(place: Path, left_out: Counter[str]) -> list[_File]:
    """What may be a picture in the folder of a class and below, in order of the names; the rest is counted."""

    def below(place: Path, above: frozenset[tuple[int, int]]) -> Iterator[_File]:
        for entry in _list_entries(place):
            if _skip_hidden(entry, left_out):
                continue
            state, ending = _get_state(entry), os.path.splitext(entry.name)[1].lower()
            if state is not None and stat.S_ISDIR(state.st_mode):
                here = (state.st_dev, state.st_ino)
                if here in above:
                    left_out["that link back to a folder above them"] += 1
                else:
                    yield from below(Path(entry.path), above | {here})
            elif state is not None and not stat.S_ISREG(state.st_mode):
                left_out["that are neither files nor folders"] += 1
            elif ending and ending not in list_endings():
                left_out[f"named *{_to_text(ending)}"] += 1
            else:  # a link that leads nowhere, too: it is named with the damaged pictures
                times = () if state is None else (state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                yield _File(entry.path, times)

    folder = place.resolve()
    states = [os.stat(above) for above in (folder, *folder.parents)]
    return list(below(place, frozenset((state.st_dev, state.st_ino) for state in states)))


def _to_text(name: str) -> str:
    r"""A name for people and reports; bytes that are no UTF-8 are shown as ``\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# -- their images --------------------------------------------------------------------------------------------------


class _Damaged(Exception):
    """Pictures that cannot be read, each with the reason."""

    def __init__(self, pictures: list[str]) -> None:
        super().__init__(pictures)
        self.pictures = pictures


class _Reader:
    """The pictures of a split, class by class, as images."""

    def __init__(self, root: Path, split: str, names: list[str], files: list[list[_File]], decoder: Decoder) -> None:
        self.root, self.split, self.names, self.decoder = root, split, names, decoder
        self.files = [file for own in files for file in own]
        self.labels = np.repeat(np.arange(len(names)), [len(own) for own in files])
        self.left_out: list[int] = []  # positions of files without ending that are no pictures
        self._refuse_empty_classes()

    def read(self, cache: Path) -> tuple[Stored, np.ndarray]:
        """(N, 3, size, size) uint8 images, decoded where the cache has none, and their (N,) labels.

        Raises:
            _Damaged: pictures that cannot be read; all of them are named.
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
                fix="Point scenario.source.cache=PATH at another place, or make room.",
            ) from error
        self.left_out = images.facts["left_out"]
        return images, np.delete(self.labels, self.left_out)

    def _choose_file(self, cache: Path) -> Path:
        root, start = self.root.resolve(), len(str(self.root / self.split))
        known = [(file.path[start:], *file.state) for file in self.files]
        key = hashlib.sha256(json.dumps([VERSION, astuple(self.decoder), str(root), known]).encode()).hexdigest()
        return cache / f"{_to_text(root.name)[:50]}-{self.split}-{self.decoder.size}-{key[:16]}.images"

    def _decode_rows(self) -> Iterator[np.ndarray]:
        """The images in order; nothing more of them once a picture was damaged."""
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
        with ThreadPoolExecutor() as pool, warnings.catch_warnings():  # PIL decodes outside Python's lock
            warnings.simplefilter("ignore")  # of metadata that is odd, and of pictures that are large
            for start in range(0, len(self.files), CHUNK):
                yield from pool.map(self._decode, self.files[start : start + CHUNK])

    def _decode(self, file: _File) -> np.ndarray | str | None:
        """The image, None where there is none, or why it cannot be read."""
        try:
            return self.decoder.decode(Path(file.path))
        except UnidentifiedImageError:
            return f"{_to_text(file.path)} (no picture that PIL knows)" if os.path.splitext(file.path)[1] else None
        except Exception as error:  # PIL raises many kinds for a damaged file
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            return f"{_to_text(file.path)} ({' '.join(reason.split())})"

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
            got=f"none that PIL can open in {', '.join(map(_to_text, empty))}",
            fix="Put some there, or take the class away.",
        )


def _measure_moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the pixels in [0, 1], a value a channel."""
    spread = np.unique(np.linspace(0, len(images) - 1, min(len(images), MEASURED)).astype(int))
    sums, squares = np.zeros(3), np.zeros(3)
    for start in range(0, len(spread), 500):
        part = images[spread[start : start + 500]].astype(np.float64) / 255
        sums += part.mean(axis=(2, 3)).sum(axis=0)
        squares += np.square(part).mean(axis=(2, 3)).sum(axis=0)
    mean = sums / len(spread)
    std = np.sqrt(np.maximum(squares / len(spread) - mean**2, 1e-6))  # pictures of one colour have none
    return mean.round(4).tolist(), std.round(4).tolist()
