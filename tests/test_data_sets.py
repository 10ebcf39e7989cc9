"""Data sets in the files that torchvision fetches, written here in their formats; MNIST itself where it is at hand."""

import dataclasses
import gzip
import io
import pickle
import shutil
import struct
from hashlib import md5

import numpy as np
import pytest
from helpers import DATA, command, configure, needs_mnist

from cl_bench.config.build import build_scenario, identify_run
from cl_bench.config.schema import to_plain_dict
from cl_bench.core.errors import ConfigError
from cl_bench.data import torchvision_sets as sets

TRAIN, TEST = 30, 20


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def draw(count: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, *shape)).astype(np.uint8), np.arange(count) % 10


def write_idx() -> dict[str, bytes]:
    arrays = [array for count in (TRAIN, TEST) for array in draw(count, 28, 28)]
    return {name: idx(array.astype(np.uint8)) for name, array in zip(sets.IDX_NAMES, arrays)}


def write_cifar10() -> dict[str, bytes]:
    files = {}
    for number, name in enumerate([n for n in sets.CIFAR10.md5 if n != "batches.meta"]):
        images, labels = draw(TRAIN + number, 3072)
        files[name] = pickle.dumps({"data": images, "labels": labels.tolist()})
    return files | {"batches.meta": pickle.dumps({"label_names": [f"name {c}" for c in range(10)]})}


def write_svhn() -> dict[str, bytes]:
    from scipy.io import savemat

    files = {}
    for name, count in zip(sets.SVHN.md5, (TRAIN, TEST)):
        images, labels = draw(count, 32, 32, 3)
        content = io.BytesIO()
        savemat(content, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        files[name] = content.getvalue()
    return files


KINDS = {
    "mnist": ("MNIST", write_idx),
    "fashion_mnist": ("FASHION_MNIST", write_idx),
    "cifar10": ("CIFAR10", write_cifar10),
    "svhn": ("SVHN", write_svhn),
}


def write_small(kind, root, monkeypatch):
    """Write a small data set in the files of a published one -> its description, the folder of its files."""
    name, write = KINDS[kind]
    files = getattr(sets, name)
    contents = write()
    sums = {n: None if files.md5[n] is None else md5(c).hexdigest() for n, c in contents.items()}
    monkeypatch.setattr(sets, name, dataclasses.replace(files, md5=sums))
    folder = root / files.folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return getattr(sets, name), folder


@pytest.fixture(params=KINDS)
def small(request, tmp_path, monkeypatch):
    """A small data set in the files of a published one -> scenario, its description, the folder of its files."""
    return request.param, *write_small(request.param, tmp_path, monkeypatch)


def read(kind: str, root, download: bool = False):
    return getattr(sets, kind)(root=str(root), download=download)


def test_the_images_are_torchvisions(small, tmp_path, monkeypatch):
    from torchvision import datasets

    kind, files, _ = small
    ours = read(kind, tmp_path)
    name = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}[kind]
    theirs = getattr(datasets, name)
    if kind == "cifar10":  # it compares checksums too
        *train, test = [[n, s] for n, s in files.md5.items() if n != "batches.meta"]
        monkeypatch.setattr(theirs, "train_list", train)
        monkeypatch.setattr(theirs, "test_list", [test])
        monkeypatch.setattr(theirs, "meta", theirs.meta | {"md5": files.md5["batches.meta"]})
    if kind == "svhn":
        sums = dict(zip(("train", "test"), files.md5.items()))
        monkeypatch.setattr(theirs, "split_list", {split: ["", *sums[split]] for split in sums})
    for split in ("train", "test"):
        whole = theirs(tmp_path, split=split) if kind == "svhn" else theirs(tmp_path, train=split == "train")
        images, labels = getattr(ours, f"{split}_images"), getattr(ours, f"{split}_labels")
        assert len(whole) == len(images) == len(labels)
        assert images.flags.writeable
        for (picture, label), image, our_label in zip(whole, images, labels):
            pixels = np.asarray(picture)
            assert (image == (pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))).all()
            assert our_label == label


def test_each_has_a_scenario(small, tmp_path):
    kind, _, _ = small
    config = configure(f"scenario={kind}", f"data_dir={tmp_path}", "device=cpu")
    scenario = build_scenario(config)
    assert [len(task.classes) for task in scenario.tasks] == [2] * 5
    assert sum(len(task.test) for task in scenario.tasks) in (TEST, TRAIN + 5)
    # MD5s say what the images are; where none are published, the digest of the images does
    settings, _ = identify_run(config, to_plain_dict(config))
    assert ("data" in settings) == (kind == "fashion_mnist")


def test_missing_files_are_named_with_the_way_out(small, tmp_path):
    kind, files, _ = small
    with pytest.raises(ConfigError, match=r"data_dir: .*no such files, and .*download=false.*data_dir=PATH") as caught:
        read(kind, tmp_path / "empty")
    assert files.title in str(caught.value)
    for name in files.md5:
        assert name in str(caught.value)
    assert not (tmp_path / "empty").exists()


def test_damaged_files_are_refused_before_they_are_read(small, tmp_path):
    kind, files, folder = small
    for name in files.md5:
        content = (folder / name).read_bytes()
        for damaged in (content[:-1], content[:7], b"", b"cos\nsystem\n(S'echo pickled code ran'\ntR."):
            (folder / name).write_bytes(damaged)
            with pytest.raises(ConfigError, match=r"data_dir: expected .*got a damaged or different file of \d+ bytes"):
                read(kind, tmp_path)
        (folder / name).write_bytes(content)
    read(kind, tmp_path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    contents = write_idx()
    for images, labels in ((TRAIN, TRAIN + 1), (TRAIN, TRAIN)):
        contents[sets.IDX_NAMES[1]] = idx(np.full(labels, 10 if labels == images else 0, dtype=np.uint8))
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match="as many labels of 10 classes as images"):
            read("fashion_mnist", tmp_path)


def test_a_failed_download_says_where_to_get_the_files(small, tmp_path, monkeypatch):
    from torchvision.datasets import utils

    kind, _, _ = small

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "_urlretrieve", unreachable)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(ConfigError, match=r"fetching it failed \(.*no route to host.*\)"):
        read(kind, tmp_path / "empty", download=True)
    assert [path.name for path in (tmp_path / "empty").iterdir() if path.suffix != ".lock"] == []


def test_files_are_fetched_once_and_appear_whole(tmp_path, monkeypatch):
    from torchvision import datasets

    contents = write_idx()
    web = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    asked = []

    def retrieve(url, to):
        assert not (tmp_path / "MNIST").exists()
        asked.append(url.rpartition("/")[2])
        (tmp_path / "web").write_bytes(web[asked[-1]])
        shutil.copyfile(tmp_path / "web", to)

    monkeypatch.setattr(datasets.utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr(datasets.MNIST, "resources", [(name, md5(c).hexdigest()) for name, c in web.items()])
    sums = {name: md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(sets, "MNIST", dataclasses.replace(sets.MNIST, md5=sums))
    (tmp_path / ".MNIST-raw.partial").mkdir()  # of a killed process
    (tmp_path / ".MNIST-raw.partial" / "MNIST").write_text("half")
    first = read("mnist", tmp_path, download=True)
    assert read("mnist", tmp_path, download=True).digest == first.digest
    assert sorted(asked) == sorted(web)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".MNIST-raw.lock", "MNIST", "web"]


def test_the_command_gives_one_message(tmp_path):
    done = command("scenario=svhn", f"data_dir={tmp_path}", "scenario.source.download=false", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("data_dir: expected the SVHN files train_32x32.mat, test_32x32.mat in ") == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def four(tmp_path, monkeypatch):
    """The folder of all four."""
    for kind in KINDS:
        write_small(kind, tmp_path, monkeypatch)
    return tmp_path


def test_tasks_come_from_different_data_sets(four):
    scenario = build_scenario(configure("scenario=datasets", f"data_dir={four}", "device=cpu"))
    assert [task.classes for task in scenario.tasks] == [range(10 * t, 10 * t + 10) for t in range(4)]
    assert [len(task.train) for task in scenario.tasks] == [TRAIN, TRAIN, TRAIN, 5 * TRAIN + 10]
    assert [scenario.class_names[c] for c in (0, 13, 29, 30)] == [
        "mnist 0",
        "fashion_mnist Dress",
        "svhn 9",
        "cifar10 name 0",
    ]
    assert scenario.image_shape == (3, 32, 32)
    for kind, task in zip(KINDS_IN_ORDER, scenario.tasks):
        own = read(kind, four)
        assert (task.train.labels - task.classes.start).tolist() == own.train_labels.tolist()
        images = task.train.images.numpy()
        if kind in ("svhn", "cifar10"):
            assert (images == own.train_images).all()
        else:  # padded, and grey three times
            assert (images[:, :, 2:30, 2:30] == own.train_images).all()
            assert images.sum(dtype=np.int64) == 3 * own.train_images.sum(dtype=np.int64)


KINDS_IN_ORDER = ["mnist", "fashion_mnist", "svhn", "cifar10"]


def test_sizes_and_colours_are_brought_together_by_key(four):
    from PIL import Image

    typed = ["scenario=datasets", f"data_dir={four}", "~scenario.source.sources.fashion_mnist", "scenario.num_tasks=3"]
    grey = build_scenario(
        configure(*typed, "scenario.source.size=16", "scenario.source.fit=resize", "scenario.source.channels=1")
    )
    assert grey.image_shape == (1, 16, 16)
    own = read("svhn", four).train_images[0].transpose(1, 2, 0)
    expected = Image.fromarray(np.asarray(Image.fromarray(own).convert("L"))).resize(
        (16, 16), Image.Resampling.BILINEAR
    )
    assert (grey.tasks[1].train.images[0, 0].numpy() == np.asarray(expected)).all()
    pixels = np.concatenate([task.train.images.numpy() for task in grey.tasks]) / 255
    assert grey.transform.mean == pytest.approx([pixels.mean()], abs=1e-4)
    with pytest.raises(ConfigError, match=r"scenario.source.size: expected 28 pixels or more, .*got 16 with mnist"):
        build_scenario(configure(*typed, "scenario.source.size=16"))
    alone = [f"~scenario.source.sources.{kind}" for kind in ("svhn", "cifar10")]
    with pytest.raises(ConfigError, match=r"scenario.source.sources: expected two or more data sets, .*got mnist"):
        build_scenario(configure(*typed, *alone))
    for wrong, got in (("null", "None"), ("mnist", "mnist")):
        with pytest.raises(ConfigError, match=rf"scenario.source.sources: expected two or more .*got {got}"):
            build_scenario(configure("scenario=datasets", f"scenario.source.sources={wrong}"))
    with pytest.raises(ConfigError, match=r"scenario.source.sources.a._target_: expected the dotted path"):
        build_scenario(configure(*typed, "+scenario.source.sources.a=3"))
    with pytest.raises(ConfigError, match=r"scenario.source.sources.svhn.rot: expected one of the keys"):
        build_scenario(configure(*typed, "+scenario.source.sources.svhn.rot=3"))


def test_sets_of_unequal_size_and_pictures_of_ones_own_are_joined(four):
    from PIL import Image

    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee", "cat")):
            (four / "mine" / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), (9 * number,) * 3).save(four / "mine" / split / name / "0.png")
    own = (
        "_target_:cl_bench.data.folder.folder,size:32,background:[0,0,0],value_range:null,test_fraction:0,split_seed:0"
    )
    typed = [
        "scenario=datasets", f"data_dir={four}", "~scenario.source.sources.svhn", "~scenario.source.sources.cifar10",
        f"+scenario.source.sources.mine={{{own},root:{four}/mine,cache:{four}/decoded}}",
        "scenario.classes_per_task=[10,10,3]",
    ]  # fmt: skip
    config = configure(*typed)
    scenario = build_scenario(config)
    assert scenario.tasks[2].train.images[:, 0, 5, 5].tolist() == [0, 9, 18]
    assert scenario.class_names[20:] == ["mine ant", "mine bee", "mine cat"]
    settings, _ = identify_run(config, to_plain_dict(config))
    assert settings["data"] == scenario.data  # pictures, and Fashion-MNIST, are told by their digest
    (four / "mine").rename(four / "yours")
    moved = configure(*(word.replace("/mine", "/yours") for word in typed))
    assert identify_run(moved, to_plain_dict(moved))[0] == settings  # wherever they are


def test_joined_sets_are_told_by_their_order(four):
    again = f"{{_target_:cl_bench.data.torchvision_sets.mnist,root:{four},download:false}}"
    found = []
    for words in ([], ["~scenario.source.sources.mnist", f"+scenario.source.sources.mnist={again}"]):
        config = configure("scenario=datasets", f"data_dir={four}", *words)
        settings, scenario = identify_run(config, to_plain_dict(config))
        assert not [key for key in settings if key.endswith((".root", ".download"))]
        found.append((settings, scenario.class_names[0]))
    (first, name), (other, last) = found
    assert (name, last) == ("mnist 0", "fashion_mnist T-shirt/top")
    assert {key for key in first | other if first.get(key) != other.get(key)} == {"data"}


@needs_mnist
def test_mnist_itself():
    source = sets.mnist(root=str(DATA), download=False)
    assert source.train_images.shape == (60_000, 1, 28, 28)
    assert source.test_images.shape == (10_000, 1, 28, 28)
    assert source.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    pixels = source.train_images / np.float32(255)
    assert [round(float(pixels.mean(dtype=np.float64)), 4)] == source.mean
    assert [round(float(pixels.std(dtype=np.float64)), 4)] == source.std
