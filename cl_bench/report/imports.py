"""Results of other programs as runs of a comparison: Mammoth's logs, Avalanche's CSV logs, plain accuracy matrices.

Only accuracies are taken from a file. Every metric is computed from them by our definitions (``cl_bench/metrics``);
what a program itself reports as forgetting is kept beside them. No file is trusted: a line of Mammoth's is a Python
dictionary and is read as a literal, nothing in it is called.
"""

import ast
import csv
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.core.errors import ConfigError, require
from cl_bench.core.record import SCHEMA, SETTINGS, Matrix, Record, replace_non_finite
from cl_bench.metrics.accuracy import average_accuracy, average_incremental_accuracy, learning_accuracy
from cl_bench.metrics.forgetting import forgetting, forgetting_clipped, forgetting_first_last
from cl_bench.metrics.transfer import backward_transfer
from cl_bench.report.folders import LeftOut
from cl_bench.report.page import Run

METRICS = (
    *(average_accuracy, average_incremental_accuracy, learning_accuracy, backward_transfer),
    *(forgetting, forgetting_first_last, forgetting_clipped),
)
"""Computed from every imported matrix."""

REPORTED = "forgetting_reported"
"""What the other program wrote as forgetting, by its own definition."""

_SEED = "seed"
_NO_SETTING = re.compile(r"conf_|ckpt|path|wandb|notes|device|non_verbose|disable_log|num_workers|save|memory_usage")
"""Arguments of Mammoth that do not change a result, and what it measured of the machine."""

_RESULT = re.compile(r"accmean_task\d+|accuracy_\d+_task\d+|forgetting|(forward|backward)_transfer")
_RESUMED = ("loadcheck", "start_from")
_OPTION = "--import"


@dataclass(frozen=True)
class ImportedRun(Run):
    """A run of another program; its folder is the file that it was read from."""

    measured: Record = None  # type: ignore[assignment]

    @functools.cached_property
    def record(self) -> Record:
        """Its accuracies, as if each task had 100 images."""
        return self.measured


@dataclass(frozen=True)
class _Found:
    """One setting of one run, as it was read.

    Attributes:
        key: two settings of one run have it in common.
        reported: forgetting as the program wrote it, in points; None if it did not.
    """

    key: tuple[Any, ...]
    program: str
    name: str
    source: str
    path: Path
    setting: str
    matrix: Matrix
    reported: float | None
    seed: int | None
    arguments: dict[str, Any]


def read_imports(texts: Sequence[str]) -> tuple[list[Run], list[LeftOut]]:
    """The runs in files of other programs, and what is left out of them.

    Args:
        texts: ``PATH`` or ``NAME=PATH`` each. A path is a file, Avalanche's folder of CSV logs, or a folder with
            Mammoth's ``logs.pyd`` anywhere below. Several files of one name are seeds of one row, in their order.
            A path with ``task-il`` or ``task_il`` in it holds Task-IL accuracies, any other one Class-IL.

    Raises:
        ConfigError: a file is not there, cannot be read, or has no complete run.
    """
    found: list[_Found] = []
    left_out: list[LeftOut] = []
    times: dict[tuple[str, str], int] = {}
    for text in texts:
        name, path = _split_option(text)
        for file in _list_files(path):
            setting = "task_il" if re.search("task[-_]il", str(file).lower()) else "class_il"
            with file.open(encoding="utf-8", errors="replace") as lines:
                first = lines.readline()
            if first.startswith("{"):
                read, left = _read_mammoth(file, setting, name)
                found += read
                left_out += left
                continue
            reader = _read_avalanche if first.startswith("eval_exp,") else _read_matrix
            row = name or str(file)
            times[row, setting] = seed = times.get((row, setting), -1) + 1
            found.append(reader(file, setting, row, seed))
    return _make_runs(found, left_out), left_out


def _split_option(text: str) -> tuple[str | None, Path]:
    name, equals, path = text.partition("=")
    named = bool(equals) and not Path(text).exists()
    chosen = Path(path if named else text)
    require(
        chosen.exists(),
        _OPTION,
        expected="a file of another program, as PATH or NAME=PATH",
        got=f"{str(chosen)!r}, which is not there",
        fix="Mammoth's logs.pyd, Avalanche's eval_results.csv, or a CSV file with an accuracy matrix.",
    )
    return (name if named else None), chosen


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    avalanche = path / "eval_results.csv"
    files = [avalanche] if avalanche.is_file() else sorted(path.rglob("*logs.pyd"))
    require(
        bool(files),
        _OPTION,
        expected="eval_results.csv (Avalanche) or logs.pyd (Mammoth) in a folder",
        got=f"{str(path)!r}, which has none",
        fix="Name the file.",
    )
    return files


def _make_runs(found: Sequence[_Found], left_out: list[LeftOut]) -> list[Run]:
    """The runs, each with all its settings; of a seed that a row has twice the last one counts."""
    together: dict[tuple[Any, ...], list[_Found]] = {}
    for part in found:
        together.setdefault((*part.key, part.matrix.num_tasks), []).append(part)
    runs: dict[tuple[str, int], ImportedRun] = {}
    for parts in sorted(together.values(), key=lambda parts: parts[0].seed is None):
        fingerprint = _hash([parts[0].program, parts[0].name, parts[0].arguments])
        seed = parts[0].seed
        if seed is None:
            seed = next(i for i in itertools.count() if (fingerprint, i) not in runs)
        if (before := runs.pop((fingerprint, seed), None)) is not None:
            again = f"seed {seed} again in {parts[0].source}"
            left_out.append(LeftOut(before.folder, "repeated", f"{before.summary['source']}: {again}"))
        runs[fingerprint, seed] = _make_run(parts, fingerprint, seed)
    return list(runs.values())


def _make_run(parts: Sequence[_Found], fingerprint: str, seed: int) -> ImportedRun:
    first = parts[0]
    tasks = first.matrix.num_tasks
    matrices = {setting: Matrix.empty(tasks) for setting in SETTINGS}
    settings: dict[str, dict[str, float | None]] = {}
    for part in parts:
        matrices[part.setting] = part.matrix
        values = {metric.__name__: metric(part.matrix) for metric in METRICS}
        settings[part.setting] = replace_non_finite(values | {REPORTED: part.reported})
    arguments = first.arguments
    summary = {
        "schema": SCHEMA, "status": "finished", "experiment": first.program, "name": f"{first.name} ({first.program})",
        "method": arguments.get("model", first.name), "backbone": arguments.get("backbone"),
        "scenario": arguments.get("dataset"), "buffer": None, "scale": None, "seed": seed, "class_order_seed": None,
        "data_seed": None, "fingerprint": fingerprint, "comparable": arguments, "published": None, "label": None,
        "class_order": [], "class_names": [], "tasks": [[task] for task in range(tasks)],
        "evaluate_on": "val" if arguments.get("validation") else "test", "class_il": settings.get("class_il", {}),
        "task_il": settings.get("task_il", {}), "cost": {}, "imported": f"{first.program}: {first.path.name}",
        "source": first.source,
    }  # fmt: skip
    return ImportedRun(first.path, summary, Record(matrices["class_il"], matrices["task_il"]))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


# ---- Mammoth


def _read_mammoth(path: Path, setting: str, name: str | None) -> tuple[list[_Found], list[LeftOut]]:
    """A line is a run: its arguments, and ``accuracy_J_taskT``, the accuracy in percent on task J after task T."""
    found, left_out = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        entries = _read_dictionary(line, f"{path}, line {number}")
        cells: dict[tuple[int, int], float] = {}
        for key, value in entries.items():
            if (place := re.fullmatch(r"accuracy_(\d+)_task(\d+)", str(key))) is not None:
                cells[int(place[2]) - 1, int(place[1]) - 1] = _to_float(value, f"{path}, line {number}: {key}")
        matrix, missing = _make_matrix(cells)
        if missing:
            left_out.append(LeftOut(path, "incomplete", f"line {number}: {missing}"))
            continue
        arguments = {
            str(key): replace_non_finite(value)  # nan is unlike itself
            for key, value in entries.items()
            if not _NO_SETTING.search(str(key)) and not _RESULT.fullmatch(str(key)) and key not in (_SEED, *_RESUMED)
        }
        arguments["num_tasks"] = matrix.num_tasks
        arguments["resumed"] = any(entries.get(key) is not None for key in _RESUMED)
        reported = entries.get("forgetting")
        job = entries.get("conf_jobnum") or (str(path), number)
        found.append(
            _Found(
                key=("Mammoth", job),
                program="Mammoth",
                name=name or str(entries.get("model", path)),
                source=f"line {number}",
                path=path,
                setting=setting,
                matrix=matrix,
                reported=float(reported) if isinstance(reported, int | float) else None,
                seed=entries.get(_SEED) if isinstance(entries.get(_SEED), int) else None,
                arguments=arguments,
            )
        )
    if not found:
        why = left_out[0].why if left_out else "no line"
        raise _explain(path, "a complete run", why, "Leave the file out, or finish the run.")
    return found, left_out


class _Literals(ast.NodeTransformer):
    """Turns ``np.float64(1.5)`` into ``1.5``, ``nan`` and ``inf`` into numbers, and any other call into None."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        of_numpy = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
        if of_numpy and function.value.id in ("np", "numpy") and len(node.args) == 1 and not node.keywords:  # type: ignore[attr-defined]
            return self.visit(node.args[0])
        return ast.copy_location(ast.Constant(None), node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        known = {"nan": math.nan, "inf": math.inf}
        return ast.copy_location(ast.Constant(known[node.id]), node) if node.id in known else node


def _read_dictionary(text: str, where: str) -> dict[str, Any]:
    try:
        value = ast.literal_eval(_Literals().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise _explain(where, "a dictionary of plain values, as Mammoth writes it", reason, _FIX) from error
    if not isinstance(value, dict):
        raise _explain(where, "a dictionary, as Mammoth writes it", type(value).__name__, _FIX)
    return value


# ---- Avalanche


def _read_avalanche(path: Path, setting: str, name: str, seed: int) -> _Found:
    """``eval_results.csv`` of CSVLogger: accuracies from 0 to 1; the last line of a pair of experiences counts."""
    cells: dict[tuple[int, int], float] = {}
    lost: dict[tuple[int, int], str] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            where = f"{path}, line {number}"
            try:
                task = int(line["eval_exp"])
                after = -1 if line["training_exp"] == "None" else int(line["training_exp"])
            except (KeyError, TypeError, ValueError) as error:
                raise _explain(where, "eval_exp and training_exp", str(line)[:80], _FIX) from error
            cells[after, task] = 100 * _to_float(line.get("eval_accuracy"), f"{where}: eval_accuracy")
            lost[after, task] = line.get("forgetting") or "0"
    baseline = [cells.pop(key) for key in sorted(key for key in cells if key[0] == -1)]
    matrix, missing = _make_matrix(cells)
    if missing:
        raise _explain(path, "an evaluation on all tasks so far after each task", missing, "Call eval on test_stream.")
    if len(baseline) == matrix.num_tasks:
        matrix.correct[-1] = baseline
    last = matrix.num_tasks - 1
    written = [lost[last, task] for task in range(last)]
    # without its metric the logger writes a plain 0
    known = bool(written) and any(text != "0" for text in written)
    reported = 100 * sum(map(_read_difference, written)) / last if known else None
    return _Found(
        ("Avalanche", name, seed), "Avalanche", name, str(path), path, setting, matrix, reported, seed, {"name": name}
    )


# ---- a plain matrix


def _read_matrix(path: Path, setting: str, name: str, seed: int) -> _Found:
    """Line i, column j: the accuracy in percent on task j after task i; above the diagonal it may be empty."""
    cells: dict[tuple[int, int], float] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in csv.reader(file) if any(cell.strip() for cell in line)]
    for i, line in enumerate(lines):
        for j, cell in enumerate(line):
            if cell.strip() and cell.strip().lower() != "nan":
                cells[i, j] = _to_float(cell, f"{path}, line {i + 1}, column {j + 1}")
    matrix, missing = _make_matrix(cells)
    if missing:
        raise _explain(path, "T lines, the accuracies in percent after each of T tasks", missing, _FIX)
    require(
        np.nanmax(matrix.correct) > 1,
        f"{_OPTION}: {path}",
        expected="accuracies in percent",
        got="none above 1",
        fix="Multiply them by 100.",
    )
    return _Found(("matrix", name, seed), "matrix", name, str(path), path, setting, matrix, None, seed, {"name": name})


# ---- what all have in common

_FIX = "See docs/comparison.md for the formats."


def _make_matrix(cells: dict[tuple[int, int], float]) -> tuple[Matrix, str]:
    """(after task, task) -> accuracy, from 0, as a matrix; and what is missing in it, or an empty text."""
    tasks = 1 + max((after for after, _ in cells), default=-1)
    if tasks == 0:
        return Matrix.empty(0), "no accuracy"
    for after in range(tasks):
        measured = sum((after, task) in cells for task in range(after + 1))
        if measured < after + 1:
            return Matrix.empty(0), f"after task {after + 1} there are {measured} of {after + 1} accuracies"
    matrix = Matrix.empty(tasks)
    matrix.count[:] = 100.0
    for (after, task), accuracy in cells.items():
        if task < tasks:
            matrix.correct[after, task] = accuracy
    return matrix, ""


def _to_float(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 100:
        raise _explain(where, "an accuracy from 0 to 100", repr(value)[:40], _FIX)
    return number


def _read_difference(text: str) -> float:
    """A number that may be negative; nan if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _explain(where: str | Path, expected: str, got: str, fix: str) -> ConfigError:
    return ConfigError(f"{_OPTION}: {where}", expected=expected, got=got, fix=fix)
