"""MNIST, Fashion-MNIST, CIFAR-10 and SVHN, from the files that torchvision fetches, in the folders where it puts them.

torchvision is imported only to fetch them: that takes seconds. Reading needs few lines, and the files are checked
before they are read.
"""

import io
import pickle
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from cl_bench.core.errors import require
from cl_bench.data.base import ImageSet, fixed_by_settings
from cl_bench.data.official_files import OfficialFiles, fetch_archive

IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _fetch_idx(name: str, root: Path, beside: Path) -> None:
    from torchvision import datasets

    getattr(datasets, name)(beside, download=True)


def _fetch_svhn(root: Path, beside: Path) -> None:
    from torchvision.datasets import SVHN

    for split in ("train", "test"):
        SVHN(beside, split=split, download=True)


MNIST = OfficialFiles(
    title="MNIST",
    folder="MNIST/raw",
    md5=dict(
        zip(
            IDX_NAMES,
            (
                "6bbc9ace898e44ae57da46a324031adb",
                "a25bea736e30d166cdddb491f175f624",
                "2646ac647ad5339dbf082846283269ea",
                "27ae3e4e09519cfbb04c329615203637",
            ),
        )
    ),
    fetch=partial(_fetch_idx, "MNIST"),
    by_hand="Get the four .gz files of MNIST, unpack them",
)

FASHION_MNIST = OfficialFiles(
    title="Fashion-MNIST",
    folder="FashionMNIST/raw",
    md5=dict.fromkeys(IDX_NAMES),  # published for the packed files only; torchvision checks those when it fetches them
    fetch=partial(_fetch_idx, "FashionMNIST"),
    by_hand="Get the four .gz files of Fashion-MNIST, unpack them",
)

CIFAR10 = OfficialFiles(
    title="CIFAR-10",
    folder="cifar-10-batches-py",
    md5={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    fetch=partial(fetch_archive, "CIFAR10"),
    by_hand="Get cifar-10-python.tar.gz from the CIFAR-10 page, unpack it",
)

SVHN = OfficialFiles(
    title="SVHN",
    folder="",
    md5={
        "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
        "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    },
    fetch=_fetch_svhn,
    by_hand="Get these two files from the SVHN page, put them",
)


@fixed_by_settings  # by the checksums
def mnist(*, root: str, download: bool) -> ImageSet:
    """60,000 training and 10,000 test images of handwritten digits, (N, 1, 28, 28) uint8 (LeCun et al. 1998).

    Args:
        root: folder that contains (or will contain) ``MNIST/raw/``.
        download: fetch the files through torchvision if they are missing.

    Raises:
        ConfigError: the files are missing and could not be fetched, or are not the official ones.
    """
    return _read_idx_set(MNIST, root, download, [str(c) for c in range(10)], 0.1307, 0.3081)


def fashion_mnist(*, root: str, download: bool) -> ImageSet:
    """60,000 training and 10,000 test images of clothes, (N, 1, 28, 28) uint8 (Xiao et al. 2017).

    No checksum of the unpacked files is published, so a run is identified by the digest of these images (decision 23).

    Args:
        root: folder that contains (or will contain) ``FashionMNIST/raw/``.
        download: as for :func:`mnist`.

    Raises:
        ConfigError: the files are missing and could not be fetched, or are damaged.
    """
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return _read_idx_set(FASHION_MNIST, root, download, names, 0.2860, 0.3530)


@fixed_by_settings  # by the checksums
def cifar10(*, root: str, download: bool) -> ImageSet:
    """50,000 training and 10,000 test images, (N, 3, 32, 32) uint8, 10 classes (Krizhevsky 2009).

    Args:
        root: folder that contains (or will contain) ``cifar-10-batches-py/``.
        download: as for :func:`mnist`.

    Raises:
        ConfigError: the files are missing and could not be fetched, or are not the official ones.
    """
    # unpickled only after the MD5 has shown that they are the published files
    *train, test, meta = (pickle.loads(file, encoding="latin1") for file in CIFAR10.read(root, download).values())
    sums = list(CIFAR10.md5.values())
    return ImageSet(
        train_images=np.concatenate([part["data"] for part in train]).reshape(-1, 3, 32, 32),
        train_labels=np.concatenate([part["labels"] for part in train]),
        test_images=test["data"].reshape(-1, 3, 32, 32),
        test_labels=np.array(test["labels"]),
        class_names=list(meta["label_names"]),
        superclass=None,
        mean=[0.4914, 0.4822, 0.4465],
        std=[0.2470, 0.2435, 0.2616],
        checksums=("-".join(map(str, sums[:5])), str(sums[5])),
    )


@fixed_by_settings  # by the checksums
def svhn(*, root: str, download: bool) -> ImageSet:
    """73,257 training and 26,032 test images of house numbers, (N, 3, 32, 32) uint8, 10 digits (Netzer et al. 2011).

    Args:
        root: folder that contains (or will contain) ``train_32x32.mat`` and ``test_32x32.mat``.
        download: as for :func:`mnist`.

    Raises:
        ConfigError: the files are missing and could not be fetched, or are not the official ones.
    """
    from scipy.io import loadmat

    train, test = (loadmat(io.BytesIO(file)) for file in SVHN.read(root, download).values())
    images = [np.ascontiguousarray(part["X"].transpose(3, 2, 0, 1)) for part in (train, test)]
    labels = [part["y"].astype(np.int64).reshape(-1) % 10 for part in (train, test)]  # the files call the digit 0 "10"
    first, second = SVHN.md5.values()
    return ImageSet(
        train_images=images[0],
        train_labels=labels[0],
        test_images=images[1],
        test_labels=labels[1],
        class_names=[str(c) for c in range(10)],
        superclass=None,
        mean=[0.4377, 0.4438, 0.4728],
        std=[0.1980, 0.2010, 0.1970],
        checksums=(str(first), str(second)),
    )


def _read_idx_set(
    files: OfficialFiles, root: str, download: bool, names: list[str], mean: float, std: float
) -> ImageSet:
    """A set in MNIST's four files."""
    arrays = [
        _read_idx(content, Path(root) / files.folder / name) for name, content in files.read(root, download).items()
    ]
    for images, labels in (arrays[:2], arrays[2:]):
        require(
            images.ndim == 3 and labels.ndim == 1 and len(images) == len(labels) and labels.max(initial=0) < len(names),
            "data_dir",
            expected=f"{files.title} files with as many labels of {len(names)} classes as images",
            got=f"shapes {images.shape} and {labels.shape} in {Path(root) / files.folder}",
            fix="Delete them and run again to fetch them, or copy the official files there.",
        )
    checksums = (files.md5[IDX_NAMES[0]], files.md5[IDX_NAMES[2]])
    return ImageSet(
        train_images=arrays[0][:, None],
        train_labels=arrays[1].astype(np.int64),
        test_images=arrays[2][:, None],
        test_labels=arrays[3].astype(np.int64),
        class_names=names,
        superclass=None,
        mean=[mean],
        std=[std],
        checksums=(checksums[0], checksums[1]) if checksums[0] and checksums[1] else None,
    )


def _read_idx(content: bytes, path: Path) -> np.ndarray:
    """The array of an idx file: two zeros, 8 for bytes, the number of dimensions, their sizes, the values."""
    start = 4 + 4 * content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = tuple(map(int, np.frombuffer(content[4:start], ">u4"))) if 4 < start <= len(content) else ()
    require(
        shape != () and len(content) == start + prod(shape),
        "data_dir",
        expected=f"a whole idx file of bytes at {path}, unpacked",
        got=f"a damaged or different file of {len(content)} bytes",
        fix="Delete it and run again to fetch it, or copy the official file there.",
    )
    return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)  # of a copy, so that it is writable
