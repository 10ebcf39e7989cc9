"""Pictures with boxes in COCO's format: ``root/annotations/instances_NAME.json`` and the pictures in ``root/NAME/``."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.detection import DetectionSet, check_size, pad_objects

NAMED = 10
"""Largest number of wrong entries that a message names."""

Objects = list[tuple[float, ...]]
"""The objects of a picture: class id and box each."""


def coco(*, root: str, train: str, test: str, size: int) -> DetectionSet:
    """The pictures and boxes of two of COCO's files, scaled to ``size`` x ``size`` pixels (the sides one by one).

    Classes are the categories of the training file, in the order of their ids. Boxes are cut at the picture's border.
    Crowds, and boxes without area, are left out; a line on standard error says how many. Everything is in memory.

    Args:
        root: the folder.
        train, test: NAME of the training and of the test pictures, e.g. ``train2017`` and ``val2017``.

    Raises:
        ConfigError: files that are missing or damaged; one message names the entries that are wrong.
    """
    check_size(size, "256 is a small size for COCO.")
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
    most = max(len(own) for of_split in objects for own in of_split)
    require(most > 0, "root", expected="objects", got="none in any picture", fix="Use annotated pictures.")
    counts = f"took {len(images[0])} training and {len(images[1])} test pictures of {len(first.names)} classes"
    left = f"{first.crowds + second.crowds} crowds, {first.flat + second.flat} boxes without area"
    print(f"cl_bench: {root}: {counts}; left out: {left}", file=sys.stderr)
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
        self.folder, self.path = root / name, root / "annotations" / f"instances_{name}.json"
        self.crowds = self.flat = 0
        content = self._load()
        self._wrong: list[str] = []
        self.names = {c["id"]: c["name"] for c in self._list(content, "categories", id=int, name=str)}
        self.names = dict(sorted(self.names.items()))
        self._pictures = {
            p["id"]: p for p in self._list(content, "images", id=int, file_name=str, width=int, height=int)
        }
        self._objects: dict[int, Objects] = {number: [] for number in self._pictures}
        for entry in self._list(content, "annotations", image_id=int, category_id=int, bbox=list):
            self._add(entry)
        self._refuse(not self._pictures, "no picture")
        self._refuse(not self.names, "no category")

    def read(self, size: int) -> tuple[np.ndarray, list[Objects]]:
        """(N, 3, size, size) uint8 pictures, in the order of their ids, and the objects of each."""
        from PIL import Image

        images = np.empty((len(self._pictures), 3, size, size), dtype=np.uint8)
        for row, (_, entry) in enumerate(sorted(self._pictures.items())):
            try:
                with Image.open(self.folder / entry["file_name"]) as picture:
                    same = picture.size == (entry["width"], entry["height"])
                    self._refuse(not same, f"{entry['file_name']} has {picture.size} pixels")
                    images[row] = np.asarray(picture.convert("RGB").resize((size, size))).transpose(2, 0, 1)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                self._wrong.append(f"{entry['file_name']} ({' '.join(str(error).split())})")
        self._raise("pictures that can be read")
        return images, [self._objects[number] for number in sorted(self._pictures)]

    def _load(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
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
        right, seen = [], set()
        for position, entry in enumerate(content[key]):
            known = entry if isinstance(entry, dict) else {}
            wrong = [name for name, kind in kinds.items() if not _is_of_kind(known.get(name), kind)]
            if wrong:
                self._wrong.append(f"{key}[{position}]: {wrong[0]}")
            elif "id" in kinds and entry["id"] in seen:
                self._wrong.append(f"{key}[{position}]: id {entry['id']} again")
            else:
                right.append(entry)
                seen.add(entry.get("id"))
        return right

    def _add(self, entry: dict[str, Any]) -> None:
        """Take one annotation."""
        number, picture = entry.get("id"), self._pictures.get(entry["image_id"])
        box = entry["bbox"]
        if picture is None or entry["category_id"] not in self.names:
            self._wrong.append(f"annotation {number}: no such image or category")
        elif len(box) != 4 or not all(_is_of_kind(value, float) for value in box) or min(box[2:]) < 0:
            self._wrong.append(f"annotation {number}: bbox {box}")
        elif entry.get("iscrowd"):
            self.crowds += 1
        else:
            self._place(entry["image_id"], list(self.names).index(entry["category_id"]), box, picture)

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
            expected=f"{expected} and annotations that are whole in {self.path}",
            got=f"{len(self._wrong)} wrong: {'; '.join(self._wrong[:NAMED])}{more}",
            fix="Correct or remove them.",
        )


def _is_of_kind(value: Any, kind: type) -> bool:
    """Whether a value of a JSON file is of a kind; a float may be a whole number, and is finite; a size is positive."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind
