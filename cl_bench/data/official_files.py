"""The files of a published data set: found, fetched if they are missing, and checked against published checksums."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cl_bench.core.errors import ConfigError, require
from cl_bench.system.atomic import hold_lock


@dataclass(frozen=True)
class OfficialFiles:
    """Where the files of a data set are, and how they are recognised and fetched.

    Attributes:
        title: name of the data set, for messages.
        folder: their folder below the root; empty for the root itself.
        md5: file name -> MD5; None if none is published for the unpacked file, so that only its reader checks it.
        fetch: (root, empty folder) -> puts the files below the empty folder, in ``folder`` as below the root.
        by_hand: how a user gets the files without this program, as the beginning of a sentence.
    """

    title: str
    folder: str
    md5: Mapping[str, str | None]
    fetch: Callable[[Path, Path], None]
    by_hand: str

    def read(self, root: str, download: bool) -> dict[str, bytes]:
        """The content of each file, in the order of :attr:`md5`.

        Args:
            root: the folder that contains, or will contain, :attr:`folder`.
            download: fetch the files through torchvision if they are missing.

        Raises:
            ConfigError: the files are missing and could not be fetched, or are not the published ones.
        """
        if not self.is_there(Path(root)):
            self.fetch_missing(Path(root), download)
        return {name: self._read_file(Path(root) / self.folder / name) for name in self.md5}

    def is_there(self, root: Path) -> bool:
        """Whether all files are below ``root``; False also if the folder is not readable."""
        return all(os.path.isfile(root / self.folder / name) for name in self.md5)

    def fetch_missing(self, root: Path, download: bool) -> None:
        """Fetch the files, by one process at a time; a file appears at its path when it is complete.

        Raises:
            ConfigError: they may not be fetched, or could not be.
        """
        reason = "scenario.source.download=false forbids fetching it"
        if download:
            name = self.folder.replace(os.sep, "-") or self.title.lower()
            try:
                root.mkdir(parents=True, exist_ok=True)
                with hold_lock(root / f".{name}.lock", f"fetches {self.title} into {root}"):
                    if not self.is_there(root):
                        self._fetch(root, root / f".{name}.partial")
                return
            # URLError is an OSError; RuntimeError: a wrong MD5; ValueError: a name that no folder can have
            except (OSError, RuntimeError, ValueError) as error:
                reason = f"fetching it failed ({' '.join(str(error).split())})"
        raise ConfigError(
            "data_dir",
            expected=f"the {self.title} files {', '.join(self.md5)} in {(root / self.folder).resolve()}",
            got=f"no such files, and {reason}",
            fix=f"{self.by_hand} there or set data_dir=PATH to the folder that contains "
            f"{f'{self.folder}/' if self.folder else 'them'}. +experiment=quickstart needs no download.",
        )

    def _fetch(self, root: Path, beside: Path) -> None:
        shutil.rmtree(beside, ignore_errors=True)  # left by a killed process
        try:
            beside.mkdir()
            self.fetch(root, beside)
            (root / self.folder).mkdir(parents=True, exist_ok=True)
            for name in self.md5:
                (beside / self.folder / name).replace(root / self.folder / name)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _read_file(self, path: Path) -> bytes:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                "data_dir", expected=f"to read {path}", got=error.strerror or str(error), fix="Fix its permissions."
            ) from error
        expected, found = self.md5[path.name], hashlib.md5(content, usedforsecurity=False).hexdigest()
        require(
            expected in (None, found),
            "data_dir",
            expected=f"the official {self.title} file {path} with MD5 {expected}",
            got=f"a damaged or different file of {len(content)} bytes with MD5 {found}",
            fix="Delete it and run again to fetch it, or copy the official file there.",
        )
        return content


def fetch_archive(name: str, root: Path, beside: Path) -> None:
    """Unpack the archive of the torchvision class ``name`` into ``beside``; it is kept in ``root`` and used again."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    kind = getattr(datasets, name)
    download_and_extract_archive(kind.url, root, beside, kind.filename, kind.tgz_md5)
