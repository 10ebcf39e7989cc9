"""Pictures of your own: a folder a class, decoded once into a file that is mapped into memory."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cl_bench.atomic import write_text
from cl_bench.data.base import ImageSet
from cl_bench.errors import ConfigError, require

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
SPLITS = ("train", "test")

MEASURED = 10_000
"""Training images, evenly spread, that mean and standard deviation are measured on."""


def folder(*, root: str, size: int, cache: str) -> ImageSet:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*`` as RGB images of ``size`` x ``size`` pixels.

    Each picture is scaled so that its shorter side fits, and cut around its centre. The decoded images lie in
    ``cache``, under a name made of the pictures' names, sizes and times: a second run reads no picture, and a changed
    picture is noticed. The arrays are memory-mapped, so a set may be larger than the memory.

    Args:
        root: the folder; classes are the sub-folders of ``train``, in alphabetical order.
        size: side of the images in pixels.
        cache: folder of the decoded images.

    Raises:
        ConfigError: no such folders, a class without pictures or unknown in ``train``, or a picture that is damaged.
    """
    require(size > 0, "size", expected="1 or more pixels", got=size, fix="32 is CIFAR's size, 224 ImageNet's.")
    names = sorted(path.name for path in _listed(Path(root) / "train") if path.is_dir())
    require(
        len(names) > 1,
        "root",
        expected=f"two or more class folders in {Path(root) / 'train'}",
        got=names or "none",
        fix="Put the pictures of each class into a folder of its own.",
    )
    images, labels = {}, {}
    for split in SPLITS:
        pictures = _pictures(Path(root) / split, names)
        labels[split] = np.array([label for _, label in pictures])
        images[split] = _decoded([path for path, _ in pictures], size, Path(cache), f"{Path(root).name}-{split}")
    mean, std = _moments(images["train"])
    return ImageSet(
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        class_names=names,
        superclass=None,
        mean=mean,
        std=std,
    )


def _listed(place: Path) -> list[Path]:
    try:
        return sorted(place.iterdir())
    except OSError as error:
        raise ConfigError(
            "root",
            expected=f"a folder {place} with a folder of pictures a class",
            got=error.strerror or str(error),
            fix="Point scenario.source.root=PATH at the folder that holds train/ and test/.",
        ) from error


def _pictures(place: Path, names: list[str]) -> list[tuple[Path, int]]:
    """Every picture with its label, class by class."""
    found = []
    for path in _listed(place):
        if path.is_dir():
            require(
                path.name in names,
                "root",
                expected=f"classes of train/ only in {place}",
                got=path.name,
                fix="Give it pictures in train/ too, or take it away.",
            )
    for label, name in enumerate(names):
        own = [path for path in _listed(place / name) if path.suffix.lower() in ENDINGS]
        require(
            bool(own),
            "root",
            expected=f"pictures ({', '.join(sorted(ENDINGS))}) in {place / name}",
            got="none",
            fix="Put some there, or take the class away.",
        )
        found += [(path, label) for path in own]
    return found


def _decoded(paths: list[Path], size: int, cache: Path, name: str) -> np.ndarray:
    """(N, 3, size, size) uint8, memory-mapped from the cache."""
    known = [(str(p), (s := p.stat()).st_size, s.st_mtime_ns) for p in paths]
    key = hashlib.sha256(json.dumps([size, known]).encode()).hexdigest()[:16]
    file, note = cache / f"{name}-{size}-{key}.npy", cache / f"{name}-{size}-{key}.json"
    if not (file.exists() and note.exists()):  # the note is written last, so a killed decoding is begun anew
        try:
            cache.mkdir(parents=True, exist_ok=True)
            array = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(len(paths), 3, size, size))
            for i, pixels in enumerate(_pixels(paths, size, name)):
                array[i] = pixels
            array.flush()
            write_text(note, json.dumps({"pictures": len(paths), "size": size}) + "\n")
        except OSError as error:
            raise ConfigError(
                "cache",
                expected=f"a folder with room for {len(paths) * 3 * size * size / 2**20:.0f} MiB of decoded images",
                got=f"{cache} ({error.strerror or error})",
                fix="Point scenario.source.cache=PATH at another place.",
            ) from error
    # copy-on-write: torch wants a tensor that could be written to, the file never is
    return np.load(file, mmap_mode="c", allow_pickle=False)


def _pixels(paths: list[Path], size: int, name: str) -> Iterator[np.ndarray]:
    from rich.progress import track

    def decode(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as picture:
                return np.asarray(ImageOps.fit(picture.convert("RGB"), (size, size))).transpose(2, 0, 1)
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises each of them for a damaged file
            raise ConfigError(
                "root", expected="pictures that can be read", got=f"{path} ({error})", fix="Mend it or take it away."
            ) from error

    with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
        yield from track(pool.map(decode, paths), description=f"decoding {name}", total=len(paths))


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
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
