"""A method of one's own to start from: a package with its code and its YAML, and a test."""

import argparse
import importlib.util
import keyword
import re
from collections.abc import Sequence
from pathlib import Path

from cl_bench.config.schema import CONFIGS
from cl_bench.core.errors import require
from cl_bench.system.atomic import write_text

CODE = '''"""CLASS: fine-tuning, until you change it. Say whose method it is: authors, venue, year.

    L = weight * CE(f(x), y)

Departures: list what you do otherwise than the paper.
"""

from collections.abc import Iterator

import torch.nn.functional as F

from cl_bench.backbones.base import Backbone
from cl_bench.core.errors import require_positive
from cl_bench.core.types import Phase, Task
from cl_bench.methods.base import FunctionalMethod, Inputs, Terms


class CLASS(FunctionalMethod):
    """Trains on each task.

    Args:
        weight: factor of the loss.
    """

    def __init__(self, *, net: Backbone, weight: float) -> None:
        super().__init__()
        require_positive(fix="1 is fine-tuning.", weight=weight)
        self.net, self.weight = net, weight

    def learn(self, task: Task) -> Iterator[Phase]:
        """One phase of training on the task's images. What later tasks need is kept in registered tensors."""
        yield Phase(task.train, self.observe, self.net.parameters())

    def terms(self, inputs: Inputs, task: int) -> Terms:
        """Named loss terms; the trainer minimises their sum."""
        return {"ce": self.weight * F.cross_entropy(self.net(inputs["x"]), inputs["y"])}, {}
'''

YAML = """# The keys are those of the constructor. Say where the values come from.
_target_: PACKAGE.NAME.CLASS
weight: 1.0
"""

TEST = '''"""What every method promises, tried on NAME."""

from pathlib import Path

from cl_bench.testing import check_method

CONFIGS = Path(__file__).parent.parent / "PACKAGE" / "configs"


def test_NAME_keeps_the_contract():
    check_method("NAME", "backbone=mlp", "backbone.hidden=[32]", config_dir=CONFIGS)
'''


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigError: a name cannot be taken, or a file is there already.
    """
    parser = argparse.ArgumentParser(prog="cl_bench new", description=__doc__)
    parser.add_argument("kind", choices=["method"], help="what is made")
    parser.add_argument("name", metavar="NAME", help="for method=NAME")
    parser.add_argument("--package", default="mylab", metavar="PACKAGE", help="where it goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    files = make_method(Path(), options.name, options.package)
    for file in files:
        print(file)
    print(f"\nRun it:  cl_bench --config-dir {options.package}/configs method={options.name}")
    print(f"Test it: python -m pytest tests/test_{options.name}.py")
    return 0


def make_method(folder: Path, name: str, package: str) -> list[Path]:
    """Write a method, its YAML and its test below ``folder``, and ``__init__.py`` of the package if it has none.

    Raises:
        ConfigError: a name that Python or a group of ours has already, or a file that is there; nothing is written.
    """
    for key, text in (("NAME", name), ("--package", package)):
        require(
            re.fullmatch(r"[a-z][a-z0-9_]*", text) is not None and not keyword.iskeyword(text),
            key,
            expected="lower-case letters, digits and underscores, and no word of Python's",
            got=text,
            fix="For example my_method.",
        )
    require(
        not (CONFIGS / "method" / f"{name}.yaml").is_file(),
        "NAME",
        expected="a name that no method has",
        got=name,
        fix="Choose another one.",
    )
    require(
        not _is_taken(folder, package),
        "--package",
        expected="a name that no other package has",
        got=package,
        fix="For example mylab.",
    )
    words = {"PACKAGE": package, "NAME": name, "CLASS": name.title().replace("_", "")}
    texts = {
        folder / package / f"{name}.py": CODE,
        folder / package / "configs" / "method" / f"{name}.yaml": YAML,
        folder / "tests" / f"test_{name}.py": TEST,
    }
    for file in texts:
        require(not file.exists(), "NAME", expected=f"no file {file} yet", got=name, fix="Choose another name.")
    start = folder / package / "__init__.py"
    if not start.exists():
        texts = {start: f'"""Components of {package} for cl_bench."""\n'} | texts
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, re.sub("|".join(words), lambda found: words[found[0]], text))
    return list(texts)


def _is_taken(folder: Path, package: str) -> bool:
    """Whether Python knows another package of this name, which the one in ``folder`` would hide."""
    found = importlib.util.find_spec(package)
    places = [found.origin, *(found.submodule_search_locations or [])] if found else []
    own = (folder / package).resolve()
    return bool(found) and not any(place and Path(place).resolve().is_relative_to(own) for place in places)
