"""CUB-200-2011 (Wah et al. 2011), 200 species of birds, as its archive is unpacked."""

from collections import Counter
from pathlib import Path

from cl_bench.core.errors import ConfigError
from cl_bench.data.base import ImageSet
from cl_bench.data.decoded import Part, build_decoder, read_pictures
from cl_bench.data.picture_files import PictureFile, find_file, read_lines, to_text


def cub200(*, root: str, size: int, cache: str, background: list[int], value_range: list[float] | None) -> ImageSet:
    """The pictures in ``root/images/`` with the official split: 5,994 training and 5,794 test pictures in all.

    Four files say which are which: ``classes.txt`` (class and name), ``images.txt`` (picture and path),
    ``image_class_labels.txt`` (picture and class) and ``train_test_split.txt`` (picture, and 1 for training or 0 for
    test). Any set of pictures in these files is read. The whole picture is used, not its bounding box.

    Args:
        root: the folder ``CUB_200_2011`` of the archive.
        size, cache, background, value_range: as in :func:`~cl_bench.data.folder.folder`.

    Raises:
        ConfigError: a file that is missing or does not belong to the others, or damaged pictures.
    """
    decoder = build_decoder(size, background, value_range)
    base = Path(root)
    names, pictures = (_read_pairs(base / f"{name}.txt") for name in ("classes", "images"))
    classes, training = (_read_pairs(base / f"{name}.txt") for name in ("image_class_labels", "train_test_split"))
    found: dict[str, dict[str, list[PictureFile]]] = {part: {c: [] for c in names} for part in ("1", "0")}
    for number, path in pictures.items():
        label, part = classes.get(number), training.get(number)
        if label not in names or part not in found:
            raise ConfigError(
                "root",
                expected=f"a class of classes.txt and a split 0 or 1 of each picture in {base / 'images.txt'}",
                got=f"class {label} and split {part} of picture {number}, {to_text(path)}",
                fix="Unpack the archive again.",
            )
        found[part][label].append(find_file(base / "images" / path))
    parts = [
        Part(name, base, list(found[key].values()), [f"the {name} pictures of {to_text(c)}" for c in names.values()])
        for name, key in (("train", "1"), ("test", "0"))
    ]
    called = [to_text(name) for name in names.values()]
    return read_pictures(base, called, parts, decoder=decoder, cache=cache, left_out=Counter[str]())


def _read_pairs(path: Path) -> dict[str, str]:
    """The first word of each line -> the rest."""
    pairs = {}
    for number, line in enumerate(read_lines(path), 1):
        key, _, value = line.strip().partition(" ")
        if not value or key in pairs:
            raise ConfigError(
                "root",
                expected=f"a number and a value in each line of {path}, each number once",
                got=f"line {number}: {to_text(line)!r}",
                fix="Unpack the archive again.",
            )
        pairs[key] = value
    return pairs
