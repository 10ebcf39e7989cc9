"""Published settings as files: the runs of a row, and the numbers with which it is compared.

A file is a group: the rows of one method or one schedule (``scripts/reproduction/*.yaml``). Keys and types are those of
the classes below.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.core.errors import ConfigError, require


class Kind(Enum):
    """How far a published number may be trusted."""

    gate = "gate"
    """Sourced, and of exactly this setting: if we miss it, find out why before anything else."""
    soft = "soft"
    """Sourced, but of a slightly different setting, or approximate."""
    recalled = "recalled"
    """From memory, for orientation only; it never gets a verdict."""


@dataclass
class Number:
    """A number of a row, in percent, points or the unit of ``summary.json``.

    Attributes:
        metric: its key, as ``section.name`` of ``summary.json``; also ``*.first_task_accuracy``, and ``*.AOPD``
            and ``*.MOPD`` over the row's orders.
        published: None if there is only our number.
        spread: its standard deviation or confidence interval in the source's words, e.g. ``SD 0.57``.
        n: the runs it is a mean of; None if the source does not say.
        tolerance: the difference, up or down, that still counts as agreement; None if it is not judged.
        kind, source: of the published number.
    """

    metric: str = MISSING
    published: float | None = None
    spread: str = ""
    n: int | None = None
    tolerance: float | None = None
    kind: Kind | None = None
    source: str = ""


@dataclass
class Row:
    """Runs of one setting: every seed in every order.

    Attributes:
        what: the setting in words.
        experiment, overrides: as on the command line.
        orders: names of the group's orders that it is run in; empty for the experiment's own.
        seeds: number of seeds, unless the command says otherwise.
        evaluate_on: the images that the source measured, ``test`` or ``val``; a run on others is not compared.
        reduced: what was cut down; such a row is not compared with a published number.
        numbers: empty for the group's.
    """

    what: str = MISSING
    experiment: str = MISSING
    overrides: list[str] = field(default_factory=list)
    orders: list[str] = field(default_factory=list)
    seeds: int = 3
    evaluate_on: str = "test"
    reduced: str = ""
    numbers: list[Number] = field(default_factory=list)


@dataclass
class Claim:
    """One row is above another in a metric, by more than the confidence interval over seeds."""

    above: str = MISSING
    below: str = MISSING
    metric: str = "class_il.average_accuracy"


@dataclass
class Group:
    """The rows of one file.

    Attributes:
        title: of its table.
        orders: overrides by name.
        numbers: of the rows that have none of their own.
        rows: by name.
        claims: of its own rows and those of other groups.
    """

    title: str = MISSING
    orders: dict[str, list[str]] = field(default_factory=dict)
    numbers: list[Number] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def variants(self, row: Row) -> list[list[str]]:
        """The overrides of the row in each of its orders, without seed and name."""
        settings = [f"+experiment={row.experiment}", *row.overrides]
        return [[*settings, *self.orders[order]] for order in row.orders] or [settings]


def read_groups(folder: Path) -> dict[str, Group]:
    """The groups of ``folder`` by name; :class:`ConfigError` names the file and what is wrong in it."""
    groups = {path.stem: _read_group(path) for path in sorted(folder.glob("*.yaml"))}
    names = [name for group in groups.values() for name in group.rows]
    for group in groups.values():
        for name in [end for claim in group.claims for end in (claim.above, claim.below)]:
            require(name in names, "claims", expected="rows", got=name, fix=f"Choose among {', '.join(names)}.")
    for name in names:
        unique = names.count(name) == 1 and name not in groups
        require(unique, name, expected="one row of this name, and no group", got="two", fix="Rename one of them.")
    return groups


def choose_rows(groups: dict[str, Group], names: Sequence[str]) -> list[tuple[Group, str]]:
    """The rows that ``names`` choose, each once: names of rows and of groups, or ``all``."""
    found: dict[str, Group] = {}
    for name in names:
        holder = next((group for group in groups.values() if name in group.rows), None)
        known = name in groups or name == "all" or holder is not None
        require(
            known,
            "NAME",
            expected=f"a group ({', '.join(groups)}), one of their rows, or all",
            got=name,
            fix="--list shows every row.",
        )
        for group_name, group in groups.items():
            found |= {row: group for row in group.rows if name in (row, group_name, "all")}
    return [(group, row) for row, group in found.items()]


def _read_group(path: Path) -> Group:
    try:
        read = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Group), OmegaConf.load(path)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        fix = "Its keys and types: cl_bench/report/published.py."
        raise ConfigError(str(path), expected="a group of published settings", got=reason, fix=fix) from error
    assert isinstance(read, Group)
    for name, row in read.rows.items():
        row.numbers = row.numbers or read.numbers
        require(
            row.evaluate_on in ("test", "val"),
            f"{path}: {name}",
            expected="evaluate_on: test or val",
            got=row.evaluate_on,
            fix="Correct it.",
        )
        for order in row.orders:
            known = ", ".join(read.orders) or "(none)"
            require(order in read.orders, f"{path}: {name}", expected=f"orders {known}", got=order, fix="Correct it.")
    return read
