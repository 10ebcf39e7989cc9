"""Packages with components of their own, outside this one, and which of them a configuration may name (decision 29).

Such a package has its YAML files in a folder ``configs`` of its own, ``configs/method/NAME.yaml``. It is either
installed and says so with an entry point of the group ``cl_bench``, or it lies beside the user's data and its folder
``configs`` is named on the command line. Nothing here imports a package.
"""

import importlib
import importlib.util
import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "cl_bench"
"""Group of the entry points, each ``NAME = "PACKAGE"``."""

FOLDER = "configs"


@cache
def find_installed() -> dict[str, Path]:
    """The folder of configuration files of every installed package that has an entry point, by the package's name.

    A package without such a folder is left out: it could only be one that has nothing for us, such as ``os``.
    """
    names = sorted({entry.value for entry in entry_points(group=GROUP)})
    folders = {name: folder / FOLDER for name in names if (folder := _find_folder(name)) is not None}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def find_beside(config_dir: str | Path) -> str | None:
    """The name of the package that a folder of configuration files belongs to; the package can be imported afterwards.

    Args:
        config_dir: as typed by the user, e.g. ``mylab/configs``.

    Returns:
        ``mylab``, if it is a package (it has ``__init__.py``), in no other one, and what ``import mylab`` would find.
        Else None.
    """
    config_dir = Path(config_dir).resolve()
    folder = config_dir.parent
    is_package = config_dir.name == FOLDER and (folder / "__init__.py").is_file()
    if not is_package or (folder.parent / "__init__.py").is_file():
        return None
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))  # last, so that nothing there stands before what is installed
        importlib.invalidate_caches()
    return folder.name if _find_folder(folder.name) == folder else None


def _find_folder(name: str) -> Path | None:
    """The folder of a top-level package; None if there is none of this name."""
    if not name.isidentifier():  # a dotted path: Python would import the package above it in order to look
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that was put in place by hand
        return None
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]).resolve() if places else None
