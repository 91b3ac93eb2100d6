"""From a history to the numbers that are reported: for metrics.json, for tables, for figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipelines.ledger.verdicts import MUCH_DRIFT
from pipelines.reports.format import flattened
from pipelines.reports.history import History, Record, accuracies, validation_accuracy
from sdlora import comparison
from sdlora import metrics as measure


def headline(history: History) -> Record:
    """Return the content of metrics.json: fractions, rounded. Null where there is no old task to speak of.

    Only with validation images it has their accuracy, the one number that may be selected on.
    """
    return headline_of(history.tasks, len(history.classes), history.evaluations, history.unknown)


def headline_of(
    tasks: Sequence[str], classes: int, evaluations: Sequence[Record], unknown: Mapping[str, Record]
) -> Record:
    """Return the same from the metrics of every step's evaluation, in order, and from `unknown_figures`."""
    accuracy, samples = accuracies(evaluations), evaluations[-1]["samples"]
    numbers: Record = {"steps": len(tasks), "classes": classes}
    for suffix, weights in (("", samples), ("_per_task", None)):
        numbers |= {
            f"last_accuracy{suffix}": rounded(measure.last_accuracy(accuracy, weights)),
            f"average_accuracy{suffix}": rounded(measure.average_accuracy(accuracy, weights)),
            f"forgetting{suffix}": rounded(measure.forgetting(accuracy, weights)),
            f"backward_transfer{suffix}": rounded(measure.backward_transfer(accuracy, weights)),
        }
    validation = validation_accuracy(evaluations[-1])
    if validation is not None:
        numbers["validation_accuracy"] = rounded(validation)
    numbers["accuracy"] = dict(zip(tasks, map(rounded, accuracy[-1]), strict=True))
    if unknown:
        numbers["unknown"] = dict(unknown)
    return numbers


def curves_over_steps(history: History) -> dict[str, list[float | None]]:
    """Return each metric after every step, per sample and per task."""
    curves = {}
    for suffix, samples in (("", history.samples), ("_per_task", None)):
        curves[f"accuracy{suffix}"] = measure.accuracy_curve(history.accuracy, samples)
        curves[f"average{suffix}"] = measure.average_accuracy_curve(history.accuracy, samples)
        curves[f"forgetting{suffix}"] = measure.forgetting_curve(history.accuracy, samples)
        curves[f"backward_transfer{suffix}"] = measure.backward_transfer_curve(history.accuracy, samples)
    return {name: [rounded(value) for value in curve] for name, curve in curves.items()}


def rounded(value: float, decimals: int = 6) -> float | None:
    """So many decimals, None for NaN, and no negative zero."""
    return None if np.isnan(value) else round(float(value), decimals) + 0.0


def table_value(value: float | None) -> str | float:
    """Return a number for a table, in which nothing is a dash."""
    return "-" if value is None else value


def task_rows(history: History) -> list[Record]:
    """Return one record per task: its accuracy when it was learned, at its best and now, and what it lost since its
    best.
    """
    best = np.nanmax(history.accuracy, axis=0)
    return [
        {
            "task": task,
            "images": history.samples[i],
            "learned": float(history.accuracy[i, i]),
            "best": float(best[i]),
            "now": float(history.accuracy[-1, i]),
            "lost": float(best[i] - history.accuracy[-1, i]) + 0.0,
        }
        for i, task in enumerate(history.tasks)
    ]


class _Shares(NamedTuple):
    """Of each task after each step, (steps, tasks), NaN where the task has not come yet."""

    predicted: np.ndarray
    """Share of all predictions that name a class of the task."""
    actual: np.ndarray
    """Share of the test images that are of such a class."""


def prediction_shares(history: History) -> _Shares:
    """Return how often each step names each task's classes, and how often it should: without a head bias both are
    equal.
    """
    shares = _Shares(np.full_like(history.accuracy, np.nan), np.full_like(history.accuracy, np.nan))
    for step, (answers, evaluation) in enumerate(zip(history.answers, history.evaluations, strict=True)):
        images = sum(evaluation["samples"])
        shares.predicted[step, : step + 1] = answers.named / images
        shares.actual[step, : step + 1] = answers.shown / images
    return shares


def share_rows(history: History) -> list[Record]:
    """Return for each task its share of the test images, and of the predictions of the last step."""
    shares = prediction_shares(history)
    return [
        {"task": task, "actual": actual, "predicted": predicted}
        for task, actual, predicted in zip(
            history.tasks, shares.actual[-1].tolist(), shares.predicted[-1].tolist(), strict=True
        )
    ]


def head_bias(history: History) -> np.ndarray:
    """(steps, tasks): share of the predictions minus share of the images. Above 0 a task is favoured."""
    shares = prediction_shares(history)
    return shares.predicted - shares.actual


def worst_confusions(history: History, *, rows: int = 10) -> list[Record]:
    """Return the pairs of classes that the last step confuses most often."""
    found = history.last
    labels = found.label.tolist()
    images = Counter(labels)
    pairs = Counter(zip(labels, found.prediction.tolist(), strict=True))
    wrong = sorted(((-count, a, b) for (a, b), count in pairs.items() if a != b))[:rows]
    return [
        {"actual": history.classes[a], "predicted": history.classes[b], "count": -count, "of": images[a]}
        for count, a, b in wrong
    ]


def flip_rows(history: History) -> list[Record]:
    """Return one record per step but the first: what it changed on the test images of the tasks before it.

    `p` is McNemar's exact p-value of as many flips one way and the other from a step that changed nothing.
    """
    return [
        {
            "step": task,
            "images": found.images,
            "lost": found.lost,
            "gained": found.gained,
            "change": (found.gained - found.lost) / found.images,
            "p": found.p_value,
        }
        for task, found in zip(history.tasks, (answers.flips for answers in history.answers), strict=True)
        if found is not None
    ]


def calibration_errors(history: History) -> list[float]:
    """Return the expected calibration error of each step on the test images of all tasks so far."""
    return [answers.calibration_error for answers in history.answers]


def reliability(history: History) -> list[comparison.Bin]:
    """Sort the test images of the last step into ranges of its confidence."""
    found = history.last
    return comparison.calibration_bins(found.confidence, found.right)


def step_rows(history: History) -> list[Record]:
    """Return one record per step: what it learned from, and how well."""
    over = curves_over_steps(history)
    return [
        {
            "step": step,
            "classes": [entry["name"] for entry in history.classes if entry["task"] == step],
            "again": history.again[i],
            "training": history.training[i],
            "test": history.samples[i],
            "fitted": history.records[i].get("metrics", {}).get("training_accuracy"),
            "new": float(history.accuracy[i, i]),
            "all": over["accuracy"][i],
            "forgetting": over["forgetting"][i],
        }
        for i, step in enumerate(history.tasks)
    ]


def ledger_rows(history: History) -> list[Record]:
    """Return one row per step from t00 on: the hashes of record and verdict, and whether they follow those before."""
    rows = []
    records = [history.origin, *history.records]
    for i, (step, record) in enumerate(zip(("t00", *history.tasks), records, strict=True)):
        code = record.get("code", {})
        rows.append(
            {
                "step": step,
                "hash": history.hashes[i],
                "verdict": history.verdict_hashes[i],
                "follows": _follows(history, i),
                "split": record.get("split", {}).get("digest"),
                "fit": code.get("fit"),
                "freeze": code.get("freeze"),
            }
        )
    return rows


def _follows(history: History, i: int) -> bool:
    """Return whether the record and the verdict of step i hold the hashes of those before, and the verdict the
    record's.
    """
    record, verdict = (history.origin, *history.records)[i], history.verdicts[i]
    if not i:
        return record.get("previous") is None and verdict.get("previous") is None
    return (
        record.get("previous") == history.hashes[i - 1]
        and verdict.get("previous") == history.verdict_hashes[i - 1]
        and verdict.get("record") == history.hashes[i]
    )


def gate_rows(history: History) -> list[Record]:
    """Return one row per step: what its gate measured, each with its limit, and who let it through although it broke
    one.
    """
    return [
        {
            "step": step,
            "on": verdict["limits"].get("on", "test"),
            "cells": [
                {"value": verdict["measured"].get(name), "limit": verdict["limits"].get(name)}
                for name in GATE_FIGURES
            ],
            "broken": verdict["broken"],
            "approved": verdict["approved"],
        }
        for step, verdict in zip(history.tasks, history.verdicts[1:], strict=True)
    ]


def first_drifted(history: History) -> str | None:
    """Return the first step by which drift has cost much of the accuracy of earlier classes, by its own estimate."""
    losses = (record.get("freezing", {}).get("drift_loss", 0.0) for record in history.records)
    return next((step for step, loss in zip(history.tasks, losses, strict=True) if loss > MUCH_DRIFT), None)


GATE_FIGURES = ("fall", "negative_flips", "calibration_error", "new_task", "drift", "unknown")
"""What a gate measures, in the order of the page."""


class _Span(NamedTuple):
    """A value that so many steps in a row share. `steps` is empty where all of them do."""

    steps: str
    value: str


def _spans(history: History, trees: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[_Span]]]:
    """Return the values of each dotted name over the steps, of one tree per step. An en dash where a step has none."""
    flat = [
        {name: "null" if value is None else str(value) for name, value in flattened(tree).items()}
        for tree in trees
    ]
    table = []
    for name in sorted({name for each in flat for name in each}):
        runs: list[tuple[int, int, str]] = []
        for i, each in enumerate(flat):
            value = each.get(name, "\N{EN DASH}")
            if runs and runs[-1][2] == value:
                runs[-1] = (runs[-1][0], i, value)
            else:
                runs.append((i, i, value))
        table.append((name, [_Span(_steps_text(history, a, b), value) for a, b, value in runs]))
    return table


def _steps_text(history: History, first: int, last: int) -> str:
    """Return a run of steps as a text."""
    if last - first + 1 == len(history.tasks):
        return ""
    ends = history.tasks[first], history.tasks[last]
    return ends[0] if first == last else "\N{EN DASH}".join(ends)


def parameter_spans(history: History) -> list[tuple[str, list[_Span]]]:
    """Return every parameter over the steps, as the records have it."""
    return _spans(history, [record.get("parameters", {}) for record in history.records])


def version_spans(history: History) -> list[tuple[str, list[_Span]]]:
    """Return every library's version over the steps, and how far the results are determined, as the records have it."""
    return _spans(
        history,
        [
            {
                **record.get("versions", {}),
                **{name: record[name] for name in ("determinism",) if name in record},
            }
            for record in history.records
        ],
    )
