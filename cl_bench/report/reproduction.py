"""Published numbers beside ours: tables over the records of reproduced settings."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cl_bench.core.errors import require
from cl_bench.core.record import TITLES
from cl_bench.report.compare import (
    DISPARITIES,
    MIN_SEEDS,
    ORDER_KEYS,
    Column,
    Stat,
    Table,
    compare,
    make_orders,
    make_rows,
    markdown,
    paired_test,
    settings,
    show_tables,
    unlike,
    write,
)
from cl_bench.report.page import Run, Verdict, in_words, number, signed
from cl_bench.report.published import Claim, Group, Number, Row

Records = Mapping[str, list[Run]]
"""Finished runs by the name of their row."""

MARKED = re.compile(r"(<!-- reproduction: ([\w ]+) -->\n)(.*?)(<!-- end of reproduction -->)", re.DOTALL)
"""A place in a page for the table of some groups, or of ``all``."""

HEADER = ["row", "what", "metric", "kind", "published", "ours (n)", "difference", "verdict", "source"]

NOTE = (
    "Ours: mean ± sample standard deviation over seeds and orders (number of runs; of AOPD and MOPD, of seeds). "
    "Within: the difference is at most the tolerance. Kind: a gate is sourced, of this very setting; soft is sourced, "
    "of a setting that is not quite this one; recalled is from memory and for orientation only."
)


@dataclass(frozen=True)
class Line:
    """A number of a row and how it came out."""

    name: str
    row: Row
    number: Number
    runs: list[Run]

    @property
    def stat(self) -> Stat:
        """Ours; of a disparity only when every order of the row has been run."""
        orders = {str(run.summary["class_order"]) for run in self.runs}
        partial = self.number.metric.split(".")[1] in DISPARITIES and len(orders) < len(self.row.orders)
        return statistics([] if partial else self.runs, self.number.metric)

    @property
    def held(self) -> Verdict:
        """The published number beside ours; nothing is published for a run that was cut down."""
        why = f"reduced: {self.row.reduced}" if self.row.reduced else self.runs[0].incomparable if self.runs else ""
        section, name = self.number.metric.split(".")
        words = f"{TITLES.get(section, section)} {in_words(name)}"
        published, tolerance = (None, None) if why else (self.number.published, self.number.tolerance)
        return Verdict(words, published, self.stat.mean, tolerance, self.number.source, why)

    @property
    def verdict(self) -> str:
        """within, below or above; or why there is none."""
        held = self.held
        if not self.runs:
            return "not run"
        if held.note:
            return f"not comparable ({held.note})"
        if held.ours is None:
            return "not measured"
        if held.difference is None:
            return "-"
        if held.tolerance is None:
            return "not judged"
        return "within" if held.within else "above" if held.difference > 0 else "below"

    @property
    def cells(self) -> list[str]:
        """Its line in a table."""
        held = self.held
        tolerance = f" ± {number(held.tolerance)}" if held.tolerance is not None else ""
        kind = self.number.kind.value if self.number.kind and held.published is not None else "-"
        ours = self.stat.text(Column("", ""), interval=False) or "-"
        published = f"{number(held.published)}{tolerance}"
        source = "-" if held.published is None else held.source
        cells = [kind, published, ours, signed(held.difference), self.verdict, source]
        return [self.name, self.row.what, held.metric, *cells]


def read_records(groups: Mapping[str, Group], records: Path) -> Records:
    """The finished runs of every row below the folder ``records``, which may be missing."""
    return {name: _runs(name, row, records) for group in groups.values() for name, row in group.rows.items()}


def statistics(runs: Sequence[Run], metric: str) -> Stat:
    """A metric over runs that differ in seed and order."""
    section, name = metric.split(".")
    if name in DISPARITIES:
        orders = make_orders(make_rows(runs))
        return orders[0].stat(section, name) if orders else Stat.of(pd.Series([], dtype=float))
    return Stat.of(_values(runs, metric))


def lines(group: Group, records: Records) -> list[Line]:
    """The numbers of a group."""
    return [Line(name, row, number, records[name]) for name, row in group.rows.items() for number in row.numbers]


def tables(group: Group, records: Records) -> list[Table]:
    """The numbers of a group, and what is claimed of its rows."""
    shown = [Table(group.title, NOTE, HEADER, [line.cells for line in lines(group, records)], (4, 5, 6))]
    if group.claims:
        header = ["above", "below", "metric", "runs in common", "difference [95 % CI]", "verdict"]
        note = (
            f"Holds: the paired 95 % confidence interval of the difference lies above 0 (Student's t; {MIN_SEEDS} runs "
            "with the same seed and order, or more)."
        )
        shown.append(Table("Claims", note, header, [_claim(claim, records) for claim in group.claims], (3, 4)))
    return shown


def show(group: Group, records: Records) -> None:
    """Print the tables of a group."""
    show_tables(tables(group, records), [])


def write_all(groups: Mapping[str, Group], records: Records, out: Path, command: str) -> None:
    """Write ``table.md``, and of each group with a finished run its comparison, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Published numbers and ours", f"Made by `{command}`. {NOTE}"]
    for name, group in groups.items():
        numbers, *claims = tables(group, records)
        parts += [f"## {group.title} (`{name}`)", markdown(numbers)]
        for table in claims:
            parts += [f"### {table.title}", markdown(table), table.note]
        folders = [str(run.folder) for row in group.rows for run in records[row]]
        if folders:
            write(compare(folders), out / name, command)
            parts.append(f"[Accuracy, cost, paired tests]({name}/table.md)")
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def fill(text: str, groups: Mapping[str, Group], records: Records) -> str:
    """A page with the numbers of finished rows at its marked places."""

    def table(match: re.Match[str]) -> str:
        wanted = list(groups) if match[2] == "all" else match[2].split()
        found = [line for name in wanted for line in lines(groups[name], records) if line.runs]
        body = "No full-size run has been recorded yet."
        if found:
            body = f"{markdown(Table('', '', HEADER[:-1], [line.cells[:-1] for line in found], (4, 5, 6)))}\n\n{NOTE}"
        return f"{match[1]}{body}\n{match[4]}"

    return MARKED.sub(table, text)


def fill_pages(pages: Sequence[Path], groups: Mapping[str, Group], records: Records) -> None:
    """Bring the marked places of pages up to date."""
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill(before, groups, records)
        if after != before:
            page.write_text(after, encoding="utf-8")


def _runs(name: str, row: Row, records: Path) -> list[Run]:
    """The runs of a row: alike in all but seed and order, each seed once in each order."""
    files = sorted(records.glob(f"{row.experiment}/{name}-*/seed*/summary.json"))
    runs = [run for run in (Run.read(file.parent) for file in files) if run.summary["name"] == name]
    seen: dict[str, Run] = {}
    for run in runs:
        keys = [key for key in unlike(settings(runs[0]), settings(run)) if key not in ORDER_KEYS]
        twin = runs[0] if keys else seen.get(_place(run))
        got = f"{', '.join(keys) or 'the same seed and order'} in {run.folder} and {twin.folder if twin else ''}"
        require(
            twin is None,
            name,
            expected="runs of one setting that differ in seed and order",
            got=got,
            fix="Remove the folder that is out of date.",
        )
        seen[_place(run)] = run
    return runs


def _place(run: Run) -> str:
    return json.dumps([run.summary["seed"], run.summary["class_order"]])


def _value(run: Run, metric: str) -> float | None:
    section, name = metric.split(".")
    if name != "first_task_accuracy":
        return run.value(section, name)
    first = float(run.record.get_matrix(section).accuracy[0, 0])
    return first if math.isfinite(first) else None


def _values(runs: Sequence[Run], metric: str) -> pd.Series:
    return pd.Series({_place(run): _value(run, metric) for run in runs}, dtype=float).dropna()


def _claim(claim: Claim, records: Records) -> list[str]:
    above, below = records[claim.above], records[claim.below]
    section, name = claim.metric.split(".")
    metric = f"{TITLES.get(section, section)} {in_words(name)}"
    both = pd.concat([_values(above, claim.metric), _values(below, claim.metric)], axis=1, join="inner")
    start = [claim.above, claim.below, metric, str(len(both))]
    if not len(both):
        return [*start, "-", "not run"]
    difference = signed(float((both.iloc[:, 0] - both.iloc[:, 1]).mean()))
    why = above[0].incomparable or below[0].incomparable
    if len(both) < MIN_SEEDS:
        return [*start, difference, f"not judged ({why or 'too few runs'})"]
    test = paired_test(both)
    interval = f"{difference} [{signed(test['ci95_low'])}, {signed(test['ci95_high'])}]"
    verdict = f"not judged ({why})" if why else "holds" if test["ci95_low"] > 0 else "does not hold"
    return [*start, interval, verdict]
