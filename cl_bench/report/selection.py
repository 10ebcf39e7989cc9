"""What a comparison shows: which runs, in which order and groups, and which metrics."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cl_bench.core.errors import ConfigError, require
from cl_bench.core.labels import format_value, shorten_text
from cl_bench.core.record import SETTINGS
from cl_bench.report.labels import ABSENT
from cl_bench.report.page import Run
from cl_bench.report.rows import Row

FACTS = (
    *("experiment", "name", "method", "backbone", "scenario", "buffer", "scale", "evaluate_on", "seed"),
    *("class_order_seed", "data_seed", "fingerprint", "label"),
)
"""Entries of ``summary.json`` by which runs are chosen, beside the settings of their configuration."""

SECTIONS = (*SETTINGS, "cost")
"""Parts of ``summary.json`` that hold metrics."""

GREATER_COSTS = ("images_per_second", "samples_seen")
"""Costs of which more is better; of all others less is."""


@dataclass(frozen=True)
class Selection:
    """The options of a comparison, as typed.

    Attributes:
        where: ``KEY=VALUE`` or ``KEY=VALUE,VALUE`` each; a run is kept if all of them hold.
        group: the key whose values the rows are grouped by.
        metrics: the columns; without any, accuracies and costs.
        reference: the row that the others are compared with: its label, its number, or a part of its label.
        sort: a metric (best first) or a key (least first); Class-IL accuracy by default.
    """

    where: Sequence[str] = ()
    group: str | None = None
    metrics: Sequence[str] = ()
    reference: str | None = None
    sort: str | None = None


def choose_runs(runs: Sequence[Run], where: Sequence[str]) -> list[Run]:
    """The runs for which every condition holds.

    Raises:
        ConfigError: a key is unknown, or no run is left.
    """
    chosen = list(runs)
    for text in where:
        key, equals, value = text.partition("=")
        require(bool(equals), "--where", expected="KEY=VALUE", got=text, fix="For example --where method=er.")
        key = find_key(runs, key, "--where")
        accepted = {value} if value.startswith("[") else set(value.split(","))
        occurring = dict.fromkeys(_get_text(run, key) for run in chosen)
        chosen = [run for run in chosen if _is_among(_get_text(run, key), accepted)]
        if not chosen:
            few = ", ".join(map(shorten_text, sorted(occurring)[:10]))
            raise ConfigError("--where", expected=f"a value of {key} that a run has", got=text, fix=f"There is {few}.")
    return chosen


def arrange_rows(rows: Sequence[Row], selection: Selection) -> list[Row]:
    """The rows in the order asked for, each with its value of the key to group by."""
    runs = [row.runs[0] for row in rows]
    arranged = list(rows)
    if selection.sort is not None:
        arranged = _sort(arranged, runs, selection.sort)
    if selection.group is not None:
        key = find_key(runs, selection.group, "--group")
        require(
            key != "seed",
            "--group",
            expected="a key that a row has once",
            got=key,
            fix="A row averages over its seeds.",
        )
        arranged = [replace(row, group=_get_text(row.runs[0], key)) for row in arranged]
        arranged.sort(key=lambda row: _make_order(row.group))
    return arranged


def find_reference(rows: Sequence[Row], text: str) -> int:
    """The position of the row that ``--reference`` names."""
    for fits in (
        lambda i: rows[i].label == text,
        lambda i: str(i + 1) == text,
        lambda i: text.lower() in rows[i].label.lower(),
    ):
        found = [i for i in range(len(rows)) if fits(i)]
        if len(found) == 1:
            return found[0]
    close = difflib.get_close_matches(text, [row.label for row in rows], n=1, cutoff=0)
    raise ConfigError(
        "--reference",
        expected=f"the label of one row or its number, 1 to {len(rows)}",
        got=f"{text!r}, which {'fits several rows' if found else 'fits none'}",
        fix=f"For example --reference {json.dumps(close[0])}.",
    )


def find_metrics(runs: Iterable[Run], names: Sequence[str], option: str = "--metrics") -> list[str]:
    """``section.name`` of each metric; a name without a section stands for every section that has it.

    Raises:
        ConfigError: a name that no run has.
    """
    known = dict.fromkeys(
        f"{section}.{name}"
        for run in runs
        for section in SECTIONS
        for name, value in (run.summary[section] or {}).items()
        if value is None or isinstance(value, int | float)
    )
    found: dict[str, None] = {}
    for name in names:
        key = name.replace("/", ".")
        keys = [key] if key in known else [k for k in known if k.partition(".")[2] == key]
        if not keys:
            raise _explain_unknown(option, "a metric of these runs", name, known)
        found |= dict.fromkeys(keys)
    return list(found)


def is_greater_better(metric: str) -> bool:
    """Whether more of a metric is better; it is ``section.name`` of ``summary.json``."""
    section, _, name = metric.partition(".")
    if section == "cost":
        return name in GREATER_COSTS
    return not ("forgetting" in name or "gap" in name)


def find_key(runs: Iterable[Run], key: str, option: str) -> str:
    """The whole key for a key or for the last part of one.

    Raises:
        ConfigError: no run has it, or several keys end like this.
    """
    known = dict.fromkeys([*FACTS, *(name for run in runs for name in run.summary["comparable"])])
    if key in known:
        return key
    found = [name for name in known if name.rpartition(".")[2] == key]
    if len(found) > 1:
        raise ConfigError(option, expected="the whole key", got=key, fix=f"Use {' or '.join(sorted(found))}.")
    if not found:
        raise _explain_unknown(option, "a key of these runs", key, known)
    return found[0]


def _explain_unknown(option: str, expected: str, got: str, known: Iterable[str]) -> ConfigError:
    names = {name.rpartition(".")[2]: name for name in known} | {name: name for name in known}
    close = difflib.get_close_matches(got, names, n=1)
    fix = f"Did you mean {names[close[0]]}?" if close else f"There are, for example, {', '.join(list(known)[:8])}."
    return ConfigError(option, expected=expected, got=got, fix=fix)


def _sort(rows: list[Row], runs: Sequence[Run], name: str) -> list[Row]:
    try:
        metric = find_metrics(runs, [name], "--sort")[0]
    except ConfigError:
        key = find_key(runs, name, "--sort")
        return sorted(rows, key=lambda row: _make_order(_get_text(row.runs[0], key)))
    sign = -1 if is_greater_better(metric) else 1
    means = {id(row): row.stat(metric).mean for row in rows}
    return sorted(rows, key=lambda row: (means[id(row)] is None, sign * (means[id(row)] or 0.0)))


def _make_order(text: str) -> tuple[bool, float, str]:
    """Numbers by size, then other values by name."""
    number = _to_number(text)
    return (True, 0.0, text) if number is None else (False, number, "")


def _to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _get_text(run: Run, key: str) -> str:
    if key in FACTS:
        return format_value(run.summary.get(key))
    settings: dict[str, Any] = run.summary["comparable"]
    return format_value(settings[key]) if key in settings else ABSENT


def _is_among(text: str, accepted: set[str]) -> bool:
    """Whether a value is one of those typed; 0.10 is 0.1."""
    number = _to_number(text)
    return text in accepted or (number is not None and number in map(_to_number, accepted))
