"""Figures as SVG, in the colours of the page around them.

matplotlib knows nothing of the reader's light or dark page. So figures are drawn in colours that stand for roles, and
the SVG gets the page's CSS variables in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from pipelines.reports.drawing import (
    BAD,
    GOOD,
    INK,
    MANY_TASKS,
    MARKERS,
    MUTED,
    PALETTE,
    Heat,
    Line,
    blank,
    draw_heat,
    draw_lines,
    some,
    task_colour,
    to_svg,
)
from pipelines.reports.history import MOST_SHOWN, History, shown_steps
from pipelines.reports.statistics import calibration_errors, flip_rows, head_bias, reliability
from pipelines.reports.weights import Movement
from sdlora import metrics as measure


def _task_lines(
    history: History,
    y: Mapping[str, Sequence[float]],
    *,
    low: Mapping[str, Sequence[float]] | None = None,
    high: Mapping[str, Sequence[float]] | None = None,
) -> list[Line]:
    """Return one line per task, each from its own step to the last."""
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


def accuracy_heat(history: History) -> Heat:
    """Return the accuracy matrix. Its colours begin at the lowest accuracy, rounded down to a tenth."""
    return Heat(
        values=history.accuracy,
        rows=history.tasks,
        columns=history.tasks,
        row_label="after step",
        column_label="accuracy on task",
        low=min(0.9, float(np.floor(10 * np.nanmin(history.accuracy)) / 10)),
        high=1.0,
    )


def change_heat(history: History, movement: Movement) -> Heat | None:
    """Return the change of every block at every step. None where it was not computed."""
    if movement.by_block is None:
        return None
    return Heat(
        values=movement.by_block.T,
        rows=movement.blocks,
        columns=history.tasks,
        row_label="block",
        column_label="step",
        low=0.0,
        high=float(movement.by_block.max()) or 1.0,
    )


def overlap_heat(movement: Movement, values: np.ndarray) -> Heat:
    """Overlaps of tasks, from perpendicular to the same."""
    return Heat(
        values=values,
        rows=movement.tasks,
        columns=movement.tasks,
        row_label="task",
        column_label="task",
        low=0.0,
        high=1.0,
    )


def bias_heat(history: History) -> Heat:
    """Share of predictions minus share of images of every task after every step."""
    values = head_bias(history)
    most = float(np.nanmax(np.abs(values), initial=0.01))
    return Heat(
        values=values,
        rows=history.tasks,
        columns=history.tasks,
        row_label="after step",
        column_label="task",
        low=-most,
        high=most,
    )


def magnitude_heat(history: History) -> Heat:
    """Mean magnitude of every direction at every step that is shown."""
    place = {task: index for index, task in enumerate(history.tasks)}
    values = np.full((len(history.shown), len(history.tasks)), np.nan)
    for step, held in enumerate(history.magnitudes):
        for task in held:
            values[step, place[task]] = held[task].mean()
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    return Heat(
        values=values,
        rows=history.shown_tasks,
        columns=history.tasks,
        row_label="after step",
        column_label="magnitude of task",
        low=-most if np.nanmin(values) < 0 else 0.0,
        high=most,
    )


def accuracy_figures(history: History) -> dict[str, str]:
    """Accuracy and forgetting of all classes so far over the steps. Of each task where there are not too many."""
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
    draw = partial(draw_lines, steps=steps, x_label="after step")
    figures = {
        "together": draw(
            together,
            percent=True,
            y_label="accuracy, %",
            alt=f"Accuracy on all classes so far after each step: {_percents(over['now'])}",
        )
    }
    if 1 < count <= MANY_TASKS:
        figures["by_task"] = draw(
            _task_lines(history, {task: percent[i:, i].tolist() for i, task in enumerate(steps)}),
            percent=True,
            y_label="accuracy, %",
            alt=f"Accuracy of each task after each step; after the last: {_percents(percent[-1])}",
        )
    if count > 1:
        lost = (100 * measure.forgetting_curve(history.accuracy, history.samples)[1:]).tolist()
        moved = (100 * measure.backward_transfer_curve(history.accuracy, history.samples)[1:]).tolist()
        figures["forgetting"] = draw(
            [
                Line(label="forgetting", x=x[1:], y=lost, colour=task_colour(3, 4), marker="o"),
                Line(
                    label="transfer",
                    x=x[1:],
                    y=moved,
                    colour=task_colour(2, 4),
                    marker="s",
                    dashed=True,
                ),
            ],
            zero=True,
            y_label="points of accuracy",
            alt=f"Forgetting of the old tasks after each step: {_percents(lost)}",
        )
    return figures


def bias_figure(history: History) -> str | None:
    """Return how much each step favours each task: lines, or a map of many tasks. Nothing for a single one."""
    if len(history.tasks) == 1:
        return None
    values = 100 * head_bias(history)
    last = ", ".join(f"{history.tasks[place]} {values[-1, place]:+.1f}" for place in history.shown)
    alt = f"Share of predictions minus share of images of each task after each step; after the last: {last}"
    if len(history.tasks) > MANY_TASKS:
        return draw_heat(bias_heat(history), alt=alt)
    return draw_lines(
        _task_lines(history, {task: values[i:, i].tolist() for i, task in enumerate(history.tasks)}),
        alt=alt,
        x_label="after step",
        y_label="predicted too often, points",
        steps=history.tasks,
        zero=True,
    )


def magnitude_figure(history: History) -> str | None:
    """Magnitudes over steps, or nothing where no step holds the magnitude of an earlier task."""
    if not any(len(values) > 1 for values in history.magnitudes) and len(history.tasks) > 1:
        return None
    if not history.magnitudes[-1]:
        return None
    held = history.magnitudes[-1]
    last = ", ".join(f"{task} {held[task].mean():.3g}" for task in history.shown_tasks if task in held)
    alt = f"Mean magnitude of each task's direction after each step; after the last: {last}"
    if len(history.tasks) > MANY_TASKS:
        return draw_heat(magnitude_heat(history), alt=alt)
    kept = [
        task
        for i, task in enumerate(history.tasks)
        if all(task in values for values in history.magnitudes[i:])  # an absorbed direction has no line
    ]
    of = {task: [values[task] for values in history.magnitudes[history.tasks.index(task) :]] for task in kept}
    lines = _task_lines(
        history,
        {task: [values.mean() for values in steps] for task, steps in of.items()},
        low={task: [values.min() for values in steps] for task, steps in of.items()},
        high={task: [values.max() for values in steps] for task, steps in of.items()},
    )
    return draw_lines(lines, alt=alt, x_label="after step", y_label="magnitude", steps=history.tasks)


def flip_figure(history: History) -> str | None:
    """Bars of the images that each step gained and lost. Nothing before there is an old task."""
    from matplotlib.ticker import MaxNLocator

    rows = flip_rows(history)
    if not rows:
        return None
    lost = [row["lost"] for row in rows]
    alt = f"Images right before and wrong now at each step: {', '.join(str(lost[i]) for i in shown_steps(len(lost)))}"
    with blank(alt, 5.2, 3.3) as figure:
        axes = figure.add_axes((0.125, 0.16, 0.86, 0.8))
        x = range(len(rows))
        for heights, colour in (([row["gained"] for row in rows], GOOD), ([-count for count in lost], BAD)):
            if len(rows) > MOST_SHOWN:  # bars as one shape
                axes.fill_between(x, heights, step="mid", color=colour, linewidth=0)
            else:
                axes.bar(x, heights, color=colour, width=0.7, linewidth=0)
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_xticks(*some([row["step"] for row in rows]))
        axes.set_xlim(-0.6, max(len(rows), 3) - 0.4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("images")
        return to_svg(figure, alt)


def calibration_figures(history: History) -> dict[str, str]:
    """Return the reliability diagram of the last step, and the calibration error after each."""
    errors = [100 * error for error in calibration_errors(history)]
    bins = [each for each in reliability(history) if each.images]
    pairs = ", ".join(f"{100 * each.confidence:.0f} sure {100 * each.accuracy:.0f} right" for each in bins)
    alt = f"Reliability of the last step, in %: {pairs}"
    with blank(alt, 5.2, 3.3) as figure:
        axes = figure.add_axes((0.125, 0.36, 0.84, 0.6))
        places = [50 * (each.lowest + each.highest) for each in bins]
        width = [94 * (each.highest - each.lowest) for each in bins]
        axes.bar(places, [100 * each.accuracy for each in bins], width, color=task_colour(0, 1), linewidth=0)
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.set(xlim=(0, 100), ylim=(0, 102), ylabel="right, %", xticks=range(0, 101, 20))
        axes.tick_params(labelbottom=False)
        below = figure.add_axes((0.125, 0.16, 0.84, 0.16))
        total = sum(each.images for each in bins)
        below.bar(places, [100 * each.images / total for each in bins], width, color=MUTED, linewidth=0)
        below.set(xlim=(0, 100), ylim=(0, 105), xlabel="sure, %", ylabel="images, %", yticks=(0, 100))
        below.set_xticks(range(0, 101, 20))
        diagram = to_svg(figure, alt)
    return {
        "reliability": diagram,
        "over_steps": draw_lines(
            [
                Line(
                    label="",
                    x=range(1, len(errors) + 1),
                    y=errors,
                    colour=task_colour(0, 1),
                    marker="o",
                )
            ],
            alt=f"Expected calibration error after each step: {_percents(errors)}",
            x_label="after step",
            y_label="calibration error, points",
            steps=history.tasks,
            zero=True,
        ),
    }


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
            for i, task, curve in ((i, history.tasks[i], history.curves[i]) for i in history.shown)
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
            alt=f"Training accuracy over epochs; at the end: {_percents([line.y[-1] for line in accuracy])}",
            x_label="epoch",
            y_label="training accuracy, %",
            percent=True,
        ),
    }


def _percents(values: Sequence[float]) -> str:
    """Numbers in percent as a text: of many steps those that are shown."""
    return ", ".join(f"{values[i]:.1f}\N{NO-BREAK SPACE}%" for i in shown_steps(len(values)))
