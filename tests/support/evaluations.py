"""Evaluations as the stage leaves them, of rows that a test chooses."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipelines.data.packed import read_images, write_rows
from pipelines.ledger.newcomers import NEWCOMERS
from pipelines.project.files import write_json

ROW = tuple[str, str, int, int, float]


def write_evaluation(folder: Path, rows: list[ROW]) -> None:
    """An evaluation as the stage leaves it, of rows (id, task, label, prediction, confidence)."""
    folder.mkdir(parents=True)
    types = {"id": pa.string(), "task": pa.string(), "label": pa.int32(), "prediction": pa.int32()}
    write_rows(folder / "predictions.arrow", rows, {**types, "confidence": pa.float32()})
    tasks = list(dict.fromkeys(row[1] for row in rows))
    mine = {task: [row[2] == row[3] for row in rows if row[1] == task] for task in tasks}
    write_json(
        folder / "metrics.json",
        {
            "step": tasks[-1],
            "tasks": tasks,
            "accuracy": [round(sum(hits) / len(hits), 6) for hits in mine.values()],
            "samples": [len(hits) for hits in mine.values()],
            "correct": [sum(hits) for hits in mine.values()],
        },
    )


def write_scores(folder: Path, scores: list[float], newcomers: list[tuple[str, float]]) -> None:
    """Give the test images of an evaluation scores, and its newcomers (part, score) those of the step before."""
    table = read_images(folder / "predictions.arrow")
    types = {field.name: field.type for field in table.schema}
    rows = [(*row.values(), value) for row, value in zip(table.to_pylist(), scores, strict=True)]
    (folder / "predictions.arrow").unlink()
    write_rows(folder / "predictions.arrow", rows, {**types, "score": pa.float32()})
    if newcomers:
        named = [(str(place), *row) for place, row in enumerate(newcomers)]
        write_rows(folder / NEWCOMERS, named, {"id": pa.string(), "part": pa.string(), "score": pa.float32()})
