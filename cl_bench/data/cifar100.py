"""CIFAR-100 (Krizhevsky 2009) from the official python files, which torchvision also uses."""

import pickle
from functools import partial

import numpy as np

from cl_bench.data.base import ImageSet, fixed_by_settings
from cl_bench.data.official_files import OfficialFiles, fetch_archive

MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}

FILES = OfficialFiles(
    title="CIFAR-100",
    folder="cifar-100-python",
    md5=MD5,
    fetch=partial(fetch_archive, "CIFAR100"),
    by_hand="Get cifar-100-python.tar.gz from the CIFAR-100 page, unpack it",
)


@fixed_by_settings  # by the checksums
def cifar100(*, root: str, download: bool) -> ImageSet:
    """50,000 training and 10,000 test images, (N, 3, 32, 32) uint8, 100 classes in 20 superclasses.

    Args:
        root: folder that contains (or will contain) ``cifar-100-python/{train,test,meta}``.
        download: fetch the files through torchvision if they are missing.

    Raises:
        ConfigError: the files are missing and could not be fetched, or are not the official ones.
    """
    # unpickled only after the MD5 has shown that they are the published files
    train, test, meta = (pickle.loads(file, encoding="latin1") for file in FILES.read(root, download).values())
    coarse = dict(zip(train["fine_labels"], train["coarse_labels"]))
    return ImageSet(
        train_images=train["data"].reshape(-1, 3, 32, 32),
        train_labels=np.array(train["fine_labels"]),
        test_images=test["data"].reshape(-1, 3, 32, 32),
        test_labels=np.array(test["fine_labels"]),
        class_names=list(meta["fine_label_names"]),
        superclass=[coarse[c] for c in range(100)],
        mean=[0.5071, 0.4865, 0.4409],
        std=[0.2673, 0.2564, 0.2761],
        checksums=(MD5["train"], MD5["test"]),
    )
