"""The report of one run: pictures and one self-contained page, made only from the files of its folder."""

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from cl_bench.core.errors import ConfigError, require
from cl_bench.core.record import SCHEMA, SETTINGS, TITLES, Matrix, Record, get_measure, name_measure
from cl_bench.engine.evaluate import read_predictions
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.report import plots
from cl_bench.report.svg import Panel, render_panels
from cl_bench.system.atomic import write_text

BOXES = "boxes"
"""The picture of test images with what a detector found."""

CARDS = (
    ("class_il", "average_accuracy", "%"),
    ("class_il", "average_incremental_accuracy", "%"),
    ("class_il", "forgetting", ""),
    ("task_il", "average_accuracy", "%"),
)
"""The numbers at the head of the page: setting, metric, unit."""

CARDS_OF_DETECTION = (*(("class_il", f"AP_{classes}", "%") for classes in ("all", "old", "new")), CARDS[2])
"""The same of a detector."""

SETTINGS_ARE = (
    "Class-IL predicts among all classes seen, Task-IL among those of the image's task; both with the same weights."
)
DETECTION_IS = (
    "Average AP is a mean over tasks; AP of all, old and new classes is one over the classes seen, those of earlier "
    "tasks and those of the last task. Task-IL is not defined for boxes."
)


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder.

    Attributes:
        folder: its run folder.
        summary: ``summary.json``.
    """

    folder: Path
    summary: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The run in ``folder``; :class:`ConfigError` if it is not finished."""
        return cls(folder, _read_summary(folder / "summary.json"))

    @functools.cached_property
    def record(self) -> Record:
        """The accuracy matrices of ``accuracy_matrix.csv``, and the curves of ``curve.csv`` if it is there.

        They are read when they are first asked for: a table of thousands of runs needs none.
        """
        path = self.folder / "accuracy_matrix.csv"
        record = _read_record(path, len(self.summary["tasks"]))
        for setting in SETTINGS:
            _require_matrix_of(path, record.get_matrix(setting), self.value(setting, "average_accuracy"))
        _read_curves(self.folder / "curve.csv", record)
        return record

    def value(self, section: str, name: str) -> float | None:
        """A number of the summary's ``class_il``, ``task_il`` or ``cost``; None if it is unknown."""
        return (self.summary[section] or {}).get(name)

    @property
    def measure(self) -> str:
        """The word for what was measured: ``accuracy``, or ``AP`` in detection."""
        return get_measure(self.summary)

    def explain_incomparable(self, evaluate_on: str = "test") -> str:
        """Why this run is not compared with a published number; empty if it may be.

        Args:
            evaluate_on: the images that the number was measured on.
        """
        if self.summary["scale"] is not None:
            return f"scale={self.summary['scale']}"
        if self.summary["evaluate_on"] != evaluate_on:
            return f"measured on {self.summary['evaluate_on']} images"
        return ""


@dataclass(frozen=True)
class Verdict:
    """A published number beside ours; None if a number is unknown or must not be compared.

    Attributes:
        metric: setting and metric in words.
        published, ours: the numbers, in the metric's unit.
        tolerance: the difference, up or down, that still counts as agreement.
        source: where the number is from.
        note: why there is no comparison; empty if there is one.
    """

    metric: str
    published: float | None
    ours: float | None
    tolerance: float | None
    source: str
    note: str

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.published is None or self.ours is None else self.ours - self.published

    @property
    def within(self) -> bool | None:
        """Whether the difference is within the tolerance."""
        if self.difference is None or self.tolerance is None:
            return None
        return abs(self.difference) <= self.tolerance + 1e-9  # 57.7 - 57.1 is a little more than 0.6 in binary


@dataclass(frozen=True)
class Picture:
    """A figure: its title and caption, its PNG file, and its panels and the lines of its legend for a page."""

    title: str
    caption: str
    png: bytes
    panels: Sequence[Panel]
    legend: Sequence[plots.Key] = ()

    @classmethod
    def of(cls, name: str, figure: Figure, title: str, caption: str, legend: Sequence[plots.Key] = ()) -> "Picture":
        """The picture of a figure; ``name`` is that of its file."""
        png = plots.render_png(figure)  # first, because it lays the figure out
        return cls(title, caption, png, render_panels(figure, name, photos=name == BOXES), legend)


def write_report(folder: Path) -> Path:
    """Write ``plots/*.png`` and ``report.html`` of the finished run in ``folder``; returns the page's path."""
    run = Run.read(folder)
    pictures = {name: Picture.of(name, *figure) for name, figure in _draw_figures(run)}
    say = functools.partial(name_measure, measure=run.measure)
    summary, detection = run.summary, run.measure == "AP"
    page = render(
        "report.html.j2",
        summary=summary,
        warnings=_list_warnings(summary),
        facts=_list_facts(summary),
        accuracies=say("Accuracies"),
        settings=DETECTION_IS if detection else SETTINGS_ARE,
        cards=[
            (say(_format_card_label(*card)), _format_card_value(run, *card))
            for card in (CARDS_OF_DETECTION if detection else CARDS)
        ],
        metrics=[(say(label), *values) for label, *values in _list_metrics(run)],
        odd=[say(sentence) for sentence in _explain_odd_numbers(run)],
        costs=[(label, _format_or_dash(run.value("cost", key), text)) for key, (label, text) in COSTS.items()],
        verdicts=judge(run, run.value),
        pictures=pictures.values(),
        missing=[text for name, text in _ABSENT.items() if name not in pictures and BOXES not in pictures],
        class_order=[[(summary["class_names"][c], c) for c in task] for task in summary["tasks"]],
        config=read_text(folder / "config.yaml"),
        environment=list(_flatten(_read_json(folder / "env.json"))),
    )
    (folder / "plots").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (folder / "plots" / f"{name}.png").write_bytes(picture.png)
    path = folder / "report.html"
    write_text(path, page)  # so that a kill does not leave half a page
    return path


def render(template: str, **values: Any) -> str:
    """A page from a template of this package; every value is escaped."""
    return _make_environment().get_template(template).render(**values)


@functools.cache
def _make_environment() -> jinja2.Environment:
    """Jinja's environment, which keeps the compiled templates for the next page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "signed": format_signed}
    return environment


def judge(run: Run, ours: Callable[[str, str], float | None]) -> list[Verdict]:
    """The published numbers of a run's experiment beside ours.

    Args:
        run: whose summary names the published numbers.
        ours: (setting, metric) -> our number: the run's own value, or a mean over seeds.
    """
    published = dict(run.summary["published"] or {})
    tolerance, source = published.pop("tolerance", None), published.pop("source", "")
    why = run.explain_incomparable()
    note = f"{why}: not compared with a published number" if why else ""
    lines = []
    for key, value in published.items():
        setting = next(s for s in SETTINGS if key.startswith(f"{s}_"))
        metric = key.removeprefix(f"{setting}_")
        words = f"{TITLES[setting]} {to_words(metric)}"
        held = (None, None) if note else (value, tolerance)
        lines.append(Verdict(words, held[0], ours(setting, metric), held[1], source, note))
    return lines


def to_words(metric: str) -> str:
    """A metric's name in words."""
    return metric.replace("_", " ")


def format_number(value: float | None) -> str:
    """Two decimals, or ``-`` if it is unknown."""
    return "-" if value is None or math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"


def format_signed(value: float | None) -> str:
    """Two decimals with a sign, or ``-`` if it is unknown."""
    return "-" if value is None or math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}"


def read_text(path: Path) -> str:
    """The text of a run folder's file; :class:`ConfigError` if it is not there."""
    require(
        path.is_file(),
        str(path),
        expected="a file of a finished run",
        got="no such file",
        fix="Finish the run (the same command resumes it), or run it again with overwrite=true.",
    )
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    text = read_text(path)
    with _explain_damage(path, "a JSON object"):
        return json.loads(text)


def _read_summary(path: Path) -> dict[str, Any]:
    summary = _read_json(path)
    require(isinstance(summary, dict), str(path), expected="a JSON object", got=type(summary).__name__, fix=_RUN_AGAIN)
    schema, status = summary.get("schema"), summary.get("status")
    require(schema == SCHEMA, str(path), expected=f"schema {SCHEMA}", got=f"schema {schema}", fix=_RUN_AGAIN)
    require(
        status == "finished",
        str(path),
        expected="a finished run",
        got=f"status {status}",
        fix="Finish it: the same command resumes it.",
    )
    missing = [key for key in _NEEDED if key not in summary]
    require(not missing, str(path), expected="a whole summary", got=f"one without {', '.join(missing)}", fix=_RUN_AGAIN)
    return summary


def _read_record(path: Path, num_tasks: int) -> Record:
    """The inverse of :meth:`Record.write_csv`; ``after_task`` -1, the untrained network, is the last row."""
    require(path.is_file(), str(path), expected="the accuracy matrix", got="no such file", fix=_RUN_AGAIN)
    record = Record.empty(num_tasks)
    with _explain_damage(path, "the accuracy matrix"):
        table = _read_table(path)
        if table.isna().any(axis=None):
            raise ValueError("a line without all its columns")
        for setting, lines in table.groupby("setting"):
            matrix = record.get_matrix(str(setting))
            matrix.correct[lines["after_task"], lines["task"]] = lines["correct"]
            matrix.count[lines["task"]] = lines["count"]
    return record


def _require_matrix_of(path: Path, matrix: Matrix, known: float | None) -> None:
    """A matrix without its last lines can be read, so it is held against the average accuracy of the summary."""
    found = average_accuracy(matrix)
    require(
        known is None or math.isclose(found, known, abs_tol=1e-6),
        str(path),
        expected=f"the matrix of a run with average accuracy {format_number(known)}, as summary.json says",
        got=f"one with average accuracy {format_number(found)}",
        fix=_RUN_AGAIN,
    )


def _read_curves(path: Path, record: Record) -> None:
    """The inverse of :meth:`Record.write_curve_csv`; runs without continual evaluation have no such file."""
    if not path.is_file():
        return
    with _explain_damage(path, "the curves"):
        table = _read_table(path)
        count = [int(n) for n in table.groupby("task")["count"].first()]
        for setting, lines in table.groupby("setting", sort=False):
            for _, row in lines.groupby(["step", "learning"], sort=False):
                step, learning = int(row["step"].iloc[0]), int(row["learning"].iloc[0])
                if len(row) != learning + 1:
                    raise ValueError("an evaluation without all its tasks")
                record.add_to_curve(step, learning, str(setting), row["correct"].astype(float).tolist(), count)


def _read_table(path: Path) -> pd.DataFrame:
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError("the last line breaks off")
    return pd.read_csv(io.StringIO(text))


@contextlib.contextmanager
def _explain_damage(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError) as error:
        got = f"text that breaks off or is damaged ({type(error).__name__}: {error})"
        raise ConfigError(str(path), expected=expected, got=got, fix=_RUN_AGAIN) from error


def _draw_figures(run: Run) -> Iterator[tuple[str, tuple[Figure, str, str]]]:
    """File name, figure, title and caption of every picture that is not empty."""
    summary = run.summary
    on = "test images" if summary["evaluate_on"] == "test" else f"{summary['evaluate_on']} images"
    which = f"the {on} of each task" if run.measure == "accuracy" else f"all {on}, of the classes of each task"
    candidates = {
        "accuracy_matrix": (
            plots.draw_accuracy_matrix(run.record, run.measure),
            "Accuracy matrix",
            f"Accuracy in percent on {which} (columns) after learning each task (rows). Grey was not measured.",
        ),
        "over_tasks": (
            plots.draw_over_tasks(run.record, run.measure),
            "Accuracy and forgetting over tasks",
            "Average accuracy: mean over the tasks seen so far. Forgetting: the best earlier accuracy of a task minus "
            "its present one, mean over the earlier tasks; larger is worse, below 0 they have improved.",
        ),
        "curve": (
            plots.draw_curves(run.record, run.measure),
            "Accuracy while learning",
            f"Measured while learning, on a fixed sample of up to {_count_sample(run.record)} {on} per task. "
            "Thick: mean over the tasks begun. Thin: each task, the first dark, the last bright. Dashed: the end of a "
            "task. Anytime, minimum and worst-case accuracy and the stability gap are computed from this.",
        ),
        BOXES: (
            _draw_boxes(run),
            "Boxes",
            f"After the last task, on the first {on}: the objects (white and black), and in the colour of its class "
            f"each box with a probability above {plots.SURE}.",
        ),
        "confusion": (
            _draw_confusion(run),
            "Confusion matrix",
            "After the last task: for each class (row), the percentage of its images that were predicted as each class "
            "(column). Classes are in the order they were learned; lines separate tasks, or groups of them. "
            "Numbers (up to 20 classes) from 0.5 up; colours follow the square root.",
        ),
        "losses": (
            _draw_losses(run.folder / "metrics.jsonl"),
            "Loss",
            "Mean of each loss term over an epoch, at its last step. Dashed: the end of a task.",
        ),
    }
    for name, (figure, title, caption) in candidates.items():
        if figure is not None:
            yield name, (figure, name_measure(title, run.measure), name_measure(caption, run.measure))


def _count_sample(record: Record) -> int:
    """The largest number of images per task in the curves; 0 without curves."""
    return max((max(curve.count) for curve in record.curves.values()), default=0)


def _draw_confusion(run: Run) -> Figure | None:
    path = run.folder / "predictions.npz"
    if not path.is_file() or run.measure != "accuracy":
        return None
    return plots.draw_confusion(run.summary["tasks"], run.summary["class_names"], read_predictions(path))


def _draw_boxes(run: Run) -> Figure | None:
    path = run.folder / "predictions.npz"
    if not path.is_file() or run.measure == "accuracy":
        return None
    return plots.draw_boxes(run.summary["class_names"], read_predictions(path))


def _draw_losses(path: Path) -> Figure | None:
    if not path.is_file():  # the JSON-lines logger can be switched off
        return None
    with _explain_damage(path, "a JSON object per line"):
        return plots.draw_losses([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


def _list_warnings(summary: dict[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    warnings = []
    if summary["scale"] is not None:
        warnings.append(f"scale={summary['scale']}: a reduced run, not to be compared with published numbers")
    if summary["evaluate_on"] != "test":
        warnings.append(f"measured on {summary['evaluate_on']} images, not on the test set")
    if summary.get("shared_labels"):  # older records have neither
        warnings.append("all tasks share their labels: Class-IL is Domain-IL, only the label must be right")
    if summary.get("recurring_classes"):
        warnings.append(
            "tasks share classes: a task is measured on the test images of its own classes, of which training images "
            "come in other tasks too; transfer and learning accuracy are not defined"
        )
    if summary.get("test_batches", "mixed") != "mixed":
        warnings.append(
            "every test batch is of one task, and the method knows that: easier than Class-IL with mixed batches"
        )
    return warnings


def _explain_odd_numbers(run: Run) -> Iterator[str]:
    """A sentence about each number that a reader may take for an error."""
    tasks = run.summary["tasks"]
    classes = [len(task) for task in tasks]
    guessing = {
        "class_il": 100 / len({c for task in tasks for c in task}),
        "task_il": 100 / (sum(classes) / len(tasks)),
    }
    found: dict[str, list[str]] = {}  # what is said -> of which settings
    for setting in SETTINGS:
        average, forgetting, transfer = (
            run.value(setting, name) for name in ("average_accuracy", "forgetting", "backward_transfer")
        )
        if forgetting is not None and forgetting < -0.005:
            found.setdefault(
                "forgetting is below 0: on average, the earlier tasks are answered better after the last task than at "
                "any time before. This happens if later training also trains them, for example by rehearsal.",
                [],
            ).append(TITLES[setting])
        elif transfer is not None and transfer > 0.005:
            found.setdefault(
                "backward transfer is above 0: on average, the earlier tasks are answered better after the last task "
                "than right after they were learned. Forgetting compares with the best earlier accuracy instead.",
                [],
            ).append(TITLES[setting])
        guessed = run.measure == "accuracy" and max(classes) > 1  # guesses of boxes have no such average
        if guessed and average is not None and average <= guessing[setting]:
            said = f"average accuracy is not above {guessing[setting]:.1f} %, what guessing a class gives."
            found.setdefault(said, []).append(TITLES[setting])
    yield from (f"{' and '.join(titles)} {said}" for said, titles in found.items())
    both = [run.value(setting, "average_accuracy") for setting in SETTINGS]
    if both[0] is not None and both[1] is not None and both[1] < both[0] - 0.005:
        yield (
            "Task-IL accuracy is below Class-IL accuracy, although Task-IL chooses among fewer classes: the method "
            "answers in another way if it knows the task."
        )


def _list_facts(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    keys = ("experiment", "method", "backbone", "scenario", "buffer", "seed", "class_order_seed", "data_seed")
    return [(key.replace("_", " "), summary[key]) for key in (*keys, "fingerprint")]


def _format_card_label(setting: str, metric: str, unit: str) -> str:
    return f"{TITLES[setting]} {to_words(metric)}" + ("" if unit else " (points)")


def _format_card_value(run: Run, setting: str, metric: str, unit: str) -> str:
    text = format_number(run.value(setting, metric))
    return text if text == "-" else f"{text}{unit}"


def _list_metrics(run: Run) -> list[tuple[str, str, str]]:
    names = dict.fromkeys(name for setting in SETTINGS for name in run.summary[setting] or {})
    lines = [
        (to_words(n), format_number(run.value("class_il", n)), format_number(run.value("task_il", n))) for n in names
    ]
    area = run.summary.get("task_il_auroc")  # records from before it was measured have none
    if area and run.measure == "accuracy":
        lines.append(
            ("area under the ROC curve, one class of a task against its others", "-", format_number(area["mean"]))
        )
    for rule, values in run.summary.get("alternatives", {}).items():
        seen = f" (fitted on {values['fitted_on']}: no continual learner)" if "fitted_on" in values else ""
        label = f"average accuracy by {to_words(rule)}{seen}"
        lines.append((label, format_number(values["class_il"]), format_number(values["task_il"])))
    return lines


def _flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _format_or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _format_size(count: float) -> str:
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB" if count else "0"
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def _format_energy(joules: float) -> str:
    return f"{joules / 1000:,.1f} kJ ({joules / 3600:,.1f} Wh)"


COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "train_seconds": ("training time", _format_duration),
    "evaluate_seconds": ("evaluation time", _format_duration),
    "curve_seconds": ("evaluation time while learning", _format_duration),
    "samples_seen": ("images passed through training", "{:,}".format),
    "images_per_second": ("training speed", "{:,.1f} images/s".format),
    "peak_memory_bytes": ("peak memory", _format_size),
    "parameters": ("parameters", "{:,}".format),
    "parameters_trainable": ("of these trainable", "{:,}".format),
    "capacity": ("capacity, relative to the first task or the method's base network", "{:.2f} ×".format),
    "buffer_bytes": ("replay buffer", _format_size),
    "method_bytes": ("masks, copies and statistics of old tasks", _format_size),
    "energy_joules": ("energy", _format_energy),
}
"""Field of :class:`cl_bench.core.record.Cost` -> its label and how its number is formatted."""

_RUN_AGAIN = "Run the experiment again with overwrite=true, or leave this folder out."

_NEEDED = (
    *(
        "experiment",
        "name",
        "method",
        "backbone",
        "scenario",
        "buffer",
        "scale",
        "seed",
        "class_order_seed",
        "data_seed",
    ),
    *("fingerprint", "comparable", "published", "class_order", "tasks", "evaluate_on", *SETTINGS, "cost"),
)
"""Entries that every summary has."""

_ABSENT = {
    "confusion": "There is no confusion matrix: predictions.npz is missing or has no prediction.",
    "losses": "There are no loss curves: metrics.jsonl is missing or has no epoch.",
}
"""What the page says if a picture cannot be drawn."""
