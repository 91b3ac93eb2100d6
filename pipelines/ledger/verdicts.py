"""What the gate of a step measures, and which limits it breaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.data.packed import read_images
from pipelines.ledger.newcomers import recognised
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.project.schemas import FreezingFacts, Metrics
from pipelines.project.settings import Gate

if TYPE_CHECKING:
    import pyarrow as pa


_ANSWERS = ("id", "label", "prediction", "confidence")
"""Columns of a file of predictions that are measured."""


_LATER = ("drift", "unknown")
"""Limits that verdicts of before do not know."""
MUCH_DRIFT = 0.25
"""Share of the accuracy of earlier classes: a step by which drift has cost more is told, where no gate stops it."""


def measure(
    metrics: Mapping[str, Any], was: Mapping[str, Any], now: pa.Table, before: pa.Table | None
) -> dict[str, float | None]:
    """Return what the limits are about, as fractions rounded to six decimals. None where there is no old task.

    Args:
        metrics: step, tasks, images and right answers of the step, as in `metrics.json`.
        was: those of the step before; its tasks are the old ones.
        now: what the step says of each image.
        before: what the step before says.

    Returns:
        `fall`: the largest fall of an old task's accuracy; `negative_flips`: share of the old tasks' images
        that were right and are wrong; `calibration_error` (15 ranges); `new_task`: accuracy on the last task.
    """
    import numpy as np
    import pyarrow.compute as pc

    from sdlora.comparison import calibration_error, flips

    shares, earlier = _shares(metrics), _shares(was)
    falls = [earlier[task] - shares[task] for task in earlier if task in shares]
    right = np.equal(now["prediction"].to_numpy(), now["label"].to_numpy())
    negative = None
    if before is not None:
        held = before["id"].combine_chunks()
        place = pc.index_in(now["id"], value_set=held).combine_chunks()
        known = np.flatnonzero(place.is_valid())
        was_right = np.equal(before["prediction"].to_numpy(), before["label"].to_numpy())
        negative = flips(was_right[place.drop_null().to_numpy()], right[known]).negative_rate
    found = {
        "fall": max(falls, default=None),
        "negative_flips": negative,
        "calibration_error": calibration_error(now["confidence"].to_numpy(), right),
        "new_task": shares[metrics["step"]],
    }
    return {name: None if value is None else round(value, 6) + 0.0 for name, value in found.items()}


def _shares(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of right answers of each task."""
    counted = zip(metrics["tasks"], metrics["correct"], metrics["samples"], strict=True)
    return {task: right / images for task, right, images in counted}


def broken(limits: Gate, measured: dict[str, float | None]) -> dict[str, str]:
    """Return which limits a step breaks: the limit's name, and what happened in words."""
    words = {
        "fall": "made an old task fall by {:.1f} points (gate.fall: {:.1f})",
        "negative_flips": f"turned {{:.1f}} % of the old {limits.on} images wrong (gate.negative_flips: {{:.1f}})",
        "calibration_error": "has a calibration error of {:.1f} % (gate.calibration_error: {:.1f})",
        "new_task": "names {:.1f} % of its own task right (gate.new_task: {:.1f})",
        "unknown": "brings images of new classes, of which the step before tells {:.1f} % from known ones "
        "(gate.unknown: {:.1f})",
        "drift": "has lost an estimated {:.1f} % of the accuracy of earlier classes to drift (gate.drift: {:.1f})",
    }
    found = {}
    for name, text in words.items():
        limit, value = getattr(limits, name), measured.get(name)
        if limit is None or value is None:
            continue
        if value < limit if name in ("new_task", "unknown") else value > limit:
            found[name] = text.format(100 * value, 100 * limit)
    return found


def in_a_verdict(limits: Gate) -> dict[str, Any]:
    """Return the limits as a verdict holds them.

    One that was measured on test images does not say so, and one that knows no limit of drift, or of unknown images,
    says nothing of it.
    """
    held = limits.model_dump(exclude_defaults=limits.on == "test") | limits.limits
    return {name: value for name, value in held.items() if name not in _LATER or value is not None}


def results_of(evaluation: Path) -> str:
    """Return one hash for all that an evaluation has left, predictions included: what an approval is of."""
    files = {path.name: sha256_of(path) for path in sorted(evaluation.iterdir())}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def measured_in(
    evaluation: Path, before: Path, on: Literal["test", "validation"], *, model: Path | None
) -> dict[str, float | None]:
    """Return what `measure` says of two evaluation folders, that of a step and that of the step before.

    Where the record in its model folder has an estimate of what drift has cost (`sdlora.freezing.settled`), `drift` is
    that. Without a folder nothing is said of drift. `unknown` is how well the step before tells images of the new
    classes from those of its own, as an AUROC, where it has a score for unknown images.

    Raises:
        InputError: the step has no images of its own that could be measured on.
    """
    facts = read_json(model / "step.json", FreezingFacts).get("freezing", {}) if model else {}
    drift = {"drift": float(facts["drift_loss"])} if "drift_loss" in facts else {}
    auroc = recognised(evaluation, before, on)
    return _measured_on(evaluation, before, on) | drift | ({} if auroc is None else {"unknown": auroc})


def _measured_on(evaluation: Path, before: Path, on: str) -> dict[str, float | None]:
    """Return what is measured on images."""
    metrics, was = (read_json(folder / "metrics.json", Metrics) for folder in (evaluation, before))
    if on == "test":
        old = read_images(before / "predictions.arrow", *_ANSWERS) if was["tasks"] else None
        return measure(metrics, was, read_images(evaluation / "predictions.arrow", *_ANSWERS), old)
    now, old = (_validation_of(folder) for folder in (evaluation, before))
    counted = [_counts(step["step"], table) for step, table in ((metrics, now), (was, old))]
    if now is None or metrics["step"] not in counted[0]["tasks"]:
        raise InputError(
            f"gate.on: validation, but no image of {metrics['step']} is held out (of a class with one training image "
            "none can be); add images, or write gate.on: test"
        )
    return measure(counted[0], counted[1], now, old)


def _validation_of(evaluation: Path) -> pa.Table | None:
    path = evaluation / "validation.arrow"
    return read_images(path, "task", *_ANSWERS) if path.is_file() else None


def _counts(step: str, table: pa.Table | None) -> dict[str, Any]:
    """Return images and right answers of each task of a table that has any, in the form of metrics.json."""
    rows = [] if table is None else table.select(["task", "label", "prediction"]).to_pylist()
    images = Counter(row["task"] for row in rows)
    right = Counter(row["task"] for row in rows if row["label"] == row["prediction"])
    return {
        "step": step,
        "tasks": list(images),
        "samples": list(images.values()),
        "correct": [right[task] for task in images],
    }
