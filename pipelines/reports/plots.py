"""The data of the plots that dvc.yaml names: one CSV file each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.reports.history import History
from pipelines.reports.numbers import curves_over_steps, rounded


def write_plots(folder: Path, history: History) -> None:
    """Write one CSV per plot: long form, fractions, tasks and steps by their ids."""
    folder.mkdir()
    over_steps = curves_over_steps(history)
    write_csv(
        folder / "accuracy.csv",
        ["after", "task", "accuracy"],
        (
            [after, task, rounded(history.accuracy[i, j])]
            for i, after in enumerate(history.tasks)
            for j, task in enumerate(history.tasks[: i + 1])
        ),
    )
    write_csv(
        folder / "steps.csv", ["step", *over_steps], zip(history.tasks, *over_steps.values(), strict=True)
    )
    write_csv(
        folder / "magnitudes.csv",
        ["step", "task", "mean", "lowest", "highest"],
        (
            [step, task, *map(rounded, (values[task].mean(), values[task].min(), values[task].max()))]
            for step, values in zip(history.tasks, history.magnitudes, strict=True)
            for task in sorted(values)
        ),
    )
    write_csv(
        folder / "training.csv",
        ["task", "epoch", "loss", "accuracy"],
        (
            [task, int(row["epoch"]), rounded(row["loss"]), rounded(row["accuracy"])]
            for task, curve in zip(history.tasks, history.curves, strict=True)
            for row in curve
        ),
    )
    names = [entry["name"] for entry in history.classes]
    pairs = zip(history.predictions.label, history.predictions.prediction, strict=True)
    write_csv(folder / "confusion.csv", ["actual", "predicted"], ([names[a], names[b]] for a, b in pairs))


def write_csv(path: Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file that is the same on every machine; None is an empty cell."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
