"""Pictures that a CSV file lists, each with its label and, if it says so, the part that it belongs to."""

import csv
from collections import Counter
from pathlib import Path

from cl_bench.core.errors import ConfigError, require, void
from cl_bench.data.base import ImageSet
from cl_bench.data.decoded import Files, Part, build_decoder, check_drawing, draw_test_files, read_pictures
from cl_bench.data.picture_files import PictureFile, find_file, read_lines, to_text

COLUMNS = ("path", "label", "split")

SPLITS = ("train", "test", "val")


@void("split_seed", when=lambda v: v["test_fraction"] == 0, why="test_fraction=0 draws nothing")
def picture_list(
    *,
    root: str,
    file: str,
    size: int,
    cache: str,
    background: list[int],
    value_range: list[float] | None,
    test_fraction: float,
    split_seed: int,
) -> ImageSet:
    """The pictures in the CSV file ``root/file``, one in each line: its path below ``root``, its label, its split.

    A first line ``path,label,split`` may name the columns, in any order; without it they come in this order. The split
    is ``train``, ``test`` or ``val``. Pictures of ``val`` are the test pictures if there are none of ``test``, and are
    left out if there are. Without the column ``split``, ``test_fraction`` of each class is drawn for the test. Labels
    are numbers, in their order, or texts, in alphabetical order; they are the names of the classes.

    Args:
        root: the folder of the list.
        file: its name.
        size, cache, background, value_range: as in :func:`~cl_bench.data.folder.folder`.
        test_fraction: part of each class that is drawn for the test, at least one picture; 0 if the list says a split.
        split_seed: draws them.

    Raises:
        ConfigError: a line that cannot be understood, a picture listed twice, a class without training or test
            pictures, or damaged pictures.
    """
    decoder = build_decoder(size, background, value_range)
    base, path, left_out, notes = Path(root), Path(root) / file, Counter[str](), list[str]()
    rows = _read_rows(path)
    splits = Counter(split for *_, split in rows)
    of_test = "test" if splits["test"] or not splits["val"] else "val"
    with_split = "" not in splits
    check_drawing(test_fraction, split_seed, f"the column split of {path}" if with_split else None, str(path))
    names = _sort_labels({label for _, label, _ in rows})
    require(
        len(names) > 1,
        "file",
        expected=f"two or more labels in {path}",
        got=", ".join(names) or "none",
        fix="Add some.",
    )

    def gather(*splits: str) -> Files:
        found: dict[str, list[PictureFile]] = {name: [] for name in names}
        for picture, label, split in rows:
            if split in splits:
                found[label].append(find_file(base / picture))
        return list(found.values())

    if with_split:
        train, test = gather("train"), gather(of_test)
        if of_test == "test":
            left_out["of the split val"] += splits["val"]
    else:
        train, test = draw_test_files(gather(""), names, test_fraction, split_seed)
        notes.append(f"drew the test pictures: {test_fraction} of each class by split_seed={split_seed}")
    parts = [
        Part(part, base, files, [f"{path}: {part} pictures of {name}" for name in names])
        for part, files in (("train", train), ("test", test))
    ]
    return read_pictures(base, names, parts, decoder=decoder, cache=cache, left_out=left_out, notes=notes)


def _read_rows(path: Path) -> list[tuple[str, str, str]]:
    """Path, label and split of each picture; the split is empty if the list has none."""
    lines = list(csv.reader(read_lines(path)))
    require(len(lines) > 0, "file", expected=f"lines with a path and a label in {path}", got="none", fix="Add some.")
    columns = [word.strip().lower() for word in lines[0]]
    headed = {"path", "label"} <= set(columns)
    if not headed:
        columns = list(COLUMNS[: len(columns)])
    rows, seen = [], set[str]()
    for number, words in enumerate(lines[headed:], 1 + headed):
        row = dict(zip(columns, (word.strip() for word in words)))
        picture, label, split = (row.get(column, "") for column in COLUMNS)
        right = len(words) == len(columns) and picture and label and split in (SPLITS if "split" in columns else ("",))
        if not right or picture in seen:
            raise ConfigError(
                "file",
                expected=f"in each line of {path} a path, a label and, if anywhere, a split (train, test or val)",
                got=f"line {number}: {to_text(','.join(words))}{', a second time' if picture in seen else ''}",
                fix="Correct the line; a first line path,label,split names the columns.",
            )
        seen.add(picture)
        rows.append((picture, to_text(label), split))
    return rows


def _sort_labels(labels: set[str]) -> list[str]:
    """Numbers in their order, other texts in alphabetical order."""
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)
