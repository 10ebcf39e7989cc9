"""Published numbers beside ours: tables from the records of reproduced settings."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cl_bench.core.errors import require
from cl_bench.core.record import TITLES
from cl_bench.report.compare import compare, write
from cl_bench.report.page import Run, Verdict, format_number, format_signed, to_words
from cl_bench.report.published import Claim, Group, Kind, Number, Row
from cl_bench.report.rows import DISPARITIES, ORDER_KEYS, find_differences, get_settings, make_orders, make_rows
from cl_bench.report.statistics import MIN_SEEDS, Stat, run_paired_test
from cl_bench.report.tables import Column, Table, format_markdown, format_stat, show_tables

Records = Mapping[str, list[Run]]
"""Finished runs by the name of their row."""

MARKED = re.compile(r"(<!-- reproduction: ([\w ]+) -->\n)(.*?)(<!-- end of reproduction -->)", re.DOTALL)
"""The part of a page that has the table of some groups, or of ``all``."""

HEADER = [
    *("row", "what", "metric", "kind", "published", "ours (n)", "difference", "tolerance", "verdict", "minutes"),
    "source",
]
NUMERIC = (4, 5, 6, 7, 9)

NOTE = (
    "Ours: mean ± sample standard deviation over seeds and orders (number of runs; of AOPD and MOPD, of seeds). "
    "PASS: the difference is at most the tolerance. Kind: a gate is sourced, of this very setting; soft is sourced, of "
    "a setting that is not quite this one; recalled is from memory, for orientation only, and not judged. Minutes: of "
    "training and evaluation, a mean over the runs."
)


@dataclass(frozen=True)
class Line:
    """A published number of a row, and our result."""

    name: str
    row: Row
    number: Number
    runs: list[Run]

    @property
    def stat(self) -> Stat:
        """Our number; of a disparity only if every order of the row has been run."""
        orders = {str(run.summary["class_order"]) for run in self.runs}
        partial = self.number.metric.split(".")[1] in DISPARITIES and len(orders) < len(self.row.orders)
        return compute_stat([] if partial else self.runs, self.number.metric)

    @property
    def compared(self) -> Verdict:
        """The published number beside ours; a run that was cut down has none."""
        why = self.runs[0].explain_incomparable(self.row.evaluate_on) if self.runs else ""
        why = f"reduced: {self.row.reduced}" if self.row.reduced else why
        section, name = self.number.metric.split(".")
        words = f"{TITLES.get(section, section)} {to_words(name)}"
        published, tolerance = (None, None) if why else (self.number.published, self.number.tolerance)
        return Verdict(words, published, self.stat.mean, tolerance, self.number.source, why)

    @property
    def verdict(self) -> str:
        """PASS or FAIL; or why there is no verdict."""
        compared = self.compared
        if not self.runs:
            return "not run"
        if compared.note:
            return f"not comparable ({compared.note})"
        if compared.ours is None:
            return "not measured"
        if compared.difference is None:
            return "-"
        if compared.tolerance is None:
            return "not judged"
        if self.number.kind is Kind.recalled:
            return "not judged (recalled)"
        words = "PASS" if compared.within else f"FAIL ({'above' if compared.difference > 0 else 'below'})"
        planned = self.row.seeds * max(1, len(self.row.orders))
        return words if len(self.runs) >= planned else f"{words} so far, {len(self.runs)} of {planned} runs"

    @property
    def minutes(self) -> float | None:
        """Minutes of training and evaluation, a mean over the runs."""
        seconds = [[run.value("cost", f"{part}_seconds") for part in ("train", "evaluate")] for run in self.runs]
        known = [train + evaluate for train, evaluate in seconds if train is not None and evaluate is not None]
        return sum(known) / len(known) / 60 if known else None

    @property
    def cells(self) -> list[str]:
        """Its line in a table."""
        compared = self.compared
        tolerance = f"± {format_number(compared.tolerance)}" if compared.tolerance is not None else "-"
        kind = self.number.kind.value if self.number.kind and compared.published is not None else "-"
        ours = format_stat(self.stat, Column("", ""), interval=False) or "-"
        known = [word for word in (self.number.spread, f"n = {self.number.n}" if self.number.n else "") if word]
        spread = f" ({', '.join(known)})" if known and compared.published is not None else ""
        published = f"{format_number(compared.published)}{spread}"
        minutes = "-" if self.minutes is None else f"{self.minutes:.1f}"
        source = "-" if compared.published is None else compared.source
        judged = [format_signed(compared.difference), tolerance, self.verdict]
        cells = [kind, published, ours, *judged, minutes, source]
        return [self.name, self.row.what, compared.metric, *cells]


def read_records(groups: Mapping[str, Group], records: Path) -> Records:
    """The finished runs of every row below the folder ``records``, which may be missing."""
    return {name: _read_runs(name, row, records) for group in groups.values() for name, row in group.rows.items()}


def compute_stat(runs: Sequence[Run], metric: str) -> Stat:
    """A metric over runs that differ in seed and order."""
    section, name = metric.split(".")
    if name in DISPARITIES:
        orders = make_orders(make_rows(runs))
        return orders[0].stat(section, name) if orders else Stat.of(pd.Series([], dtype=float))
    return Stat.of(_collect(runs, metric))


def make_lines(group: Group, records: Records) -> list[Line]:
    """The numbers of a group."""
    return [Line(name, row, number, records[name]) for name, row in group.rows.items() for number in row.numbers]


def make_tables(group: Group, records: Records) -> list[Table]:
    """The numbers of a group, and the claims about its rows."""
    shown = [Table(group.title, NOTE, HEADER, [line.cells for line in make_lines(group, records)], NUMERIC)]
    if group.claims:
        header = ["above", "below", "metric", "runs in common", "difference [95 % CI]", "verdict"]
        note = (
            f"Holds: the paired 95 % confidence interval of the difference lies above 0 (Student's t; {MIN_SEEDS} runs "
            "with the same seed and order, or more)."
        )
        shown.append(Table("Claims", note, header, [_judge_claim(claim, records) for claim in group.claims], (3, 4)))
    return shown


def show(group: Group, records: Records) -> None:
    """Print the tables of a group."""
    show_tables(make_tables(group, records), [])


def write_all(groups: Mapping[str, Group], records: Records, out: Path, command: str) -> None:
    """Write ``table.md``, and of each group with a finished run its comparison, into the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Published numbers and ours", f"Made by `{command}`. {NOTE}"]
    for name, group in groups.items():
        numbers, *claims = make_tables(group, records)
        parts += [f"## {group.title} (`{name}`)", format_markdown(numbers)]
        for table in claims:
            parts += [f"### {table.title}", format_markdown(table), table.note]
        folders = [str(run.folder) for row in group.rows for run in records[row]]
        if folders:
            write(compare(folders), out / name, command)
            parts.append(f"[Accuracy, cost, paired tests]({name}/table.md)")
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def fill_text(text: str, groups: Mapping[str, Group], records: Records) -> str:
    """The text of a page, with the numbers of finished rows in its marked parts."""

    def table(match: re.Match[str]) -> str:
        wanted = list(groups) if match[2] == "all" else match[2].split()
        found = [line for name in wanted for line in make_lines(groups[name], records) if line.runs]
        body = "No full-size run has been recorded yet."
        if found:
            shown = Table("", "", HEADER[:-1], [line.cells[:-1] for line in found], NUMERIC)
            body = f"{format_markdown(shown)}\n\n{NOTE}"
        return f"{match[1]}{body}\n{match[4]}"

    return MARKED.sub(table, text)


def fill_pages(pages: Sequence[Path], groups: Mapping[str, Group], records: Records) -> None:
    """Write the current numbers into the marked parts of pages."""
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill_text(before, groups, records)
        if after != before:
            page.write_text(after, encoding="utf-8")


def _read_runs(name: str, row: Row, records: Path) -> list[Run]:
    """The runs of a row: they differ only in seed and order, and each seed is there once in each order."""
    files = sorted(records.glob(f"{row.experiment}/{name}-*/seed*/summary.json"))
    runs = [run for run in (Run.read(file.parent) for file in files) if run.summary["name"] == name]
    seen: dict[str, Run] = {}
    for run in runs:
        keys = [key for key in find_differences(get_settings(runs[0]), get_settings(run)) if key not in ORDER_KEYS]
        twin = runs[0] if keys else seen.get(_identify(run))
        got = f"{', '.join(keys) or 'the same seed and order'} in {run.folder} and {twin.folder if twin else ''}"
        require(
            twin is None,
            name,
            expected="runs of one setting that differ in seed and order",
            got=got,
            fix="Remove the folder that is out of date.",
        )
        seen[_identify(run)] = run
    return runs


def _identify(run: Run) -> str:
    return json.dumps([run.summary["seed"], run.summary["class_order"]])


def _get_value(run: Run, metric: str) -> float | None:
    section, name = metric.split(".")
    if name != "first_task_accuracy":
        return run.value(section, name)
    first = float(run.record.get_matrix(section).accuracy[0, 0])
    return first if math.isfinite(first) else None


def _collect(runs: Sequence[Run], metric: str) -> pd.Series:
    return pd.Series({_identify(run): _get_value(run, metric) for run in runs}, dtype=float).dropna()


def _judge_claim(claim: Claim, records: Records) -> list[str]:
    above, below = records[claim.above], records[claim.below]
    section, name = claim.metric.split(".")
    metric = f"{TITLES.get(section, section)} {to_words(name)}"
    both = pd.concat([_collect(above, claim.metric), _collect(below, claim.metric)], axis=1, join="inner")
    start = [claim.above, claim.below, metric, str(len(both))]
    if not len(both):
        return [*start, "-", "not run"]
    difference = format_signed(float((both.iloc[:, 0] - both.iloc[:, 1]).mean()))
    images = [run.summary["evaluate_on"] for run in (above[0], below[0])]
    why = above[0].explain_incomparable(images[1]) or below[0].explain_incomparable(images[0])
    if len(both) < MIN_SEEDS:
        return [*start, difference, f"not judged ({why or 'too few runs'})"]
    test = run_paired_test(both)
    interval = f"{difference} [{format_signed(test['ci95_low'])}, {format_signed(test['ci95_high'])}]"
    verdict = f"not judged ({why})" if why else "holds" if test["ci95_low"] > 0 else "does not hold"
    return [*start, interval, verdict]
