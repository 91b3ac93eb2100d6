"""What the gate of a step measures, and which limits it breaks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.packed import read_images
from pipelines.project.files import read_json, sha256_of
from pipelines.project.schemas import Metrics
from pipelines.project.settings import Gate

if TYPE_CHECKING:
    import pyarrow as pa


def measure(
    metrics: dict[str, Any], was: dict[str, Any], now: pa.Table, before: pa.Table | None
) -> dict[str, float | None]:
    """Return what the limits are about, as fractions rounded to six decimals. None where there is no old task.

    Args:
        metrics: `metrics.json` of the step.
        was: that of the step before; its tasks are the old ones.
        now: `predictions.arrow` of the step.
        before: that of the step before.

    Returns:
        `fall`: the largest fall of an old task's accuracy; `negative_flips`: share of the old tasks' test images
        that were right and are wrong; `calibration_error` (15 ranges); `new_task`: accuracy on the last task.
    """
    import numpy as np

    from sdlora.comparison import calibration_error, flips

    shares = [right / images for right, images in zip(metrics["correct"], metrics["samples"], strict=True)]
    earlier = [right / images for right, images in zip(was["correct"], was["samples"], strict=True)]
    falls = [then - share for then, share in zip(earlier, shares, strict=False)]
    right = np.equal(now["prediction"].to_numpy(), now["label"].to_numpy())
    negative = None
    if before is not None:
        held = dict(
            zip(
                before["id"].to_pylist(),
                np.equal(before["prediction"].to_numpy(), before["label"].to_numpy()).tolist(),
                strict=True,
            )
        )
        pairs = [
            (held[sample], hit)
            for sample, hit in zip(now["id"].to_pylist(), right.tolist(), strict=True)
            if sample in held
        ]
        negative = flips(*zip(*pairs, strict=True)).negative_rate
    found = {
        "fall": max(falls, default=None),
        "negative_flips": negative,
        "calibration_error": calibration_error(now["confidence"].to_numpy(), right),
        "new_task": shares[-1],
    }
    return {name: None if value is None else round(value, 6) + 0.0 for name, value in found.items()}


def broken(limits: Gate, measured: dict[str, float | None]) -> dict[str, str]:
    """Return which limits a step breaks: the limit's name, and what happened in words."""
    words = {
        "fall": "made an old task fall by {:.1f} points (gate.fall: {:.1f})",
        "negative_flips": "turned {:.1f} % of the old test images wrong (gate.negative_flips: {:.1f})",
        "calibration_error": "has a calibration error of {:.1f} % (gate.calibration_error: {:.1f})",
        "new_task": "names {:.1f} % of its own task right (gate.new_task: {:.1f})",
    }
    found = {}
    for name, text in words.items():
        limit, value = getattr(limits, name), measured[name]
        if limit is None or value is None:
            continue
        if value < limit if name == "new_task" else value > limit:
            found[name] = text.format(100 * value, 100 * limit)
    return found


def results_of(evaluation: Path) -> str:
    """Return one hash for all that an evaluation has left, predictions included: what an approval is of."""
    files = {path.name: sha256_of(path) for path in sorted(evaluation.iterdir())}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def measured_in(evaluation: Path, before: Path) -> dict[str, float | None]:
    """Return what `measure` says of two evaluation folders, that of a step and that of the step before."""
    was = read_json(before / "metrics.json", Metrics)
    return measure(
        read_json(evaluation / "metrics.json", Metrics),
        was,
        read_images(evaluation / "predictions.arrow"),
        read_images(before / "predictions.arrow") if was["tasks"] else None,
    )
