"""The threshold of a score for unknown images, for a stated share of false alarms, without images of earlier tasks."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdlora.calibration import LeftOut
from sdlora.head import HeadRows, block_logits
from sdlora.heads import samples
from sdlora.statistics import ClassStatistics
from sdlora.unknown import SCORES, Quadratic, Rejection

_DRAWS, _MOST_OF_EACH = 2**13, 256
"""Made features of all classes together, about, and at most of each."""
_CLASSES, _LOGITS = 2**8, 2**24
"""Classes of which features are made at a time, and logits of them."""


class Margin(NamedTuple):
    """How much higher left-out images score than features made of their classes' statistics, at the threshold."""

    value: float = 0.0
    """In units of logits that no temperature divides."""
    images: float = 0.0
    """What it is known from: those of a step, half of those of the step before, and so on."""


def margin_of(record: Mapping[str, Any], score: str) -> Margin:
    """Return what the steps up to a record's know of the margin of a score."""
    facts = record.get("freezing", {})
    if facts.get("unknown") != score:
        return Margin()
    return Margin(facts["unknown_margin"], facts["unknown_images"])


def alarm_threshold(
    score: str,
    rate: float,
    left_out: LeftOut,
    *,
    rows: Mapping[str, HeadRows],
    form: Quadratic | None,
    statistics: Mapping[str, ClassStatistics],
    temperature: float,
    before: Margin,
    generator: torch.Generator,
) -> tuple[Rejection, Margin] | None:
    """Return what a step calls unknown: about a share `rate` of the images of its own classes, early ones included.

    Images of earlier tasks are gone. So features of all classes are made from their statistics as they are carried to
    this step, and the threshold is the quantile of their scores plus a margin: what left-out images of the step's own
    task have above features made of the same classes. Margins of steps before count too, each half as much as the next.
    None where no step so far could leave an image out.

    Args:
        score: a name of `SCORES`.
        left_out: images of the task, under rows and forms made without them, not divided by the temperature.
        rows: those of the step, divided by the temperature.
        form: that of the step, divided by it too. None for a score without.
        statistics: of each class so far, in the features of this step.
    """
    of = SCORES[score]
    images = len(left_out.labels)
    if not images and not before.images:
        return None
    made = torch.cat(list(_made_scores(score, rows, form, statistics, generator=generator)))
    counts = torch.cat([each.images for each in statistics.values()]).double()
    margin = Margin(before.value, before.images / 2)
    if images:
        found = of(left_out.logits.double() / temperature, left_out.form.double() / temperature)
        seen = torch.bincount(left_out.labels, minlength=len(counts)).double()
        own = quantile(found, torch.ones_like(found), 1 - rate) - _quantile_of(made, seen, 1 - rate)
        known = margin.images + images
        margin = Margin((margin.value * margin.images + own * temperature * images) / known, known)
    threshold = _quantile_of(made, counts, 1 - rate) + margin.value / temperature
    rounded = Margin(round(margin.value, 4), round(margin.images, 4))
    return Rejection(score, round(threshold, 4), form), rounded


def _made_scores(
    score: str,
    rows: Mapping[str, HeadRows],
    form: Quadratic | None,
    statistics: Mapping[str, ClassStatistics],
    *,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Yield the scores (classes, each) of features that are made of each class."""
    classes = sum(len(taken.images) for taken in statistics.values())
    each = min(_MOST_OF_EACH, max(1, _DRAWS // classes))
    for taken in statistics.values():
        parts = (part.split(_CLASSES) for part in taken)
        for some in map(ClassStatistics._make, zip(*parts, strict=True)):
            made = samples(some, each, generator=generator).split(max(1, _LOGITS // classes))
            found = [
                SCORES[score](block_logits(rows.values(), features), _values(form, features))
                for features in made
            ]
            yield torch.cat(found).double().reshape(-1, each)


def _values(form: Quadratic | None, features: Tensor) -> Tensor:
    return torch.zeros(len(features)) if form is None else form.of(features)


def _quantile_of(made: Tensor, counts: Tensor, share: float) -> float:
    """Return a quantile of scores (classes, each), a class counted by its images."""
    return quantile(made.flatten(), counts.repeat_interleave(made.shape[1]), share)


def quantile(values: Tensor, weights: Tensor, share: float) -> float:
    """Return the least of values (n,) that at least such a share of the weight is not above."""
    order = values.argsort()
    below = weights[order].cumsum(0)
    place = torch.searchsorted(below, share * below[-1]).clamp_max(len(values) - 1)
    return float(values[order][place])
