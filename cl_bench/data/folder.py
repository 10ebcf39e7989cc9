"""Pictures in one folder per class: your own, ImageNet's, and Tiny-ImageNet's as it is unpacked."""

import os
from collections import Counter
from pathlib import Path

from cl_bench.core.errors import ConfigError, require, void
from cl_bench.data.base import ImageSet
from cl_bench.data.decoded import NAMED, Files, Part, build_decoder, check_drawing, draw_test_files, read_pictures
from cl_bench.data.picture_files import find_file, list_classes, list_files, read_lines, to_text

ANNOTATIONS, WORDS = "val_annotations.txt", "words.txt"
"""Files of Tiny-ImageNet: the class of each picture in ``val/images/``, and what the classes are called."""


@void("split_seed", when=lambda v: v["test_fraction"] == 0, why="test_fraction=0 draws nothing")
def folder(
    *,
    root: str,
    size: int,
    cache: str,
    background: list[int],
    value_range: list[float] | None,
    test_fraction: float,
    split_seed: int,
) -> ImageSet:
    """The pictures in ``root/train/CLASS/`` and ``root/test/CLASS/`` as RGB images of ``size`` x ``size`` pixels.

    Without ``test/``, the test pictures are those in ``val/CLASS/`` (ImageNet). If there is a ``val/images/`` with
    ``val_annotations.txt`` (Tiny-ImageNet), it is taken, since the ``test/`` beside it has no labels; if ``words.txt``
    names the classes, they get these names. With neither, ``test_fraction`` of each class in ``train/CLASS/``, or in
    ``root/CLASS/``, is drawn for the test.

    A picture is a file that PIL can open: by its ending or, if it has none, by its content. Sub-folders of a class are
    searched too. Names that begin with a dot and other files are left out; a line on standard error says how many.
    Each picture is scaled so that its shorter side fits, and cropped at its centre. If a file has several pictures
    (GIF, TIFF), the first is used. Decoded images are cached, see :func:`~cl_bench.data.decoded.read_pictures`.

    Args:
        root: the folder; classes are the sub-folders of ``train``, in alphabetical order.
        size: side of the images in pixels.
        cache: folder of the decoded images.
        background: red, green and blue, 0 to 255, behind transparent pixels.
        value_range: the values that become black and white if a picture has more than eight bits per channel; None for
            the whole range of 16 bits. Pictures of 32-bit integers or floating-point numbers need one.
        test_fraction: part of each class that is drawn for the test, at least one picture; 0 if there are test
            pictures.
        split_seed: draws them.

    Raises:
        ConfigError: missing folders, a class without pictures or not in ``train``, or damaged pictures.
    """
    decoder = build_decoder(size, background, value_range)
    base, left_out, notes = Path(root), Counter[str](), list[str]()
    test = _find_test_folder(base)
    train = base if test is None and not (base / "train").is_dir() and base.is_dir() else base / "train"
    names = _find_classes(train, Path(cache), left_out)
    check_drawing(test_fraction, split_seed, None if test is None else str(test), f"{base / 'test'} or {base / 'val'}")
    files = [list_files(train / name, left_out) for name in names]
    if test is None:
        files, drawn = draw_test_files(files, list(map(to_text, names)), test_fraction, split_seed)
        tested = Part("test", train, drawn, _list_places(train, names))
        notes.append(f"drew the test pictures: {test_fraction} of each class by split_seed={split_seed}")
    else:
        if (test / ANNOTATIONS).is_file():
            found, places = _find_annotated(test, names), [f"{test / ANNOTATIONS}: {to_text(name)}" for name in names]
            if (base / "test").is_dir():
                left_out["folder without labels: test"] += 1
        else:
            _require_same_classes(train, test, names, list_classes(test, left_out))
            found, places = [list_files(test / name, left_out) for name in names], _list_places(test, names)
        tested = Part("test", test, found, places)
    return read_pictures(
        base,
        _name_classes(base, names),
        [Part("train", train, files, _list_places(train, names)), tested],
        decoder=decoder,
        cache=cache,
        left_out=left_out,
        notes=notes,
    )


def _find_test_folder(root: Path) -> Path | None:
    """The folder with the test pictures; None if they have to be drawn."""
    if (root / "val" / ANNOTATIONS).is_file():
        return root / "val"
    return next((root / name for name in ("test", "val") if (root / name).is_dir()), None)


def _list_places(folder: Path, names: list[str]) -> list[str]:
    return [to_text(str(folder / name)) for name in names]


def _find_classes(folder: Path, cache: Path, left_out: Counter[str]) -> list[str]:
    """The names of the classes; two or more. The cache may lie beside them."""
    names = [
        name for name in list_classes(folder, left_out) if os.path.abspath(folder / name) != os.path.abspath(cache)
    ]
    require(
        len(names) > 1,
        "root",
        expected=f"two or more class folders in {folder}",
        got=", ".join(map(to_text, names)) or "none",
        fix="Put the pictures of each class into a folder of its own.",
    )
    return names


def _require_same_classes(train: Path, test: Path, names: list[str], others: list[str]) -> None:
    unlike = sorted(set(names) ^ set(others))
    where = [f"{to_text(name)} in {(train if name in names else test).name}/ only" for name in unlike]
    require(
        not unlike,
        "root",
        expected=f"the same class folders in {train} and {test}",
        got=", ".join(where[:NAMED]) + (", ..." if len(where) > NAMED else ""),
        fix="Give each class pictures in both, or remove it.",
    )


def _find_annotated(folder: Path, names: list[str]) -> Files:
    """The files of each class in ``folder/images/``: a line of the annotations has a file and its class, and a box."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for number, line in enumerate(read_lines(folder / ANNOTATIONS), 1):
        words = line.split("\t")
        if len(words) < 2 or words[1] not in found:
            raise ConfigError(
                "root",
                expected=f"in each line of {folder / ANNOTATIONS} a file and a class that train/ has, between tabs",
                got=f"line {number}: {line!r}",
                fix="Unpack the archive again.",
            )
        found[words[1]].append(words[0])
    return [[find_file(folder / "images" / name) for name in sorted(own)] for own in found.values()]


def _name_classes(root: Path, names: list[str]) -> list[str]:
    """What ``words.txt`` calls the classes, up to the first comma, if it has them all; with the folder's name if two
    classes are called the same."""
    texts = list(map(to_text, names))
    if not (root / WORDS).is_file():
        return texts
    words = dict(line.split("\t", 1) for line in read_lines(root / WORDS) if "\t" in line)
    called = [words.get(text, "").split(",")[0].strip() for text in texts]
    if not all(called):
        return texts
    counts = Counter(called)
    return [name if counts[name] == 1 else f"{name} ({text})" for name, text in zip(called, texts)]
