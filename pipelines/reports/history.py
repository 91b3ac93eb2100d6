"""All that a report shows, read once from what the stages before it left."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from pipelines.ledger.newcomers import unknown_figures
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.project.schemas import ClassMap, Metrics, SampleCounts
from sdlora import comparison
from sdlora import metrics as measure
from sdlora.tensor_checks import read_arrays

if TYPE_CHECKING:
    import pyarrow as pa

Record = dict[str, Any]
_Row = TypeVar("_Row")


MOST_SHOWN = 100
"""Of more steps a page shows the last ones and some of those before, in tables, maps and files of plots."""
_LAST_SHOWN = 30
MOST_LOST_SHOWN = 12
"""Images that a step has lost of which the page may show pictures."""


def shown_steps(count: int) -> list[int]:
    """Return the places of the steps that are shown of so many: all, or the last 30 and every second, third, … before.

    These are at most 100.
    """
    if count <= MOST_SHOWN:
        return list(range(count))
    early = count - _LAST_SHOWN
    stride = -(-early // (MOST_SHOWN - _LAST_SHOWN))
    return [*range(0, early, stride), *range(early, count)]


def of_shown(rows: Sequence[_Row]) -> list[_Row]:
    """Return those rows of a table that are shown of it, one row being of one step."""
    return [rows[place] for place in shown_steps(len(rows))]


@dataclass(frozen=True, kw_only=True)
class _Predictions:
    """What the model of one step says of every test image, in the order of the test files."""

    id: pa.ChunkedArray
    """(images,) names of the images."""
    task: np.ndarray
    """(images,) index of the task that an image is of."""
    label: np.ndarray
    """(images,)"""
    prediction: np.ndarray
    """(images,)"""
    confidence: np.ndarray
    """(images,) probability that the model gives its prediction."""

    @property
    def right(self) -> np.ndarray:
        """(images,) booleans."""
        return self.prediction == self.label


class LostImage(NamedTuple):
    """An image that a step names wrong, and the step before named right."""

    row: int
    """its place among all test images"""
    label: int
    prediction: int
    confidence: float
    confidence_before: float


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What the model of one step says of the test images of all tasks so far, in numbers."""

    named: np.ndarray
    """(tasks so far,): predictions that name a class of each, those that arrived with it."""
    shown: np.ndarray
    """(tasks so far,): test images of a class of each."""
    flips: comparison.Flips | None
    """What the step changed on the images of the tasks before it. None of the first step."""
    lost: list[LostImage]
    """The surest of those images."""
    calibration_error: float


@dataclass(frozen=True, kw_only=True)
class History:
    """All that the report shows, read once. Lists run over the steps, in the order of params.yaml."""

    tasks: list[str]
    classes: list[Record]
    """All classes so far, each its `label`, `name` and `task`; the index is the label."""
    accuracy: np.ndarray
    """(tasks, tasks): after step i on task j, NaN where j > i."""
    samples: list[int]
    """Test images per task."""
    evaluations: list[Record]
    """Of each step: its metrics."""
    training: list[int]
    """Training images per task."""
    again: list[dict[str, int]]
    """Of each task: how many training images it has of each known class."""
    shown: list[int]
    """Places of the steps that are shown where there is a row for each."""
    magnitudes: list[dict[str, np.ndarray]]
    """Of each step that is shown: task → (targets,); empty for a method without directions."""
    curves: list[list[dict[str, float]]]
    """Of each step: one record per epoch."""
    origin: Record
    """The record of step t00, the backbone."""
    records: list[Record]
    """Of each step: its step.json, without the magnitudes."""
    hashes: list[str]
    """SHA-256 of the records, that of t00 before those of the tasks."""
    verdicts: list[Record]
    """The verdict of t00, then of each step: what its gate measured, and the second half of the ledger."""
    verdict_hashes: list[str]
    """SHA-256 of the verdicts."""
    backbone: str
    answers: list[_Answers]
    """Of each step."""
    last: _Predictions
    """Of the last step."""
    unknown: dict[str, Record]
    """Step → how well it tells unknown images, of those that have a threshold."""

    @property
    def shown_tasks(self) -> list[str]:
        """Names of the steps that are shown."""
        return [self.tasks[place] for place in self.shown]


def head_of(history: History) -> str:
    """Return the hash that stands for the whole chain. It is that of the last verdict, which holds all before it."""
    return history.verdict_hashes[-1]


def read_history(artifacts: Path, tasks: list[str]) -> History:
    """Read the steps of `tasks` and no others: a folder that a removed task has left does not count."""
    evaluations = [
        _read_evaluation(artifacts / "evaluation" / task, tasks[: i + 1]) for i, task in enumerate(tasks)
    ]
    steps = [needed(artifacts / "model" / task / "step.json") for task in ("t00", *tasks)]
    origin, *records = [_without_magnitudes(read_json(step)) for step in steps]
    verdicts = [needed(artifacts / "gate" / task / "verdict.json") for task in ("t00", *tasks)]
    counts = [
        read_json(needed(artifacts / "split" / task / "split.json"), SampleCounts)["counts"] for task in tasks
    ]
    class_map = read_json(needed(artifacts / "split" / tasks[-1] / "classes.json"), ClassMap)
    classes = sorted(class_map["classes"], key=lambda entry: entry["label"])
    arrived = {entry["name"]: entry["task"] for entry in classes}
    shown = shown_steps(len(tasks))
    magnitudes = [
        _read_magnitudes(artifacts / "model" / tasks[place] / "magnitudes.safetensors") for place in shown
    ]
    curves = [_read_curve(needed(artifacts / "fit" / task / "curve.csv")) for task in tasks]
    answers, last = _read_answers(artifacts / "evaluation", tasks, evaluations, classes)
    return History(
        tasks=tasks,
        classes=classes,
        evaluations=evaluations,
        accuracy=accuracies(evaluations),
        samples=evaluations[-1]["samples"],
        training=[sum(count["train"] for count in classes.values()) for classes in counts],
        again=[
            {name: count["train"] for name, count in its.items() if arrived[name] != task}
            for task, its in zip(tasks, counts, strict=True)
        ],
        shown=shown,
        magnitudes=magnitudes,
        curves=curves,
        origin=origin,
        records=records,
        hashes=[sha256_of(step) for step in steps],
        verdicts=[read_json(verdict) for verdict in verdicts],
        verdict_hashes=[sha256_of(verdict) for verdict in verdicts],
        backbone=read_json(needed(artifacts / "model" / "t00" / "backbone.json"))["name"],
        answers=answers,
        last=last,
        unknown=unknown_figures(tasks, (artifacts / "evaluation").joinpath, thresholds_of(records)),
    )


def thresholds_of(records: Sequence[Record]) -> list[float | None]:
    """Return the threshold for unknown images of each step; None where it has none."""
    return [record.get("freezing", {}).get("unknown_threshold") for record in records]


def needed(path: Path) -> Path:
    """Return the path, or raise InputError if an earlier stage has not left it."""
    if not path.exists():
        raise InputError(
            f"{path} is missing: the report needs every task of params.yaml; run `sdlora run` first"
        )
    return path


def _read_evaluation(folder: Path, tasks: list[str]) -> Record:
    """Read one evaluation, which must be of just these tasks, in this order."""
    path = needed(folder / "metrics.json")
    evaluation = read_json(path, Metrics)
    if evaluation["tasks"] != tasks:
        raise InputError(
            f"{path} is of the tasks {', '.join(evaluation['tasks'])},"
            f" params.yaml has {', '.join(tasks)} by then; run `sdlora run` first"
        )
    return evaluation


def accuracies(evaluations: Sequence[Record]) -> np.ndarray:
    """Return the accuracy matrix of the steps' evaluations."""
    rows = [[right / of for right, of in zip(e["correct"], e["samples"], strict=True)] for e in evaluations]
    return measure.accuracy_matrix(rows)


def validation_accuracy(evaluation: Record) -> float | None:
    """Return the accuracy on all validation images of an evaluation, which has none unless `data.validation` asks for
    them.
    """
    images = sum(evaluation.get("validation_samples", []))
    return sum(evaluation["validation_correct"]) / images if images else None


def _read_magnitudes(path: Path) -> dict[str, np.ndarray]:
    """Read task → magnitudes (targets,). A method without directions has none, or no file."""
    found = read_arrays(path) if path.exists() else {}
    return {task: values.astype(np.float64).ravel() for task, values in found.items()}


def _without_magnitudes(record: Record) -> Record:
    """Return a record without what there is of every task before: all records are in memory at once."""
    return {name: value for name, value in record.items() if name not in _OF_ALL_TASKS}


_OF_ALL_TASKS = ("magnitudes", "learned_magnitudes")


def _read_curve(path: Path) -> list[dict[str, float]]:
    """Read the training curve, one record per epoch."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _read_answers(
    folder: Path, tasks: list[str], evaluations: list[Record], classes: list[Record]
) -> tuple[list[_Answers], _Predictions]:
    """Read the predictions of every step, which must be of the images of the step before and of more after them.

    Those of two steps at a time, because there are as many as steps times images.
    """
    place = {task: index for index, task in enumerate(tasks)}
    task_of = np.array([place[entry["task"]] for entry in classes])
    answers: list[_Answers] = []
    before: _Predictions | None = None
    for task, evaluation in zip(tasks, evaluations, strict=True):
        path = needed(folder / task / "predictions.arrow")
        now = _read_predictions(path, evaluation["samples"])
        if before is not None and not now.id[: len(before.id)].equals(before.id):
            raise InputError(
                f"{path}: its images are not those of the step before and new ones; run `sdlora run` first"
            )
        old = len(before.label) if before else 0
        answers.append(
            _Answers(
                named=np.bincount(task_of[now.prediction], minlength=len(answers) + 1),
                shown=np.bincount(task_of[now.label], minlength=len(answers) + 1),
                flips=comparison.flips(before.right, now.right[:old]) if before else None,
                lost=_surest_lost(before, now) if before else [],
                calibration_error=comparison.calibration_error(now.confidence, now.right),
            )
        )
        before = now
    assert before is not None
    return answers, before


def _surest_lost(before: _Predictions, now: _Predictions) -> list[LostImage]:
    """Return images that a step names wrong and the step before named right, the surest first."""
    rows = surest(now.confidence, np.flatnonzero(before.right & ~now.right[: len(before.label)]))
    return [
        LostImage(
            row=row,
            label=int(now.label[row]),
            prediction=int(now.prediction[row]),
            confidence=float(now.confidence[row]),
            confidence_before=float(before.confidence[row]),
        )
        for row in rows[:MOST_LOST_SHOWN]
    ]


def surest(confidence: np.ndarray, rows: np.ndarray) -> list[int]:
    """Reorder rows by confidence, highest first. Equally sure ones stay in order."""
    return rows[np.argsort(-confidence[rows], kind="stable")].tolist()


def _read_predictions(path: Path, samples: list[int]) -> _Predictions:
    """Read the predictions of one step, of so many images per task."""
    from pipelines.data.packed import read_images

    table = read_images(path)
    if len(table) != sum(samples):
        raise InputError(
            f"{path}: {len(table)} predictions, metrics.json beside it is of {sum(samples)} images;"
            " run `sdlora run` first"
        )
    columns = {name: table.column(name).to_numpy() for name in ("label", "prediction", "confidence")}
    return _Predictions(id=table.column("id"), task=np.repeat(np.arange(len(samples)), samples), **columns)
