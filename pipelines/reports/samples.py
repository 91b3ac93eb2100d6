"""Which test images a report shows, and what the model says of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pipelines.reports.history import History, Record, needed
from pipelines.thumbnails import data_uri

IMAGES_ON_THE_PAGE = 160


def sample_images(artifacts: Path, history: History) -> list[Record]:
    """Choose for each task some test images that the last model names right, and its surest mistakes."""
    from pipelines.images import read_images

    each = max(1, min(6, IMAGES_ON_THE_PAGE // (2 * len(history.tasks))))
    found = history.predictions
    chosen = []
    for task in history.tasks:
        mine = sorted(
            (i for i, its in enumerate(found.task) if its == task),
            key=lambda i: (-found.confidence[i], found.id[i]),
        )
        right = [i for i in mine if found.prediction[i] == found.label[i]]
        wrong = [i for i in mine if found.prediction[i] != found.label[i]]
        table = read_images(needed(artifacts / "split" / history.tasks[-1] / "test" / f"{task}.arrow"))
        row_of = {name: row for row, name in enumerate(table.column("id").to_pylist())}

        def pictures(rows: list[int], table: Any = table, row_of: dict[str, int] = row_of) -> list[Record]:  # noqa: ANN401
            return [
                {
                    "id": found.id[i],
                    "uri": data_uri(table.column("image")[row_of[found.id[i]]].as_py()),
                    "actual": history.classes[found.label[i]]["name"],
                    "predicted": history.classes[found.prediction[i]]["name"],
                    "predicted_task": history.classes[found.prediction[i]]["task"],
                    "confidence": found.confidence[i],
                }
                for i in rows
            ]

        chosen.append(
            {
                "task": task,
                "right": pictures(one_of_each(right, found.label)[:each]),
                "wrong": pictures(wrong[:each]),
                "right_count": len(right),
                "wrong_count": len(wrong),
            }
        )
    return chosen


def one_of_each(rows: list[int], label: list[int]) -> list[int]:
    """Reorder rows so that every class comes once before any comes twice; the order is kept otherwise."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[label[row]], row))
        seen[label[row]] += 1
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])]
