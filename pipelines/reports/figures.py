"""Figures as SVG, in the colours of the page around them.

matplotlib knows nothing of the reader's light or dark page. So figures are drawn in colours that stand for roles, and
the SVG gets the page's CSS variables in their place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.reports.history import History
from sdlora import metrics as measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_TASKS = 20
"""Above this number of tasks the cells of the accuracy matrix hold no numbers."""

PALETTE = 10
"""Up to this number of tasks each has its own colour, marker and label; above it colour tells the order."""

INK, MUTED, GRID = "#fe0001", "#fe0002", "#fe0003"
MARKERS = "os^DvPX<>p"
FIGURE_STYLE: dict[Any, Any] = {
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
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; `low` and `high` give it a band."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    marker: str
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def task_colour(index: int, count: int) -> str:
    """A colour that stands for a task: one of ten, or its place between the first and the last of many."""
    return f"#fe00{0x10 + index:02x}" if count <= PALETTE else f"#fd00{round(100 * index / (count - 1)):02x}"


def css_colour(sentinel: re.Match[str]) -> str:
    """The page's colour for a colour that stands for a role."""
    value = int(sentinel[2], 16)
    if sentinel[1] == "d":
        return f"color-mix(in oklab, var(--late) {value}%, var(--early))"
    return {1: "var(--ink)", 2: "var(--muted)", 3: "var(--grid)"}.get(value) or f"var(--c{value - 0x10})"


def task_lines(
    history: History,
    y: Mapping[str, Sequence[float]],
    *,
    low: Mapping[str, Sequence[float]] | None = None,
    high: Mapping[str, Sequence[float]] | None = None,
) -> list[Line]:
    """One line per task, each from its own step to the last."""
    count = len(history.tasks)
    return [
        Line(
            label=task,
            x=range(count - len(y[task]) + 1, count + 1),
            y=y[task],
            colour=task_colour(i, count),
            marker=MARKERS[i] if count <= PALETTE else "",
            low=low[task] if low else None,
            high=high[task] if high else None,
        )
        for i, task in enumerate(history.tasks)
        if task in y
    ]


def draw_lines(
    lines: list[Line],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    steps: list[str] | None = None,
    percent: bool = False,
) -> str:
    """Draw lines that are labelled at their ends, as SVG; with `steps`, x runs over the steps."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(FIGURE_STYLE | {"svg.hashsalt": alt})
        figure = Figure(figsize=(5.2, 3.3))
        longest = max(len(line.label) for line in lines)
        axes = figure.add_axes((0.125, 0.16, 0.83 - 0.019 * longest, 0.8))
        for line in lines:
            add_line(axes, line)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.03, y=0.06)
        if percent:
            low = min(min(line.y) for line in lines)
            axes.set_ylim(max(-2.0, 10 * np.floor((low - 1) / 10)), 102)
        if steps:
            stride = -(-len(steps) // 8) if len(steps) > PALETTE else 1
            axes.set_xticks(range(1, len(steps) + 1, stride), steps[::stride])
            axes.set_xlim(0.8, len(steps) + 0.2 if len(steps) > 1 else 1.2)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(axes, lines)
        return to_svg(figure, alt)


def add_line(axes: Axes, line: Line) -> None:
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


def label_ends(axes: Axes, lines: list[Line]) -> None:
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
    """The figure as an SVG element that scales, follows the page's colours and says what it shows."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    body = buffer.getvalue()
    width, height = 72 * figure.get_size_inches()
    body = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # names such as axes_1, the same in every figure
    body = re.sub(r"#f([ed])00([0-9a-f]{2})", css_colour, body)
    viewbox = f"0 0 {width:g} {height:g}"
    return f'<svg class="plot" viewBox="{viewbox}" role="img" aria-label="{escape(alt)}">{body}</svg>'


def accuracy_figures(history: History) -> dict[str, str]:
    """Accuracy over steps: of all classes so far, and of each task."""
    steps, count = history.tasks, len(history.tasks)
    percent = 100 * history.accuracy
    over = {
        "now": (100 * measure.accuracy_curve(history.accuracy, history.samples)).tolist(),
        "average": (100 * measure.average_accuracy_curve(history.accuracy, history.samples)).tolist(),
    }
    x = range(1, count + 1)
    together = [
        Line(label="now", x=x, y=over["now"], colour=task_colour(0, 1), marker="o"),
        Line(label="average", x=x, y=over["average"], colour=task_colour(1, 2), marker="s", dashed=True),
    ]
    draw = partial(draw_lines, steps=steps, percent=True, x_label="after step", y_label="accuracy, %")
    return {
        "together": draw(
            together,
            alt=f"Accuracy on all classes so far after each step: {percents(over['now'])}",
        ),
        "by_task": draw(
            task_lines(history, {task: percent[i:, i].tolist() for i, task in enumerate(steps)}),
            alt=f"Accuracy of each task after each step; after the last: {percents(percent[-1])}",
        ),
    }


def magnitude_figure(history: History) -> str | None:
    """Magnitudes over steps, or nothing where no step holds the magnitude of an earlier task."""
    if not any(len(values) > 1 for values in history.magnitudes) and len(history.tasks) > 1:
        return None
    if not history.magnitudes[-1]:
        return None
    kept = [
        task
        for i, task in enumerate(history.tasks)
        if all(task in values for values in history.magnitudes[i:])  # an absorbed direction has no line
    ]
    of = {task: [values[task] for values in history.magnitudes[history.tasks.index(task) :]] for task in kept}
    lines = task_lines(
        history,
        {task: [values.mean() for values in steps] for task, steps in of.items()},
        low={task: [values.min() for values in steps] for task, steps in of.items()},
        high={task: [values.max() for values in steps] for task, steps in of.items()},
    )
    return draw_lines(
        lines,
        alt="Mean magnitude of each task's direction after each step; after the last: "
        + ", ".join(f"{line.label} {line.y[-1]:.3g}" for line in lines),
        x_label="after step",
        y_label="magnitude",
        steps=history.tasks,
    )


def training_figures(history: History) -> dict[str, str]:
    """Loss and accuracy over the epochs of every fit."""
    count = len(history.tasks)

    def lines(name: str, scale: float) -> list[Line]:
        return [
            Line(
                label=task,
                x=[row["epoch"] for row in curve],
                y=[scale * row[name] for row in curve],
                colour=task_colour(i, count),
                marker=MARKERS[i] if count <= PALETTE else "",
            )
            for i, (task, curve) in enumerate(zip(history.tasks, history.curves, strict=True))
            if curve
        ]

    loss, accuracy = lines("loss", 1), lines("accuracy", 100)
    if not loss:
        return {}
    ends = ", ".join(f"{line.label} {line.y[-1]:.3g}" for line in loss)
    return {
        "loss": draw_lines(
            loss,
            alt=f"Training loss over epochs; at the end: {ends}",
            x_label="epoch",
            y_label="training loss",
        ),
        "accuracy": draw_lines(
            accuracy,
            alt=f"Training accuracy over epochs; at the end: {percents([line.y[-1] for line in accuracy])}",
            x_label="epoch",
            y_label="training accuracy, %",
            percent=True,
        ),
    }


def percents(values: Iterable[float]) -> str:
    """Numbers in percent as a text."""
    return ", ".join(f"{value:.1f}\N{NO-BREAK SPACE}%" for value in values)
