"""Drawings as SVG text in the colours of the page: lines and heat maps."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_TASKS = 20
"""Above this number of tasks the cells of the accuracy matrix hold no numbers."""
PALETTE = 10
"""Up to this number of tasks each has its own colour, marker and label; above it colour tells the order."""
INK, MUTED, _GRID, GOOD, BAD = "#fe0001", "#fe0002", "#fe0003", "#fe0004", "#fe0005"
_ROLES = {1: "var(--ink)", 2: "var(--muted)", 3: "var(--grid)", 4: "var(--good)", 5: "var(--bad)"}
MARKERS = "os^DvPX<>p"
_FIGURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart. `low` and `high` give it a band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def task_colour(index: int, count: int) -> str:
    """Return a colour that stands for a task: one of ten, or its place between the first and the last of many."""
    return f"#fe00{0x10 + index:02x}" if count <= PALETTE else f"#fd00{round(100 * index / (count - 1)):02x}"


def _css_colour(sentinel: re.Match[str]) -> str:
    """Return the page's colour for a colour that stands for a role."""
    value = int(sentinel[2], 16)
    if sentinel[1] == "d":
        return f"color-mix(in oklab, var(--late) {value}%, var(--early))"
    return _ROLES.get(value) or f"var(--c{value - 0x10})"


@contextmanager
def blank(alt: str, width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of so many inches in the style of the page, whatever the user's own style is."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_FIGURE_STYLE | {"svg.hashsalt": alt})
        yield Figure(figsize=(width, height))


def some(names: Sequence[str], most: int = 8) -> tuple[list[int], list[str]]:
    """Places and names of all where they are few, else of every second, third, … one."""
    stride = -(-len(names) // most) if len(names) > PALETTE else 1
    return list(range(0, len(names), stride)), list(names[::stride])


def draw_lines(
    lines: list[Line],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    steps: list[str] | None = None,
    percent: bool = False,
    zero: bool = False,
) -> str:
    """Draw lines that are labelled at their ends, as SVG. With `steps`, x runs over the steps."""
    from matplotlib.ticker import MaxNLocator

    with blank(alt, 5.2, 3.3) as figure:
        longest = max(len(line.label) for line in lines)
        axes = figure.add_axes((0.125, 0.16, 0.83 - 0.019 * longest, 0.8))
        for line in lines:
            _add_line(axes, line)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.03, y=0.06)
        if percent:
            low = min(min(line.y) for line in lines)
            axes.set_ylim(max(-2.0, 10 * np.floor((low - 1) / 10)), 102)
        if zero:
            axes.axhline(0, color=MUTED, linewidth=1)
        if steps:
            places, names = some(steps)
            axes.set_xticks([place + 1 for place in places], names)
            axes.set_xlim(0.8, len(steps) + 0.2 if len(steps) > 1 else 1.2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axes, lines)
        return to_svg(figure, alt)


def _add_line(axes: Axes, line: Line) -> None:
    """Draw one line, and its band if it has one."""
    few = len(line.x) <= MANY_TASKS
    if line.low is not None and line.high is not None:
        if len(line.x) > 1:
            axes.fill_between(line.x, line.low, line.high, color=line.colour, alpha=0.13, linewidth=0)
        else:
            axes.vlines(line.x, line.low, line.high, color=line.colour, alpha=0.35, linewidth=3)
    axes.plot(
        line.x,
        line.y,
        color=line.colour,
        linewidth=1.8 if line.marker else 0.9,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        marker=line.marker if few else "",
        markersize=5 if len(line.x) > 1 else 7,
        markeredgewidth=0,
    )


def _label_ends(axes: Axes, lines: list[Line]) -> None:
    """Write each line's label beside its end, pushed apart where they would lie on each other."""
    labelled = lines if len(lines) <= PALETTE else [lines[0], lines[-1]]
    bottom, top = axes.get_ylim()
    ends = sorted(((line.y[-1] - bottom) / (top - bottom), line.label, line.colour) for line in labelled)
    gap = 0.075
    places: list[float] = []
    for end, _, _ in ends:
        places.append(max(end, places[-1] + gap) if places else end)
    limit = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    for place, (_, label, colour) in zip(places, ends, strict=True):
        axes.text(1.015, place, label, color=colour, va="center", fontsize=10, transform=axes.transAxes)


def to_svg(figure: Figure, alt: str) -> str:
    """Return the figure as an SVG element that scales, follows the page's colours and says what it shows."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    body = buffer.getvalue()
    width, height = 72 * figure.get_size_inches()
    body = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # names such as axes_1, the same in every figure
    body = re.sub(r"#f([ed])00([0-9a-f]{2})", _css_colour, body)
    viewbox = f"0 0 {width:g} {height:g}"
    return f'<svg class="plot" viewBox="{viewbox}" role="img" aria-label="{escape(alt)}">{body}</svg>'


@dataclass(frozen=True, kw_only=True)
class Heat:
    """A map of numbers: one cell for each row and column, NaN where there is nothing."""

    values: np.ndarray
    """(rows, columns)"""
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str
    column_label: str
    low: float
    """What has no colour; in a signed map 0 has none and this is as deep as `high`."""
    high: float
    """What has the whole colour."""

    @property
    def depth(self) -> np.ndarray:
        """(rows, columns): place on the scale of colours, 0 … 1, or −1 … 1 where the map is signed."""
        if self.low < 0:
            return np.clip(self.values / self.high, -1, 1)
        return np.clip((self.values - self.low) / (self.high - self.low), 0, 1)


_MOST_CELLS = 250
"""Cells of a map in a row or a column. More would be finer than the figure is on a screen."""
HEAT, COLD = (46, 118, 214), (208, 92, 16)
"""Colours of a map, red green blue, that stand out from a light page and from a dark one: more, and less than 0."""


def draw_heat(heat: Heat, *, alt: str) -> str:
    """Draw a map as SVG. Its cells are the pixels of one image, so that any number of them stays small.

    A pixel is the mean of several cells where there are too many of them.
    """
    rows, columns = heat.values.shape
    with blank(alt, 5.2, min(5.0, 1.1 + max(0.7, 0.19 * rows))) as figure:
        inches = figure.get_size_inches()[1]
        longest = max(len(name) for name in heat.rows)
        left = 0.085 + 0.0165 * longest
        axes = figure.add_axes((left, 0.56 / inches, 0.985 - left, 1 - 0.66 / inches))
        size = (-(-rows // _MOST_CELLS), -(-columns // _MOST_CELLS))
        depth = np.nan_to_num(_coarse(heat.depth, size))
        pixels = np.zeros((*depth.shape, 4), np.uint8)
        pixels[..., :3] = np.where(depth[..., None] < 0, COLD, HEAT)
        pixels[..., 3] = np.round(255 * np.abs(depth))
        bottom, right = (cells * step - 0.5 for cells, step in zip(depth.shape, size, strict=True))
        axes.imshow(pixels, aspect="auto", interpolation="none", extent=(-0.5, right, bottom, -0.5))
        axes.grid(False)
        for ticks, names, most in (
            (axes.set_xticks, heat.columns, 8),
            (axes.set_yticks, heat.rows, 16),
        ):
            ticks(*some(names, most))
        axes.set_xlabel(heat.column_label)
        axes.set_ylabel(heat.row_label)
        return to_svg(figure, alt)


def _coarse(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the mean of every so many rows and columns, of what is known there. NaN where nothing is."""
    rows, columns = (np.arange(0, cells, step) for cells, step in zip(values.shape, size, strict=True))

    def summed(cells: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(cells, rows, axis=0), columns, axis=1)

    known = ~np.isnan(values)
    count = summed(known.astype(np.int64))
    total = summed(np.where(known, values, 0.0))
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
