"""From a history to the numbers that are reported: for metrics.json, for tables, for figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.reports.history import History, Record
from sdlora import metrics as measure


def headline(history: History) -> Record:
    """The content of metrics.json: fractions, rounded; null where there is no old task to speak of.

    Only with validation images it has their accuracy, the one number that may be selected on.
    """
    numbers: Record = {"steps": len(history.tasks), "classes": len(history.classes)}
    for suffix, samples in (("", history.samples), ("_per_task", None)):
        numbers |= {
            f"last_accuracy{suffix}": rounded(measure.last_accuracy(history.accuracy, samples)),
            f"average_accuracy{suffix}": rounded(measure.average_accuracy(history.accuracy, samples)),
            f"forgetting{suffix}": rounded(measure.forgetting(history.accuracy, samples)),
            f"backward_transfer{suffix}": rounded(measure.backward_transfer(history.accuracy, samples)),
        }
    if history.validation is not None:
        numbers["validation_accuracy"] = rounded(history.validation)
    numbers["accuracy"] = dict(zip(history.tasks, map(rounded, history.accuracy[-1]), strict=True))
    return numbers


def curves_over_steps(history: History) -> dict[str, list[float | None]]:
    """Each metric after every step, per sample and per task."""
    curves = {}
    for suffix, samples in (("", history.samples), ("_per_task", None)):
        curves[f"accuracy{suffix}"] = measure.accuracy_curve(history.accuracy, samples)
        curves[f"average{suffix}"] = measure.average_accuracy_curve(history.accuracy, samples)
        curves[f"forgetting{suffix}"] = measure.forgetting_curve(history.accuracy, samples)
        curves[f"backward_transfer{suffix}"] = measure.backward_transfer_curve(history.accuracy, samples)
    return {name: [rounded(value) for value in curve] for name, curve in curves.items()}


def rounded(value: float) -> float | None:
    """Six decimals, None for NaN, and no negative zero."""
    return None if np.isnan(value) else round(float(value), 6) + 0.0


def shown(value: float | None) -> str | float:
    """A number for a table, in which nothing is a dash."""
    return "-" if value is None else value


def heat_floor(history: History) -> float:
    """Where the colours of the matrix begin: the lowest accuracy, rounded down to a tenth."""
    return min(0.9, float(np.floor(10 * np.nanmin(history.accuracy)) / 10))


def matrix_rows(history: History) -> list[Record]:
    """One record per step: its accuracies on the tasks so far, each with its place on the colour scale."""
    floor = heat_floor(history)
    pooled = measure.accuracy_curve(history.accuracy, history.samples)
    return [
        {
            "step": step,
            "cells": [
                {
                    "task": task,
                    "value": value,
                    "heat": round(100 * (value - floor) / (1 - floor)),
                    "images": images,
                }
                for task, value, images in zip(
                    history.tasks, history.accuracy[i, : i + 1].tolist(), history.samples, strict=False
                )
            ],
            "all": float(pooled[i]),
        }
        for i, step in enumerate(history.tasks)
    ]


def prediction_shares(history: History) -> list[Record]:
    """Of each task: its share of the test images, and of the predictions of the last step."""
    total = len(history.predictions.id)
    predicted = Counter(history.classes[label]["task"] for label in history.predictions.prediction)
    return [
        {"task": task, "actual": images / total, "predicted": predicted[task] / total}
        for task, images in zip(history.tasks, history.samples, strict=True)
    ]


def worst_confusions(history: History, *, rows: int = 10) -> list[Record]:
    """The pairs of classes that the last step confuses most often."""
    images = Counter(history.predictions.label)
    pairs = Counter(zip(history.predictions.label, history.predictions.prediction, strict=True))
    wrong = sorted(((-count, a, b) for (a, b), count in pairs.items() if a != b))[:rows]
    return [
        {"actual": history.classes[a], "predicted": history.classes[b], "count": -count, "of": images[a]}
        for count, a, b in wrong
    ]


def step_rows(history: History) -> list[Record]:
    """One record per step for the ledger's table."""
    over = curves_over_steps(history)
    return [
        {
            "step": step,
            "classes": [entry["name"] for entry in history.classes if entry["task"] == step],
            "training": history.training[i],
            "test": history.samples[i],
            "new": float(history.accuracy[i, i]),
            "all": over["accuracy"][i],
            "forgetting": over["forgetting"][i],
            "hash": history.hashes[i],
        }
        for i, step in enumerate(history.tasks)
    ]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested parameters as (dotted name, text) pairs, sorted."""
    pairs = []
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", "null" if value is None else str(value)))
    return pairs
