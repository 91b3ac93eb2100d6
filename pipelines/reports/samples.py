"""Which test images a report shows, and what the models say of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.data.split_chain import TEST, part_file
from pipelines.data.thumbnails import data_uri
from pipelines.project.errors import InputError
from pipelines.reports.history import MOST_LOST_SHOWN, History, LostImage, Record, needed, surest

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGES_ON_THE_PAGE = 160
_TASKS_WITH_IMAGES = 20
"""Of more tasks only those with the lowest accuracy show images."""

_FLIPS_OF_EARLIER_STEP = 6
FLIPS_ON_THE_PAGE = 60


class Album:
    """The test images of all tasks so far, each read when it is wanted."""

    def __init__(self, artifacts: Path, history: History) -> None:
        self._history = history
        self._folder = artifacts / "split"
        self._starts = np.cumsum([0, *history.samples])
        self._tables: dict[int, pa.Table] = {}

    def last_answer(self, row: int) -> Record:
        """Return one test image, and what the last model says of it."""
        found = self._history.last
        return self._picture(
            row, int(found.label[row]), int(found.prediction[row]), float(found.confidence[row])
        )

    def lost(self, image: LostImage) -> Record:
        """Return one test image that a step has lost."""
        shown = self._picture(image.row, image.label, image.prediction, image.confidence)
        return shown | {"confidence_before": image.confidence_before}

    def _picture(self, row: int, label: int, prediction: int, confidence: float) -> Record:
        return {
            "id": self._history.last.id[row].as_py(),
            "uri": data_uri(self._bytes(row)),
            "actual": self._history.classes[label]["name"],
            "predicted": self._history.classes[prediction]["name"],
            "confidence": confidence,
        }

    def _bytes(self, row: int) -> bytes:
        from pipelines.data.packed import read_images

        task = int(self._history.last.task[row])
        owner = self._history.tasks[task]
        path = self._folder / owner / part_file(TEST, owner)
        if task not in self._tables:
            self._tables[task] = read_images(needed(path))
        table, place = self._tables[task], int(row - self._starts[task])
        name = self._history.last.id[row]
        if place >= len(table) or not table.column("id")[place].equals(name):
            raise InputError(f"{path}: {name} is not where its prediction says; run `sdlora run` first")
        return table.column("image")[place].as_py()


def sample_images(album: Album, history: History) -> list[Record]:
    """Choose for each task some test images that the last model names right, and its surest mistakes."""
    lowest = np.argsort(history.accuracy[-1], kind="stable")[:_TASKS_WITH_IMAGES]
    each = max(1, min(6, _IMAGES_ON_THE_PAGE // (2 * len(lowest))))
    found = history.last
    hit = found.right
    chosen = []
    for task in sorted(lowest.tolist()):
        mine = surest(found.confidence, np.flatnonzero(found.task == task))
        right, wrong = [row for row in mine if hit[row]], [row for row in mine if not hit[row]]
        chosen.append(
            {
                "task": history.tasks[task],
                "right": [album.last_answer(row) for row in _one_of_each(right, found.label)[:each]],
                "wrong": [album.last_answer(row) for row in wrong[:each]],
                "right_count": len(right),
                "wrong_count": len(wrong),
            }
        )
    return chosen


def flipped_images(album: Album, history: History) -> dict[str, list[Record]]:
    """Step → images that it names wrong and the step before named right, the surest first. The last step first.

    The pictures of earlier steps end where the page has enough of them.
    """
    left = FLIPS_ON_THE_PAGE
    chosen: dict[str, list[Record]] = {}
    for step in range(len(history.tasks) - 1, 0, -1):
        most = MOST_LOST_SHOWN if not chosen else _FLIPS_OF_EARLIER_STEP
        images = history.answers[step].lost[: min(most, left)]
        left -= len(images)
        chosen[history.tasks[step]] = [album.lost(image) for image in images]
    return chosen


def _one_of_each(rows: list[int], label: np.ndarray) -> list[int]:
    """Reorder rows so that every class comes once before any comes twice. The order is kept otherwise."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[label[row]], row))
        seen[label[row]] += 1
    return [row for _, row in sorted(turns, key=lambda turn: turn[0])]
