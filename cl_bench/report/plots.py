"""Pictures of a run and of a comparison, for a page 10 inches (1000 CSS pixels) wide.

Only matplotlib's objects are used, never ``pyplot``: no global state, no display. Text from a configuration is set with
``parse_math=False``, so that a ``$`` in a name stays a ``$``. People read these pictures: tasks are counted from 1.

T tasks, K classes, S seeds.
"""

import io
import math
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from cl_bench.core.record import SETTINGS, TITLES, Matrix, Record, name_measure
from cl_bench.metrics.accuracy import average_accuracy
from cl_bench.metrics.forgetting import forgetting

SURE = 0.5
"""The confidence from which a box is drawn."""

COLOURS = {"class_il": "#1f5fa8", "task_il": "#c8641b"}
"""Of the two settings."""

_NEARLY_BLACK, _NEARLY_WHITE = "#010101", "#fefefe"  # on photographs: a page changes black and white itself
_DPI = 150  # sharper than the page asks for: readable when zoomed in or printed
_WIDTH = 10.0  # inches
_HALF = 5.3  # inches, width of a picture with one panel
_MOST_MARKERS = 200  # epochs; more of them are drawn as a line only
_NUMBERS_UP_TO = 20  # tasks or classes; beyond, numbers in cells and one label a line no longer fit
_LINE_STYLES = ("-", "--", ":", "-.")


class Key(NamedTuple):
    """A line of a legend: its text, and its colour (``C0`` to ``C9``) and style as in a figure."""

    label: str
    colour: str
    style: str


def render_png(figure: Figure) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    file = io.BytesIO()
    figure.set_dpi(_DPI)
    _shorten_layout(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # savefig() would draw it twice
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])  # all are opaque
    # most pixels are like their neighbours: looking for longer patterns takes twice the time for a tenth of the size
    Image.fromarray(pixels).save(file, "png", dpi=(_DPI, _DPI), compress_type=zlib.Z_RLE)
    return file.getvalue()


def _shorten_layout(figure: Figure) -> None:
    """Tell matplotlib what has no influence on the layout: to measure it takes a third of the time of a picture."""
    for axes in figure.axes:
        inside = [axes.get_legend(), *axes.spines.values()]
        for artist in inside:
            if artist is not None:
                artist.set_in_layout(False)
        for axis in (axes.xaxis, axes.yaxis):
            if not axis.get_label_text():
                axis.set_label_coords(0, 0)  # else all numbers are measured to find the place of an empty label


def take_first_tasks(matrix: Matrix, count: int) -> Matrix:
    """The matrix as it was when ``count`` tasks had been learned."""
    rows = [*range(count), -1]  # the last row is that of the untrained network
    return Matrix(matrix.correct[rows, :count], matrix.count[:count])


def compute_over_tasks(metric: Callable[[Matrix], float], matrix: Matrix) -> np.ndarray:
    """(T,) ``metric`` after each task."""
    return np.array([metric(take_first_tasks(matrix, count)) for count in range(1, matrix.num_tasks + 1)])


def draw_accuracy_matrix(record: Record, measure: str = "accuracy") -> Figure | None:
    """Both accuracy matrices as heat maps, with numbers up to 20 tasks; None if nothing was measured.

    Args:
        measure: the word for accuracy in this and the other pictures.
    """
    settings = _list_measured(record)
    if not settings:
        return None
    num_tasks = record.class_il.num_tasks
    shown = _choose_tasks(num_tasks)
    # the row of the untrained network is in all panels or in none, so that their rows have the same height
    untrained = ["untrained"] if any(not np.isnan(record.get_matrix(s).baseline).all() for s in settings) else []
    figure, panels = _make_panels(len(settings), height=min(4.8, 1.6 + 0.34 * num_tasks))
    for axes, setting in zip(panels, settings):
        matrix = record.get_matrix(setting)
        values = np.vstack([matrix.baseline, matrix.accuracy]) if untrained else matrix.accuracy
        image = _draw_heat_map(
            axes, values, "YlGnBu", Normalize(0, 100), decimals=1 if num_tasks <= 10 else 0, zeros=True
        )
        labels = [str(task + 1) for task in shown]
        axes.set_xticks(shown, labels)
        ticks = [*range(len(untrained)), *(len(untrained) + task for task in shown)]
        axes.set_yticks(ticks, [*untrained, *labels])
        _set_title(axes, TITLES[setting])
        axes.set(xlabel=name_measure("accuracy on task", measure), ylabel="after task")
    _add_colour_bar(figure, image, panels, name_measure("accuracy [%]", measure))
    return figure


def draw_over_tasks(record: Record, measure: str = "accuracy") -> Figure | None:
    """Average accuracy on the tasks seen, and forgetting, after each task; None with one task or no measurement."""
    settings = _list_measured(record)
    num_tasks = record.class_il.num_tasks
    if num_tasks == 1 or not settings:
        return None
    figure, (accuracies, forgettings) = _make_panels(2, height=3.4)
    for setting in settings:
        style: dict[str, Any] = {"ms": 3.5, "color": COLOURS[setting], "label": TITLES[setting]}
        for axes, metric in ((accuracies, average_accuracy), (forgettings, forgetting)):
            axes.plot(range(1, num_tasks + 1), compute_over_tasks(metric, record.get_matrix(setting)), "o-", **style)
    _set_title(accuracies, name_measure("average accuracy on the tasks seen [%]", measure))
    accuracies.set_ylim(0, 102)
    accuracies.legend(frameon=False)
    _set_title(forgettings, "forgetting [percentage points]")
    forgettings.axhline(0, color="0.4", lw=0.8)
    for axes in (accuracies, forgettings):
        open_frame(axes)
        _set_task_axis(axes, num_tasks)
    return figure


def draw_curves(record: Record, measure: str = "accuracy") -> Figure | None:
    """The accuracy on a sample of each task over optimizer steps, and the mean of the tasks begun; None if unknown."""
    curves = {s: curve for s, curve in record.curves.items() if not np.isnan(curve.accuracy).all()}
    if not curves:
        return None
    figure, panels = _make_panels(len(curves), height=3.6)
    for axes, (setting, curve) in zip(panels, curves.items()):
        accuracy, step, learning = curve.accuracy, np.array(curve.step), np.array(curve.learning)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.3, 0.9, curve.num_tasks))  # seen on white and on black
        for values, colour in zip(accuracy.T, colours):
            axes.plot(step, values, lw=0.7, alpha=0.6, color=colour)
        means = [row[: task + 1].mean() for row, task in zip(accuracy, learning)]
        axes.plot(step, means, lw=2, color=COLOURS[setting])
        for task in range(curve.num_tasks - 1):
            if (learning == task).any():
                axes.axvline(step[learning == task][-1], color="0.55", lw=0.6, ls=(0, (4, 3)))
        open_frame(axes)
        axes.grid(visible=False, axis="x")
        _set_title(axes, name_measure(f"{TITLES[setting]}: accuracy on the sample [%]", measure))
        axes.set(ylim=(0, 102), xlabel="optimizer steps")
        axes.set_xlim(0, max(1, step[-1]) * 1.005)
    return figure


def draw_confusion(
    tasks: Sequence[Sequence[int]], class_names: Sequence[str], predictions: Mapping[str, np.ndarray]
) -> Figure | None:
    """Shares of each class's images that were predicted as each class, classes in the order of the tasks.

    Args:
        tasks: original class ids of each task.
        class_names: names by original class id.
        predictions: the arrays of ``predictions.npz``.

    Returns:
        One panel per setting with predictions, class names and numbers up to 20 classes; None without any prediction.
    """
    settings = [setting for setting in SETTINGS if (predictions[setting] >= 0).any()]
    if not settings:
        return None
    order = list(dict.fromkeys(c for task in tasks for c in task))  # tasks share classes in a domain scenario
    figure, panels = _make_panels(len(settings), height=5.2 if len(order) <= _NUMBERS_UP_TO else 4.9)
    for axes, setting in zip(panels, settings):
        shares = compute_confusion(order, predictions["label"], predictions[setting])
        image = _draw_heat_map(axes, shares, "Blues", PowerNorm(0.5, 0, 100), decimals=0, zeros=False)
        _label_classes(axes, order, tasks, class_names, unanswered=shares.shape[1] > len(order))
        _set_title(axes, TITLES[setting])
        axes.set(xlabel="answer", ylabel="class of the image")
    _add_colour_bar(figure, image, panels, "share of the class's images [%]")
    return figure


def draw_boxes(class_names: Sequence[str], predictions: Mapping[str, np.ndarray]) -> Figure | None:
    """The first test images with their objects (thin, white on black) and the sure boxes found, in colours of classes.

    Args:
        class_names: names by original class id.
        predictions: the arrays of a detector's ``predictions.npz``.
    """
    images = predictions["examples"]
    if not len(images):
        return None
    columns = min(4, len(images))
    figure = Figure((_WIDTH, 2.7 * math.ceil(len(images) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(images) / columns), columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for number, (axes, image) in enumerate(zip(panels, images)):
        height, width = image.shape[1:]
        axes.imshow(np.broadcast_to(image, (3, height, width)).transpose(1, 2, 0), interpolation="nearest")
        for c, *box in predictions["label"][number]:
            if c >= 0:
                _draw_box(axes, box, width, height, _NEARLY_BLACK, 3.0)
                _draw_box(axes, box, width, height, _NEARLY_WHITE, 1.0)
        classes, confidences, boxes = (predictions[key][number] for key in ("class_il", "confidence", "boxes"))
        for query in np.argsort(confidences):  # the surest above the others
            c, confidence = classes[query], confidences[query]
            if c >= 0 and confidence > SURE:
                left, top = _draw_box(axes, boxes[query], width, height, f"C{c % 10}", 2.0)
                text = f"{_shorten(class_names[c], 12)} {confidence:.2f}"
                at = {"x": left, "ha": "left"} if left < 0.6 * width else {"x": width - 1, "ha": "right"}
                background = {"color": f"C{c % 10}", "pad": 1.0, "lw": 0}
                style = {"size": 7, "color": _NEARLY_WHITE, "bbox": background, "parse_math": False, "clip_on": True}
                axes.text(y=max(top, 0.06 * height), s=text, **at, **style)
    return figure


def _draw_box(
    axes: Axes, box: Sequence[float], width: int, height: int, colour: str, line: float
) -> tuple[float, float]:
    """Draw a box and return its left upper corner, in pixels."""
    x, y, across, down = box
    corner = ((x - across / 2) * width - 0.5, (y - down / 2) * height - 0.5)
    axes.add_patch(Rectangle(corner, across * width, down * height, fill=False, edgecolor=colour, lw=line))
    return corner


def compute_confusion(order: Sequence[int], label: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """(K, K) shares in percent, one row per class in ``order``; (K, K + 1) if some images have no prediction (-1)."""
    column = np.full(max(order) + 2, len(order))  # -1 falls on the last entry, the column of no answer
    column[list(order)] = range(len(order))
    counts = np.zeros((len(order), len(order) + 1))
    np.add.at(counts, (column[label], column[answer]), 1)
    images = counts.sum(axis=1, keepdims=True)
    shares = 100.0 * counts / np.where(images > 0, images, math.nan)
    return shares if counts[:, -1].any() else shares[:, :-1]


def draw_losses(events: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Epoch means of each loss term over optimizer steps, one panel per term; None if no epoch was trained.

    Args:
        events: the lines of ``metrics.jsonl``.
    """
    epochs = [event for event in events if event["event"] == "epoch"]
    ends = [event["step"] for event in events if event["event"] == "task"]
    terms = list(dict.fromkeys(term for event in epochs for term in event["losses"]))
    if not terms:
        return None
    columns = min(2, len(terms))
    lines = math.ceil(len(terms) / columns)
    figure = Figure((_WIDTH if columns > 1 else _HALF, 0.4 + 2.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(terms) :]:
        axes.remove()
    style = ".-" if len(epochs) <= _MOST_MARKERS else "-"
    last = max(event["step"] for event in epochs)
    for axes, term in zip(panels, terms):
        for steps, values in _split_phases(epochs, term):
            axes.plot(steps, values, style if len(steps) > 1 else ".", ms=3, lw=1.2, color="#1f5fa8")
        for end in ends:
            axes.axvline(end, color="0.55", lw=0.8, ls=(0, (4, 3)))
        open_frame(axes)
        axes.grid(visible=False, axis="x")  # more vertical lines beside the ends of tasks would confuse
        _set_title(axes, term, loc="left", parse_math=False, size=10, pad=14)
        axes.set(xlabel="optimizer steps", xlim=(0, last * 1.005))
        axes.yaxis.set_major_formatter("{x:.3g}")  # no factor above the axis, where the tasks are
        _label_tasks_above(axes, ends)
    return figure


def draw_accuracy_by_row(curves: Mapping[str, Mapping[str, np.ndarray]], measure: str = "accuracy") -> Figure | None:
    """Average accuracy on the tasks seen: one line per row of the comparison, with a band of one standard deviation.

    A row that learned everything in one task is drawn as a horizontal line.

    Args:
        curves: setting -> row -> (S, T) accuracies in percent; without rows for which a setting was not measured.

    Returns:
        One panel per setting; None if there is none.
    """
    settings = [setting for setting in SETTINGS if curves[setting]]
    labels = _list_labels(curves)
    if not settings:
        return None
    wrapped = [textwrap.fill(label, 60) for label in labels]
    columns = max(1, 120 // (max(len(line) for label in wrapped for line in label.split("\n")) + 8))
    legend_lines = math.ceil(len(labels) / columns) * max(label.count("\n") + 1 for label in wrapped)
    figure, panels = _make_panels(len(settings), height=(3.4 if len(labels) <= 8 else 4.4) + 0.2 * legend_lines)
    for axes, setting in zip(panels, settings):
        for label, values in curves[setting].items():
            _draw_band(axes, values, **_choose_line_style(labels.index(label)))
        open_frame(axes)
        highest = max(np.nanmax(values) for values in curves[setting].values())
        _set_title(axes, name_measure(f"{TITLES[setting]}: average accuracy on the tasks seen [%]", measure))
        axes.set_ylim(0, min(102, 1.1 * highest + 1))
        _set_task_axis(axes, max(values.shape[1] for values in curves[setting].values()))
    handles = [Line2D([], [], **_choose_line_style(i)) for i in range(len(labels))]
    # the texts are set afterwards: matplotlib leaves labels that begin with "_" out of a legend
    legend = figure.legend(
        handles, [str(i) for i in range(len(labels))], loc="outside lower center", ncols=columns, frameon=False
    )
    for text, label in zip(legend.get_texts(), wrapped):
        text.set_parse_math(False)
        text.set_text(label)
    return figure


def make_legend(curves: Mapping[str, Mapping[str, np.ndarray]]) -> list[Key]:
    """The legend of :func:`draw_accuracy_by_row` for a page."""
    styles = [(label, _choose_line_style(i)) for i, label in enumerate(_list_labels(curves))]
    return [Key(label, style["color"], style["ls"]) for label, style in styles]


def draw_dots(
    values: Mapping[str, Sequence[float]], intervals: Mapping[str, float | None], title: str
) -> Figure | None:
    """A line per row of the comparison: one dot per seed, a bar at the mean, a line over the 95 % confidence interval.

    Args:
        values: row -> values of its seeds, best row first; rows without a value are left out.
        intervals: row -> half width of its interval, or None.
        title: what is shown, with its unit.
    """
    labels = [label for label in values if len(values[label])]
    if not labels:
        return None
    wrapped = [textwrap.fill(label, 44) for label in labels]
    lines = sum(label.count("\n") + 1 for label in wrapped)
    figure = Figure((_WIDTH, 1.1 + 0.14 * lines + 0.2 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for line, label in enumerate(labels):
        mean, half = float(np.mean(values[label])), intervals[label]
        if half is not None:
            axes.plot([mean - half, mean + half], [line, line], color="#1f5fa8", lw=2, alpha=0.45)
        axes.plot([mean], [line], "|", color="#1f5fa8", ms=13, mew=2.2)
        axes.plot(values[label], [line] * len(values[label]), "o", color="#c8641b", ms=5, alpha=0.75, mew=0)
    axes.set_yticks(range(len(labels)), wrapped, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    open_frame(axes)
    axes.set_xlabel(title)
    return figure


def choose_ticks(low: float, high: float) -> list[float]:
    """At most six round numbers from ``low`` to ``high`` for an axis."""
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def _list_labels(curves: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    return list(dict.fromkeys(label for setting in SETTINGS for label in curves[setting]))


def _list_measured(record: Record) -> list[str]:
    return [setting for setting in SETTINGS if not np.isnan(record.get_matrix(setting).correct[:-1]).all()]


def _make_panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure((_WIDTH if count > 1 else _HALF, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _set_title(axes: Axes, title: str, **style: Any) -> None:
    """A title right above the axes. Without ``y`` matplotlib would look for free space at every drawing."""
    axes.set_title(title, y=1.0, **style)


def open_frame(axes: Axes) -> None:
    """Axes without a frame above and on the right, with a light grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)


def _set_task_axis(axes: Axes, num_tasks: int) -> None:
    axes.set(xlabel="after task", xlim=(0.7, num_tasks + 0.3))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_heat_map(
    axes: Axes, values: np.ndarray, colour_map: str, norm: Normalize, *, decimals: int, zeros: bool
) -> AxesImage:
    """An image with numbers in its cells up to 20 tasks or classes; without ``zeros``, no number if it would read 0."""
    colours = matplotlib.colormaps[colour_map].with_extremes(bad=(0, 0, 0, 0))
    axes.set_facecolor("0.9")  # seen where nothing was measured
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0, labelsize=10 if max(values.shape) <= 11 else 7.5)
    if min(values.shape) <= _NUMBERS_UP_TO:  # the other side may have one more row (untrained) or column (no answer)
        style: dict[str, Any] = {"ha": "center", "va": "center", "size": 8 if max(values.shape) <= 11 else 6}
        dark = colours(norm(values))[..., :3] @ (0.3, 0.59, 0.11) < 0.5
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.{decimals}f}"
            if text != "nan" and (zeros or float(text)):
                number = axes.text(column, row, text, color="#f7f7f7" if dark[row, column] else "#111111", **style)
                number.set_in_layout(False)  # it is inside the image, and measuring it takes time
    return image


def _add_colour_bar(figure: Figure, image: AxesImage, panels: list[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=panels, label=label, fraction=0.05, pad=0.02)
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # an image in an SVG, too


def _choose_stride(count: int) -> int:
    """The distance between labelled ticks: 1 up to 20 ticks; for more, about ten labels."""
    return 1 if count <= _NUMBERS_UP_TO else math.ceil(count / 10)


def _choose_tasks(count: int) -> range:
    """The tasks, from 0, that are labelled; of more than 20 tasks for example the fifth, tenth and so on."""
    stride = _choose_stride(count)
    return range(stride - 1, count, stride)


def _label_classes(
    axes: Axes,
    order: Sequence[int],
    tasks: Sequence[Sequence[int]],
    class_names: Sequence[str],
    unanswered: bool,
) -> None:
    """Class names if they fit, else task numbers, and lines between (at most 20) tasks that share no class."""
    ends = np.cumsum([len(task) for task in tasks])
    disjoint = ends[-1] == len(order)
    if disjoint:
        stride = _choose_stride(len(tasks))
        for end in ends[stride - 1 : -1 : stride]:
            axes.axhline(end - 0.5, color="0.45", lw=0.5)
            axes.axvline(end - 0.5, color="0.45", lw=0.5)
    if len(order) <= _NUMBERS_UP_TO:
        ticks, labels = list(range(len(order))), [_shorten(class_names[c]) for c in order]
    elif disjoint:
        shown = _choose_tasks(len(tasks))
        ticks = [ends[task] - (len(tasks[task]) + 1) / 2 for task in shown]
        labels = [f"task {task + 1}" for task in shown]
    else:
        ticks = list(range(0, len(order), _choose_stride(len(order))))
        labels = [str(order[tick]) for tick in ticks]
    axes.set_yticks(ticks, labels, parse_math=False)
    if unanswered:
        ticks, labels = [*ticks, len(order)], [*labels, "no answer"]
    axes.set_xticks(ticks, labels, rotation=90, parse_math=False)


def _shorten(name: str, most: int = 20) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _split_phases(epochs: Sequence[Mapping[str, Any]], term: str) -> list[tuple[list[int], list[float]]]:
    """Steps and means of one loss term, one pair per phase: a line across two phases would mean nothing."""
    stretches: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    for event in epochs:
        if term in event["losses"]:
            steps, values = stretches.setdefault((event["task"], event["phase"]), ([], []))
            value = event["losses"][term]
            steps.append(event["step"])
            values.append(math.nan if value is None else value)
    return list(stretches.values())


def _label_tasks_above(axes: Axes, ends: Sequence[int]) -> None:
    centres = [(start + end) / 2 for start, end in zip([0, *ends], ends)]
    shown = _choose_tasks(len(ends))
    for task in shown:
        name = f"task {task + 1}" if task == shown.start else str(task + 1)
        axes.text(centres[task], 1.01, name, size=8, ha="center", transform=axes.get_xaxis_transform())


def _choose_line_style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "ls": _LINE_STYLES[number // 10 % len(_LINE_STYLES)], "marker": "o", "ms": 3}


def _draw_band(axes: Axes, values: np.ndarray, **style: Any) -> None:
    mean = values.mean(axis=0)
    if len(mean) == 1:  # all classes learned at once: a horizontal line, because a dot would be hard to see
        axes.axhline(mean[0], color=style["color"], ls=style["ls"])
        return
    tasks = range(1, len(mean) + 1)
    axes.plot(tasks, mean, **style)
    if len(values) > 1:
        std = values.std(axis=0, ddof=1)
        axes.fill_between(tasks, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
