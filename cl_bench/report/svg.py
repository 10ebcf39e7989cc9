"""Figures as SVG inside a page: one piece per panel, so that a narrow page stacks them, in colours that CSS can change.

What a browser cannot show on a dark page (black lines, white areas) is replaced by the page's own variables.
"""

import io
import itertools
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PIXELS_PER_INCH = 100
"""CSS pixels of a page that show one inch of a picture."""

COLOURS = {
    "#ffffff": "none", "#000000": "var(--ink)", "#666666": "var(--soft)", "#737373": "var(--soft)",
    "#8c8c8c": "var(--soft)", "#e6e6e6": "var(--line)", "#111111": "var(--on-light)", "#f7f7f7": "var(--on-dark)",
    "#1f5fa8": "var(--blue)", "#c8641b": "var(--orange)", "#1f77b4": "var(--c0)", "#ff7f0e": "var(--c1)",
    "#2ca02c": "var(--c2)", "#d62728": "var(--c3)", "#9467bd": "var(--c4)", "#8c564b": "var(--c5)",
    "#e377c2": "var(--c6)", "#7f7f7f": "var(--c7)", "#bcbd22": "var(--c8)", "#17becf": "var(--c9)",
}  # fmt: skip
"""Colours of the pictures -> colours of the page (``base.html.j2``). All others stay as they are."""

_POINTS_PER_INCH = 72.0

Span = tuple[float, float]
"""Begin and end."""


@dataclass(frozen=True)
class Panel:
    """A part of a figure on a page.

    Attributes:
        width: in CSS pixels, if there is room.
        view_box: what part of the figure it shows.
        content: the elements of the figure; only the first of its panels has them, the others refer to them.
        reference: the id of these elements.
    """

    width: int
    view_box: str
    content: str
    reference: str


def render_panels(figure: Figure, name: str, photos: bool = False) -> list[Panel]:
    """The panels of a figure that has been drawn before, row by row.

    The legend of the whole figure is left out: a page writes it as text.

    Args:
        figure: its layout stays as it was drawn.
        name: begins every id, so that several figures fit into one page.
        photos: whether it shows photographs, which look the same on a dark page, not heat maps.
    """
    figure.set_layout_engine("none")
    cells = _cut(figure)  # measured with the canvas that has laid the figure out
    for legend in figure.legends:
        legend.set_visible(False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    content = _clean(file.getvalue(), name)
    if not photos:
        content = content.replace("<image ", '<image style="filter: var(--heat)" ')
    width, height = figure.get_size_inches()
    panels: list[Panel] = []
    for left, top, right, bottom in cells:
        box = (left * width, top * height, (right - left) * width, (bottom - top) * height)
        view_box = " ".join(f"{_POINTS_PER_INCH * inches:.1f}" for inches in box)
        panels.append(Panel(round(box[2] * PIXELS_PER_INCH), view_box, "" if panels else content, f"{name}-figure"))
    return panels


def _clean(text: str, name: str) -> str:
    """The elements inside ``<svg>``: unique ids, the page's colours and fonts, nothing that names another address."""
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"(<[^>]*? )id=\"", rf'\1id="{name}-', body)
    body = re.sub(r"(?:xlink:)?href=\"#", f'href="#{name}-', body).replace("xlink:href", "href")
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})", lambda found: found[1] + COLOURS.get(found[2], found[2]), body)
    body = re.sub(r">\s+<", "><", re.sub(r"font-family: [^;\"]*; ", "", body))
    return f'<g id="{name}-figure">{body}</g>'


def _cut(figure: Figure) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of each panel as shares of the figure, y downwards; cut between the panels."""
    spans: tuple[dict[int, list[Span]], dict[int, list[Span]]] = ({}, {})
    cells = []
    width, height = figure.bbox.size
    for axes in figure.axes:
        spec = axes.get_subplotspec()
        if spec is None or hasattr(axes, "_colorbar"):
            continue
        box = axes.get_tightbbox()
        assert box is not None
        cell = (spec.colspan.start, spec.rowspan.start)
        spans[0].setdefault(cell[0], []).append((box.x0 / width, box.x1 / width))
        spans[1].setdefault(cell[1], []).append((1 - box.y1 / height, 1 - box.y0 / height))
        cells.append(cell)
    columns, rows = map(_find_edges, spans)
    if figure.legends:  # they stand below
        rows[-1] = max(high for _, high in spans[1][max(spans[1])])
    return [(columns[x], rows[y], columns[x + 1], rows[y + 1]) for x, y in cells]


def _find_edges(spans: dict[int, list[Span]]) -> list[float]:
    """The edges between columns or rows, in the middle of the free space."""
    ends = [(min(low for low, _ in spans[i]), max(high for _, high in spans[i])) for i in sorted(spans)]
    return [0.0, *((before[1] + after[0]) / 2 for before, after in itertools.pairwise(ends)), 1.0]
