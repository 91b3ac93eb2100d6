"""How well a step tells that images are of no class it knows: those that the task after it has brought."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.data.packed import read_images

if TYPE_CHECKING:
    import numpy as np

NEWCOMERS = "newcomers.arrow"
"""In an evaluation: the score that the step before gives to each image of a class that it does not know."""
_KNOWN = {"test": "predictions.arrow", "validation": "validation.arrow"}
_Part = Literal["test", "validation"]


def recognised(evaluation: Path, before: Path, part: _Part) -> float | None:
    """Return how well the step before tells images of new classes from those of its own, as an AUROC.

    None where it has no threshold, or where there are no such images.

    Args:
        evaluation: what `evaluate` left for the step that brought the classes.
        before: the same of the step before.
        part: of which images.
    """
    from sdlora.comparison import auroc

    scores = _scores(evaluation, before, part)
    return None if scores is None else round(auroc(*scores), 6)


def unknown_figures(
    tasks: Sequence[str], evaluation_of: Callable[[str], Path], thresholds: Sequence[float | None]
) -> dict[str, dict[str, float | None]]:
    """Return for each step that has a threshold how well it tells unknown test images, rounded.

    `false_alarms`: share of the images of its own classes that it calls unknown. Of the images of the next task's new
    classes, null where there are none: `noticed`, the share that it calls unknown, `auroc`, and `fpr95`, the share that
    passes for known where 95 % of the known do.
    """
    from sdlora.comparison import auroc, missed_share

    found: dict[str, dict[str, float | None]] = {}
    for task, after, threshold in zip(tasks, [*tasks[1:], None], thresholds, strict=True):
        if threshold is None:
            continue
        known = read_images(evaluation_of(task) / _KNOWN["test"], "score")["score"].to_numpy()
        found[task] = {"false_alarms": round(float((known > threshold).mean()), 6)}
        scores = _scores(evaluation_of(after), evaluation_of(task), "test") if after else None
        figures = dict.fromkeys(("noticed", "auroc", "fpr95"))
        if scores is not None:
            _, new = scores
            values = float((new > threshold).mean()), auroc(known, new), missed_share(known, new)
            figures = {name: round(value, 6) for name, value in zip(figures, values, strict=True)}
        found[task] |= figures
    return found


def _scores(evaluation: Path, before: Path, part: _Part) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the scores of known images and of new ones. None where there are none of either."""
    import pyarrow.compute as pc

    new, known = evaluation / NEWCOMERS, before / _KNOWN[part]
    if not new.is_file() or not known.is_file():
        return None
    table = read_images(new, "part", "score")
    own = table.filter(pc.equal(table["part"], part))["score"].to_numpy()
    held = read_images(known, "score")["score"].to_numpy()
    return (held, own) if len(own) and len(held) else None
