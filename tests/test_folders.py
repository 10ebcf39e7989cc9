"""Published folders and lists of pictures in exactly the forms in which they are unpacked, made of tiny pictures."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import configure
from PIL import Image

from cl_bench.config.build import build, build_scenario, identify_run
from cl_bench.config.schema import to_plain_dict
from cl_bench.core.errors import ConfigError
from cl_bench.data.cub200 import cub200
from cl_bench.data.folder import folder
from cl_bench.data.picture_list import picture_list

KEYS = {"size": 8, "background": [255, 255, 255], "value_range": None}
DRAWN = {"test_fraction": 0.0, "split_seed": 0}


def save(path: Path, grey: int, size: tuple[int, int] = (9, 7)) -> None:
    """A picture of one grey, which JPEG keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path, "JPEG", quality=95)


def read_greys(images: np.ndarray) -> list[int]:
    return images[:, 0, 4, 4].tolist()


def open_folder(root: Path, **keys):
    return folder(**({"root": str(root), "cache": str(root.parent / "decoded")} | KEYS | DRAWN | keys))


def open_list(root: Path, **keys):
    own = {"root": str(root), "cache": str(root.parent / "decoded"), "file": "list.csv"}
    return picture_list(**(own | KEYS | DRAWN | keys))


def open_cub(root: Path):
    return cub200(root=str(root), cache=str(root.parent / "decoded"), **KEYS)


# -- Tiny-ImageNet -----------------------------------------------------------------------------------------------------

WNIDS = {"n02124075": "Egyptian cat", "n02012849": "crane", "n03126707": "crane, heavy machine"}


def make_tiny_imagenet(root: Path) -> Path:
    """Three classes; the greys of class c are 50 c + picture number, and 20 more in ``val``."""
    boxes = []
    for c, name in enumerate(sorted(WNIDS)):
        for i in range(3):
            save(root / "train" / name / "images" / f"{name}_{i}.JPEG", 50 * c + i, (64, 64))
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        for i in range(2):
            boxes.append(f"val_{2 * c + i}.JPEG\t{name}\t0\t32\t44\t62")
            save(root / "val" / "images" / f"val_{2 * c + i}.JPEG", 50 * c + 20 + i, (64, 64))
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(boxes)) + "\n")
    save(root / "test" / "images" / "test_0.JPEG", 0, (64, 64))
    words = WNIDS | {"n00001740": "entity"}
    (root / "words.txt").write_text("".join(f"{name}\t{text}\n" for name, text in words.items()))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    return root


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path, capsys):
    root = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    found = open_folder(root, size=64)
    assert found.class_names == ["crane (n02012849)", "Egyptian cat", "crane (n03126707)"]
    assert read_greys(found.train_images) == [0, 1, 2, 50, 51, 52, 100, 101, 102]
    assert found.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert read_greys(found.test_images) == [20, 21, 70, 71, 120, 121]
    assert found.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        "took 9 training and 6 test pictures of 3 classes; left out: 1 folder without labels: test, 3 named *.txt"
        in (capsys.readouterr().err)
    )
    (root / "words.txt").unlink()
    assert open_folder(root, size=64).class_names == sorted(WNIDS)
    config = configure("scenario=tiny_imagenet", f"data_dir={tmp_path}", "scenario.num_tasks=3", "device=cpu")
    parts = build(config)
    assert parts.scenario.image_shape == (3, 64, 64)
    assert [task.test.index.tolist() for task in parts.scenario.tasks] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "val/images/val_3.JPEG").unlink(), "got 1 that cannot: .*val_3.JPEG (No such file"),
        (lambda r: (r / "val/images/val_3.JPEG").write_bytes(b"\xff\xd8\xff"), "got 1 that cannot: .*val_3.JPEG ("),
        (lambda r: (r / "train/n02124075").rename(r / "gone"), "a class that train/ has, .*got line .*n02124075"),
        (lambda r: (r / "val/val_annotations.txt").write_text("val_0.JPEG\n"), "got line 1: 'val_0.JPEG'"),
        (
            lambda r: (r / "val/val_annotations.txt").write_text("val_0.JPEG\tn02124075\n"),
            "val_annotations.txt: n02012849",
        ),
        (lambda r: [p.unlink() for p in (r / "train/n02124075/images").iterdir()], "open in .*train/n02124075. Put"),
    ],
    ids=["missing", "damaged", "foreign class", "no class", "none of a class", "empty class"],
)
def test_what_is_wrong_with_tiny_imagenet_is_said_in_one_message(spoil, message, tmp_path):
    root = make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    spoil(root)
    with pytest.raises(ConfigError, match=r"^root: expected ") as caught:
        open_folder(root)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    assert re.search(pattern, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


# -- ImageNet, and folders without a test set --------------------------------------------------------------------------


def make_imagenet(root: Path, classes: int = 3, train: int = 5, val: int = 2) -> Path:
    for c in range(classes):
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                save(root / split / f"n{c:08}" / f"n{c:08}_{i}.JPEG", 40 * c + i + 20 * (split == "val"), (50, 40))
    return root


@pytest.mark.parametrize("size", [64, 224])
def test_imagenet_by_folder_is_mapped_into_memory_at_its_size(size, tmp_path):
    root = make_imagenet(tmp_path / "imagenet100")
    first = open_folder(root, size=size)
    assert isinstance(first.train_images, np.memmap)
    assert first.train_images.shape == (15, 3, size, size)
    assert isinstance(first.test_images, np.memmap)
    assert read_greys(first.test_images) == [20, 21, 60, 61, 100, 101]
    assert len(list((tmp_path / "decoded").glob(f"imagenet100-*-{size}-*.images"))) == 2
    assert open_folder(root, size=size).digest == first.digest
    (root / "val").rename(root / "test")  # the same pictures under the other name
    assert open_folder(root, size=size).digest == first.digest


def test_a_class_of_one_folder_only_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"root: expected a folder .*none/train"):
        open_folder(tmp_path / "none")
    root = make_imagenet(tmp_path / "imagenet")
    (root / "val" / "n00000002").rename(root / "val" / "n00000007")
    with pytest.raises(ConfigError, match="got n00000002 in train/ only, n00000007 in val/ only"):
        open_folder(root)


@pytest.mark.parametrize("inside", ["train", "."])
def test_test_pictures_are_drawn_by_a_seed_where_there_are_none(inside, tmp_path, capsys):
    root = make_imagenet(tmp_path / "mine", val=0)
    if inside == ".":
        for path in (root / "train").iterdir():
            path.rename(root / path.name)
        (root / "train").rmdir()
    first = open_folder(root, cache=str(root / "decoded"), test_fraction=0.4)
    assert "drew the test pictures: 0.4 of each class by split_seed=0" in capsys.readouterr().err
    assert (first.train_labels.tolist(), first.test_labels.tolist()) == (
        [0] * 3 + [1] * 3 + [2] * 3,
        [0, 0, 1, 1, 2, 2],
    )
    greys = sorted(read_greys(first.train_images) + read_greys(first.test_images))
    assert greys == [40 * c + i for c in range(3) for i in range(5)]
    again = open_folder(root, cache=str(root / "decoded"), test_fraction=0.4)  # the cache is no class
    assert again.digest == first.digest
    keys = {"cache": str(root / "decoded"), "test_fraction": 0.4}
    others = [open_folder(root, split_seed=seed, **keys).digest for seed in range(1, 4)]
    assert len({first.digest, *others}) == 4
    with pytest.raises(ConfigError, match="test_fraction: expected a number between 0 and 1, since there are no test"):
        open_folder(root)
    with pytest.raises(ConfigError, match=r"got 5 pictures of n00000000 at 0.95"):
        open_folder(root, **(keys | {"test_fraction": 0.95}))


def test_a_drawn_split_is_in_the_record_and_refused_where_it_does_nothing(tmp_path):
    root = make_imagenet(tmp_path / "mine", val=0)
    typed = ["scenario=folder", f"data_dir={root}", "scenario.num_tasks=3", "scenario.source.size=8", "device=cpu"]
    config = configure(*typed, "scenario.source.test_fraction=0.2", "scenario.source.split_seed=3")
    settings, _ = identify_run(config, to_plain_dict(config))
    assert (settings["scenario.source.test_fraction"], settings["scenario.source.split_seed"]) == (0.2, 3)
    assert "data" in settings
    with pytest.raises(ConfigError, match=r"scenario.source.split_seed: expected no value, since test_fraction=0"):
        build_scenario(configure(*typed, "scenario.source.split_seed=3"))
    make_imagenet(root)
    with pytest.raises(ConfigError, match=r"test_fraction: expected 0, since there are test pictures: .*val; got 0.2"):
        build_scenario(config)


# -- lists -------------------------------------------------------------------------------------------------------------


def make_list(root: Path, *lines: str) -> Path:
    for i in range(6):
        save(root / "pictures" / f"{i}.jpg", 30 * i)
    (root / "list.csv").write_text("".join(f"{line}\n" for line in lines))
    return root


ROWS = [f"pictures/{i}.jpg,{label},{split}" for i, (label, split) in enumerate(
    [("10", "train"), ("9", "train"), ("10", "test"), ("9", "test"), ("10", "val"), ("9", "train")]
)]  # fmt: skip


def test_a_list_says_path_label_and_split(tmp_path, capsys):
    found = open_list(make_list(tmp_path / "mine", "path,label,split", *ROWS))
    assert found.class_names == ["9", "10"]
    assert read_greys(found.train_images) == [30, 150, 0]
    assert read_greys(found.test_images) == [90, 60]
    assert "left out: 1 of the split val" in capsys.readouterr().err
    assert open_list(make_list(tmp_path / "mine", *ROWS)).digest == found.digest  # without a header
    swapped = ["split,path,label", *(",".join((row.split(",")[2], *row.split(",")[:2])) for row in ROWS)]
    assert open_list(make_list(tmp_path / "mine", *swapped)).digest == found.digest
    without_test = [row.replace("test", "val") for row in ROWS]
    assert read_greys(open_list(make_list(tmp_path / "mine", *without_test)).test_images) == [90, 60, 120]
    bare = make_list(tmp_path / "mine", *(row.rpartition(",")[0] for row in ROWS))
    assert len(open_list(bare, test_fraction=0.3).test_labels) == 2
    with pytest.raises(ConfigError, match="test_fraction: expected a number between 0 and 1, since there are no test"):
        open_list(bare)
    config = configure(
        "scenario=picture_list", f"data_dir={bare}", "scenario.source.file=list.csv", "device=cpu",
        "scenario.source.test_fraction=0.3",
    )  # fmt: skip
    assert [len(task.train) for task in build_scenario(config).tasks] == [2, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "file: expected lines with a path and a label"),
        ([*ROWS, "pictures/0.jpg"], "file: .*got line 7: pictures/0.jpg"),
        ([*ROWS, "pictures/7.jpg,9,dev"], "file: .*got line 7: pictures/7.jpg,9,dev"),
        ([*ROWS, "pictures/0.jpg,10,test"], "file: .*got line 7: .*, a second time"),
        ([*ROWS, "pictures/7.jpg,9,test"], r"root: .*got 1 that cannot: .*pictures/7.jpg \(No such file"),
        ([row for row in ROWS if "9,test" not in row], "root: .*list.csv: test pictures of 9"),
        ([row for row in ROWS if ",10," in row], "file: expected two or more labels"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(lines, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        open_list(make_list(tmp_path / "mine", *lines))


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"root: expected to read .*list.csv; got No such file"):
        open_list(tmp_path)


# -- CUB-200-2011 ------------------------------------------------------------------------------------------------------


def make_cub(root: Path) -> Path:
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    pictures = [f"{names[i // 3]}/{i}.jpg" for i in range(6)]
    for i, path in enumerate(pictures):
        save(root / "images" / path, 30 * i)
    lines = {
        "classes": [f"{c + 1} {name}" for c, name in enumerate(names)],
        "images": [f"{i + 1} {path}" for i, path in enumerate(pictures)],
        "image_class_labels": [f"{i + 1} {i // 3 + 1}" for i in range(6)],
        "train_test_split": [f"{i + 1} {int(i % 3 < 2)}" for i in range(6)],
    }
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")
    return root


def test_cub_200_is_read_as_it_is_unpacked(tmp_path):
    root = make_cub(tmp_path / "CUB_200_2011")
    found = open_cub(root)
    assert found.class_names == ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    assert (read_greys(found.train_images), found.train_labels.tolist()) == ([0, 30, 90, 120], [0, 0, 1, 1])
    assert (read_greys(found.test_images), found.test_labels.tolist()) == ([60, 150], [0, 1])
    config = configure("scenario=cub200", f"data_dir={tmp_path}", "scenario.num_tasks=2", "device=cpu")
    assert build_scenario(config).image_shape == (3, 224, 224)
    (root / "image_class_labels.txt").write_text("1 3\n")
    with pytest.raises(ConfigError, match=r"root: .*got class 3 and split 1 of picture 1"):
        open_cub(root)
    (root / "classes.txt").write_text("1\n")
    with pytest.raises(ConfigError, match=r"root: expected a number and a value in each line .*got line 1: '1'"):
        open_cub(root)
