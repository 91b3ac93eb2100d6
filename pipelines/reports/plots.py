"""The data of the plots that dvc.yaml names: one CSV file each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipelines.reports.history import History, Record
from pipelines.reports.statistics import (
    GATE_FIGURES,
    calibration_errors,
    curves_over_steps,
    flip_rows,
    gate_rows,
    ledger_rows,
    prediction_shares,
    reliability,
    rounded,
    share_rows,
    step_rows,
    task_rows,
)
from pipelines.reports.weights import Movement, block_of

_Table = tuple[list[str], Iterable[Sequence[object]]]
"""Names of the columns, and the rows."""


def write_plots(folder: Path, history: History, movement: Movement | None) -> None:
    """Write one CSV per plot: long form, fractions, tasks and steps by their ids.

    What has a row for every two of them has those that are shown, so that no file grows with the square of the steps.
    """
    folder.mkdir()
    tables = {
        "accuracy": _accuracy_table(history),
        "steps": _steps_table(history),
        "bias": _bias_table(history),
        "magnitudes": _magnitudes_table(history),
        "changes": _changes_table(history, movement),
        "changes_by_block": _changes_by_block_table(history, movement),
        "overlap": _overlap_table(movement),
        "flips": _flips_table(history),
        "reliability": _reliability_table(history),
        "training": _training_table(history),
        "confusion": _confusion_table(history),
    }
    for name, (header, rows) in tables.items():
        _write_csv(folder / f"{name}.csv", header, rows)


def write_tables(folder: Path, history: History) -> None:
    """Write one CSV per table of the page that has more rows than the page shows."""
    folder.mkdir()
    tables = {
        "tasks": task_rows(history),
        "shares": share_rows(history),
        "steps": _step_rows(history),
        "ledger": ledger_rows(history),
        "gate": [_gate_row(row) for row in gate_rows(history)],
    }
    for name, rows in tables.items():
        cells = ([rounded(v) if isinstance(v, float) else v for v in row.values()] for row in rows)
        _write_csv(folder / f"{name}.csv", list(rows[0]), cells)


def _step_rows(history: History) -> list[Record]:
    """Return what each step learned, names as texts. Images of known classes stand there if some step has them."""
    rows = [row | {"classes": "\n".join(row["classes"])} for row in step_rows(history)]
    if not any(history.again):
        return [{name: value for name, value in row.items() if name != "again"} for row in rows]
    return [
        row | {"again": "\n".join(f"{name} +{images}" for name, images in row["again"].items())}
        for row in rows
    ]


def _gate_row(row: Record) -> Record:
    """Return what a gate measured in one level."""
    measured = {
        name if key == "value" else f"{name}_limit": cell[key]
        for name, cell in zip(GATE_FIGURES, row["cells"], strict=True)
        for key in ("value", "limit")
    }
    approved = row["approved"] or {}
    return {
        "step": row["step"],
        "on": row["on"],
        **measured,
        "by": approved.get("by"),
        "why": approved.get("why"),
    }


def _accuracy_table(history: History) -> _Table:
    """Return the accuracy of each step on each task."""
    return ["after", "task", "accuracy"], _over_matrix(history, history.accuracy)


def _steps_table(history: History) -> _Table:
    """Return each metric after every step."""
    over_steps = curves_over_steps(history) | {
        "calibration_error": list(map(rounded, calibration_errors(history)))
    }
    return ["step", *over_steps], zip(history.tasks, *over_steps.values(), strict=True)


def _bias_table(history: History) -> _Table:
    """Return how often each step names each task, and how often it occurs."""
    shares = prediction_shares(history)
    pairs = zip(
        _over_matrix(history, shares.predicted),
        _over_matrix(history, shares.actual),
        _over_matrix(history, shares.predicted - shares.actual),
        strict=True,
    )
    return (
        ["after", "task", "predictions", "images", "difference"],
        ([*predicted, actual[-1], difference[-1]] for predicted, actual, difference in pairs),
    )


def _magnitudes_table(history: History) -> _Table:
    """Return the magnitudes of each step, over the targets."""
    shown = {*history.shown_tasks}
    return (
        ["step", "task", "mean", "lowest", "highest"],
        (
            [step, task, *map(rounded, (values[task].mean(), values[task].min(), values[task].max()))]
            for step, values in zip(history.shown_tasks, history.magnitudes, strict=True)
            for task in sorted(values.keys() & shown)
        ),
    )


def _changes_table(history: History, movement: Movement | None) -> _Table:
    """Return how far each step moved the weights of each target."""
    header = ["step", "block", "target", "change"]
    if movement is None or movement.steps is None:
        return header, []
    return header, (
        [step, block_of(target), target, rounded(value, 9)]
        for step, row in zip(history.tasks, movement.steps, strict=True)
        for target, value in zip(movement.targets, row, strict=True)
    )


def _changes_by_block_table(history: History, movement: Movement | None) -> _Table:
    """Return how far each step moved the adapted weights of each block."""
    header = ["step", "block", "change"]
    if movement is None or movement.by_block is None:
        return header, []
    return header, (
        [step, block, rounded(value, 9)]
        for step, row in zip(history.tasks, movement.by_block, strict=True)
        for block, value in zip(movement.blocks, row, strict=True)
    )


def _overlap_table(movement: Movement | None) -> _Table:
    """Return what the directions of every two tasks have in common."""
    header = ["task", "other", "columns", "rows"]
    if movement is None:
        return header, []
    return header, (
        [task, other, rounded(movement.columns[i, j]), rounded(movement.rows[i, j])]
        for i, task in enumerate(movement.tasks)
        for j, other in enumerate(movement.tasks)
    )


def _flips_table(history: History) -> _Table:
    """Return what each step changed on the images of the tasks before it, each way in a row of its own."""
    return (
        ["step", "flip", "images", "of", "p"],
        (
            [row["step"], name, row[key], row["images"], rounded(row["p"])]
            for row in flip_rows(history)
            for name, key in (("right before, wrong now", "lost"), ("wrong before, right now", "gained"))
        ),
    )


def _reliability_table(history: History) -> _Table:
    """Sort the test images of the last step into ranges of its confidence."""
    return (
        ["lowest", "highest", "images", "confidence", "accuracy"],
        (
            [rounded(each.lowest), rounded(each.highest), each.images, *map(rounded, each[3:])]
            for each in reliability(history)
        ),
    )


def _training_table(history: History) -> _Table:
    """Loss and accuracy over the epochs of every fit."""
    return (
        ["task", "epoch", "loss", "accuracy"],
        (
            [task, int(row["epoch"]), rounded(row["loss"]), rounded(row["accuracy"])]
            for task, curve in zip(history.tasks, history.curves, strict=True)
            for row in curve
        ),
    )


def _confusion_table(history: History) -> _Table:
    """Return what every test image is, and what the last step takes it for."""
    names = [entry["name"] for entry in history.classes]
    found = history.last
    pairs = zip(found.label.tolist(), found.prediction.tolist(), strict=True)
    return ["actual", "predicted"], ([names[a], names[b]] for a, b in pairs)


def _over_matrix(history: History, values: np.ndarray) -> Iterator[list[object]]:
    """Step, task and value of a (steps, tasks) matrix, of the tasks that each step knows."""
    for place, i in enumerate(history.shown):
        for j in history.shown[: place + 1]:
            yield [history.tasks[i], history.tasks[j], rounded(values[i, j])]


def _write_csv(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file that is the same on every machine. None is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
