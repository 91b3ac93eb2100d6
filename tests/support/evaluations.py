"""Evaluations as the stage leaves them, of rows that a test chooses."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipelines.data.packed import write_rows
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
