"""Pictures with boxes in COCO's format: ``root/annotations/instances_NAME.json`` and the pictures in ``root/NAME/``."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.detection import DetectionSet, check_size, pad_objects
from cl_bench.data.pictures import Decoder

NAMED = 10
"""Largest number of wrong entries that a message names."""

LARGEST = 1e6
"""Pixels that no picture has."""

UNIQUE = {"id", "name", "file_name"}
"""Keys that are read, and whose value no two entries of a list share."""

Objects = list[tuple[float, ...]]
"""The objects of a picture: class id and box each."""


def coco(*, root: str, train: str, test: str, size: int) -> DetectionSet:
    """The pictures and boxes of two of COCO's files, scaled to ``size`` x ``size`` pixels (the sides one by one).

    Classes are the categories of the training file, in the order of their ids. Boxes are cut at the picture's border.
    Crowds, and boxes without area, are left out; a line on standard error says how many, and which classes have no box.
    A picture is shown as its EXIF data say, unless it has its size in the file as stored. Everything is in memory.

    Args:
        root: the folder.
        train, test: NAME of the training and of the test pictures, e.g. ``train2017`` and ``val2017``.
        size: side of the images in pixels.

    Raises:
        ConfigError: files that are missing or damaged; one message names the entries that are wrong.
    """
    check_size(size, "256 is a small size for COCO.")
    require(train != test, "test", expected=f"other pictures than {train}", got=test, fix="Name another file.")
    first, second = (_Annotations(Path(root), name) for name in (train, test))
    unlike = sorted(set(first.names.items()) ^ set(second.names.items()))
    require(
        not unlike,
        "test",
        expected=f"the categories of {train}",
        got=f"others: {unlike[:NAMED]}",
        fix="Take two files with the same categories.",
    )
    images, objects = zip(*(file.read(size) for file in (first, second)))
    counts = f"took {len(images[0])} training and {len(images[1])} test pictures of {len(first.names)} classes"
    left = f"{first.crowds + second.crowds} crowds, {first.flat + second.flat} boxes without area"
    print(f"cl_bench: {root}: {counts}; left out: {left}{first.name_bare()}{second.name_bare()}", file=sys.stderr)
    most = max(len(own) for of_split in objects for own in of_split)
    return DetectionSet(
        images[0], pad_objects(objects[0], most), images[1], pad_objects(objects[1], most), list(first.names.values())
    )


class _Annotations:
    """One file of annotations: the entries that are right, and a message for all that are not.

    Attributes:
        names: by category id.
        crowds, flat: how many annotations were left out.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.folder, self.path = name, root / name, root / "annotations" / f"instances_{name}.json"
        self.crowds = self.flat = 0
        content = self._load()
        self._wrong: list[str] = []
        self.names = {c["id"]: c["name"] for c in self._list(content, "categories", id=int, name=str)}
        self.names = dict(sorted(self.names.items()))
        self._positions = {number: position for position, number in enumerate(self.names)}
        self._pictures = {
            p["id"]: p for p in self._list(content, "images", id=int, file_name=str, width=int, height=int)
        }
        self._objects: dict[int, Objects] = {number: [] for number in self._pictures}
        for entry in self._list(content, "annotations", image_id=int, category_id=int, bbox=list):
            self._add(entry)
        self._refuse(not self._pictures, "no picture")
        self._refuse(not self.names, "no category")
        self._refuse(not any(self._objects.values()), "no object")
        self._raise(f"annotations that are whole in {self.path}")

    def name_bare(self) -> str:
        """The classes without an object, as the end of a sentence; empty if there are none."""
        found = {position for own in self._objects.values() for position, *_ in own}
        bare = [name for position, name in enumerate(self.names.values()) if position not in found]
        more = ", ..." if len(bare) > NAMED else ""
        return f"; in {self.name} there is no box of {', '.join(bare[:NAMED])}{more}" if bare else ""

    def read(self, size: int) -> tuple[np.ndarray, list[Objects]]:
        """(N, 3, size, size) uint8 pictures, in the order of their ids, and the objects of each."""
        decoder = Decoder(size, (255, 255, 255), None)
        images = np.empty((len(self._pictures), 3, size, size), dtype=np.uint8)
        for row, (_, entry) in enumerate(sorted(self._pictures.items())):
            stated = (entry["width"], entry["height"])
            try:
                picture = decoder.read(self.folder / entry["file_name"], stated)
                self._refuse(picture.size != stated, f"{entry['file_name']} has {picture.size} pixels")
                images[row] = np.asarray(picture.resize((size, size))).transpose(2, 0, 1)
            except Exception as error:  # PIL raises many types
                self._wrong.append(f"{entry['file_name']} ({' '.join(str(error).split())})")
        self._raise(f"pictures in {self.folder} that can be read")
        return images, [self._objects[number] for number in sorted(self._pictures)]

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                "root",
                expected=f"annotations in COCO's format in {self.path}",
                got=getattr(error, "strerror", None) or f"text that is damaged ({error})",
                fix="Put the file there; scenario.source.train and test name it.",
            ) from error
        known = isinstance(content, dict) and all(
            isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
        )
        require(
            known,
            "root",
            expected=f"an object with the lists images, annotations and categories in {self.path}",
            got="something else",
            fix="Use a file of COCO's object detection.",
        )
        return content

    def _list(self, content: dict[str, Any], key: str, **kinds: type) -> list[dict[str, Any]]:
        """The entries of a list that have these keys and types; the others are wrong, as is an id that comes twice."""
        right: list[dict[str, Any]] = []
        seen: set[tuple[str, Any]] = set()
        for position, entry in enumerate(content[key]):
            known = entry if isinstance(entry, dict) else {}
            wrong = [name for name, kind in kinds.items() if not _is_right(name, known.get(name), kind)]
            names = UNIQUE & {"id", *kinds}
            own = {(name, known[name]) for name in names if type(known.get(name)) in (int, str)}
            if wrong:
                self._wrong.append(f"{key}[{position}]: {wrong[0]}")
            elif again := sorted(own & seen):
                self._wrong.append(f"{key}[{position}]: {again[0][0]} {again[0][1]} again")
            else:
                right.append(entry)
                seen |= own
        return right

    def _add(self, entry: dict[str, Any]) -> None:
        """Take one annotation."""
        number, picture = entry.get("id"), self._pictures.get(entry["image_id"])
        box = entry["bbox"]
        if picture is None or entry["category_id"] not in self.names:
            self._wrong.append(f"annotation {number}: no such image or category")
        elif len(box) != 4 or not all(_is_right("bbox", value, float) for value in box) or min(box[2:]) < 0:
            self._wrong.append(f"annotation {number}: bbox {str(box)[:60]}")
        elif entry.get("iscrowd") not in (None, 0, 1):
            self._wrong.append(f"annotation {number}: iscrowd {entry['iscrowd']!r}")
        elif entry.get("iscrowd"):
            self.crowds += 1
        else:
            self._place(entry["image_id"], self._positions[entry["category_id"]], box, picture)

    def _place(self, image: int, category: int, box: list[float], picture: dict[str, Any]) -> None:
        sides = (picture["width"], picture["height"])
        starts = [min(max(box[i] / side, 0.0), 1.0) for i, side in enumerate(sides)]
        ends = [min(max((box[i] + box[i + 2]) / side, 0.0), 1.0) for i, side in enumerate(sides)]
        sizes = [end - start for start, end in zip(starts, ends)]
        if min(sizes) <= 0:
            self.flat += 1
            return
        centre = [(start + end) / 2 for start, end in zip(starts, ends)]
        self._objects[image].append((category, *centre, *sizes))

    def _refuse(self, condition: bool, what: str) -> None:
        if condition:
            self._wrong.append(what)

    def _raise(self, expected: str) -> None:
        """One message for everything that is wrong so far."""
        more = "; ..." if len(self._wrong) > NAMED else ""
        require(
            not self._wrong,
            "root",
            expected=expected,
            got=f"{len(self._wrong)} wrong: {'; '.join(self._wrong[:NAMED])}{more}",
            fix="Correct or remove them.",
        )


def _is_right(name: str, value: Any, kind: type) -> bool:
    """Whether a value of a JSON file is of its kind, where a float may be a whole number; and sides have pixels."""
    if kind is float:
        return type(value) in (int, float) and abs(value) < LARGEST
    if name in ("width", "height"):
        return type(value) is int and 0 < value < LARGEST
    return type(value) is kind
