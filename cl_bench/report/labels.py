"""Labels of rows: the settings by which a row can be told from the others that are shown."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cl_bench.core.labels import format_settings, format_value, parse_overrides

CHOICES = ("experiment", "method", "backbone", "scenario", "buffer", "scale", "evaluate_on")
"""Entries of ``summary.json`` that are named once if all rows have them in common."""

ABSENT = "default"
"""The value of a setting that a run does not name: it is older than the setting, or the setting has its default."""

_FEW = 3  # settings that are all named in a label if nobody typed them

Summary = Mapping[str, Any]
"""``summary.json`` of the first run of a row."""


def make_labels(rows: Sequence[Summary]) -> list[str]:
    """For each row what tells it from the others: a text of the user's own, or name, experiment and settings.

    A row is named by its settings alone if all rows have one name, and by its name alone if no other row has it. Of the
    settings that differ, those that were typed are named, and others only if these do not suffice.
    """
    texts = [_get_own_text(row) for row in rows]
    times = Counter(texts)
    experiments: dict[str, set[str]] = {}
    for row in rows:
        experiments.setdefault(row["name"], set()).add(row["experiment"])
    members: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault((row["experiment"], row["name"]), []).append(i)
    differing: list[dict[str, str]] = [{} for _ in rows]
    for group in members.values():
        for i, settings in zip(group, _select_settings([rows[i] for i in group])):
            differing[i] = settings
    known = {key for row in rows for key in list_settings(row)}
    labels = []
    for row, text, settings in zip(rows, texts, differing):
        several = len(experiments[row["name"]]) > 1
        parts = [row["experiment"]] if several else []
        parts += [row["name"]] if len(experiments) > 1 else []
        named = " ".join(filter(None, ["/".join(parts), format_settings(settings, known)]))
        labels.append(text if text and times[text] == 1 else named or row["name"])
    counts = Counter(labels)
    return [label if counts[label] == 1 else f"{label} ({row['fingerprint']})" for label, row in zip(labels, rows)]


def describe_common(rows: Sequence[Summary], seeds: Sequence[Sequence[int]]) -> str:
    """What all rows have in common, as one sentence: names, overrides that were typed in all of them, seeds."""
    first = rows[0]
    common = {key: first[key] for key in CHOICES if first[key] is not None and _is_one(row[key] for row in rows)}
    if first["evaluate_on"] == "test":
        common.pop("evaluate_on", None)
    typed = [parse_overrides(row.get("label")) for row in rows]
    common |= {key: value for key, value in typed[0].items() if _is_one(others.get(key) for others in typed)}
    if _is_one(map(tuple, seeds)):
        common["seed"] = ",".join(map(str, seeds[0]))
    return f"In all rows: {format_settings(common, most=100)}." if common else ""


def list_settings(row: Summary) -> dict[str, Any]:
    """The settings by which a row is compared; the class of a component stands under the component's own key."""
    settings = {key: row[key] for key in ("scale", "evaluate_on")}
    for key, value in row["comparable"].items():
        owner, _, last = key.rpartition(".")
        if last == "_target_":
            settings[owner] = value.rpartition(".")[2]
        elif key != "trainer.evaluate_on":  # said above
            settings[key] = value
    return settings


def _select_settings(rows: Sequence[Summary]) -> list[dict[str, str]]:
    """For each of some rows of one experiment and name the settings that tell it from the others."""
    if len(rows) == 1:
        return [{}]
    settings = [list_settings(row) for row in rows]
    typed = [parse_overrides(row.get("label")) for row in rows]
    texts = {
        key: [
            format_value(values[key]) if key in values else overrides.get(key, ABSENT)
            for values, overrides in zip(settings, typed)
        ]
        for key in sorted({key for values in settings for key in values})
    }
    varying = [key for key, column in texts.items() if len(set(column)) > 1]
    # what only one of two optimizers has is told by the optimizer
    differing = tuple(f"{key}." for key in varying if any(f"{key}._target_" in row["comparable"] for row in rows))
    varying = [k for k in varying if not k.startswith(differing) or all(k in values for values in settings)]
    mentioned = {"scale"}.union(*typed)
    if "trainer.evaluate_on" in mentioned:
        mentioned.add("evaluate_on")
    kept = [key for key in varying if key in mentioned or key.removeprefix("scenario.") in mentioned]
    if not kept and len(varying) <= _FEW:
        kept = varying
    told = _count_distinct(texts, kept, len(rows))
    for key in sorted(set(varying) - set(kept), key=lambda key: (key.count("."), key)):
        if told == len(rows):
            break
        if (more := _count_distinct(texts, [*kept, key], len(rows))) > told:
            kept, told = [*kept, key], more
    return [{key: texts[key][i] for key in kept} for i in range(len(rows))]


def _count_distinct(texts: Mapping[str, Sequence[str]], keys: Sequence[str], rows: int) -> int:
    return len({tuple(texts[key][i] for key in keys) for i in range(rows)})


def _get_own_text(row: Summary) -> str:
    text = row.get("label") or ""
    return "" if parse_overrides(text) else " ".join(text.split())


def _is_one(values: Iterable[Any]) -> bool:
    return len({repr(value) for value in values}) == 1
