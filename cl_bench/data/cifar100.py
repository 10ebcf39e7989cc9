"""CIFAR-100 (Krizhevsky 2009) from the official python files, which torchvision also uses."""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np

from cl_bench.core.errors import ConfigError, require
from cl_bench.data.base import ImageSet, fixed_by_settings
from cl_bench.system.atomic import hold_lock

FOLDER = "cifar-100-python"
MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


@fixed_by_settings  # by the checksums
def cifar100(*, root: str, download: bool) -> ImageSet:
    """50,000 training and 10,000 test images, (N, 3, 32, 32) uint8, 100 classes in 20 superclasses.

    Args:
        root: folder that contains (or will contain) ``cifar-100-python/{train,test,meta}``.
        download: fetch the files through torchvision if they are missing.

    Raises:
        ConfigError: the files are missing and could not be fetched, or are not the official ones.
    """
    folder = Path(root) / FOLDER
    if not _is_there(folder):
        _fetch(Path(root), download)
    train, test, meta = (_read_official(folder / name) for name in MD5)
    coarse = dict(zip(train["fine_labels"], train["coarse_labels"]))
    return ImageSet(
        train_images=_reshape_pixels(train),
        train_labels=np.array(train["fine_labels"]),
        test_images=_reshape_pixels(test),
        test_labels=np.array(test["fine_labels"]),
        class_names=list(meta["fine_label_names"]),
        superclass=[coarse[c] for c in range(100)],
        mean=[0.5071, 0.4865, 0.4409],
        std=[0.2673, 0.2564, 0.2761],
        checksums=(MD5["train"], MD5["test"]),
    )


def _is_there(folder: Path) -> bool:
    return all(os.path.isfile(folder / name) for name in MD5)  # False also if the folder is not readable


def _reshape_pixels(split: dict) -> np.ndarray:
    return split["data"].reshape(-1, 3, 32, 32)


def _read_official(path: Path) -> dict:
    """The content of one file, unpickled only after its MD5 has shown that it is the published one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            "data_dir", expected=f"to read {path}", got=error.strerror or str(error), fix="Fix its permissions."
        ) from error
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    require(
        md5 == MD5[path.name],
        "data_dir",
        expected=f"the official CIFAR-100 file {path} with MD5 {MD5[path.name]}",
        got=f"a damaged or different file of {len(content)} bytes with MD5 {md5}",
        fix="Delete it and run again to fetch it, or copy the official file there.",
    )
    return pickle.loads(content, encoding="latin1")


def _fetch(root: Path, download: bool) -> None:
    reason = "scenario.source.download=false forbids fetching it"
    if download:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with hold_lock(root / f".{FOLDER}.lock", f"fetches CIFAR-100 into {root}"):
                if not _is_there(root / FOLDER):
                    _download(root)
            return
        # URLError is an OSError; RuntimeError: a wrong MD5; ValueError: a name that no folder can have
        except (OSError, RuntimeError, ValueError) as error:
            reason = f"fetching it failed ({error})"
    raise ConfigError(
        "data_dir",
        expected=f"the CIFAR-100 files train, test and meta in {(root / FOLDER).resolve()}",
        got=f"no such files, and {reason}",
        fix="Get cifar-100-python.tar.gz from the CIFAR-100 page, unpack it there or set data_dir=PATH to the folder "
        "that contains cifar-100-python/. +experiment=quickstart needs no download.",
    )


def _download(root: Path) -> None:
    """Fetch and unpack the archive; a file is moved to its path when it is complete: nobody reads half of it."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    beside = root / f".{FOLDER}.partial"
    shutil.rmtree(beside, ignore_errors=True)  # left by a killed process
    try:
        download_and_extract_archive(CIFAR100.url, root, beside, CIFAR100.filename, CIFAR100.tgz_md5)
        (root / FOLDER).mkdir(exist_ok=True)
        for name in MD5:
            (beside / FOLDER / name).replace(root / FOLDER / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
