"""One temperature for the logits of a step, from images of its task that are left out in turn."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdlora.arrivals import StepClasses, labels_by_step, statistics_by_arrival
from sdlora.comparison import calibration_error
from sdlora.head import HeadBlock, HeadRows, QuadraticBlock, block_logits
from sdlora.statistics import ClassStatistics, class_statistics
from sdlora.unknown import Quadratic

_PARTS = 5
"""Each image is left out once, with a part of so many of its class."""
_IMAGES, _LOGITS = 2**12, 2**26
"""Images that are looked at, at most, and logits of them."""
_HALVINGS = 60
_WIDEST = 20.0
"""Of the search: the logarithm of a temperature is within this."""

_Settle = Callable[[Mapping[str, ClassStatistics]], Mapping[str, HeadRows]]
"""Rows of all classes from their statistics."""
_Form = Callable[[Mapping[str, ClassStatistics]], Quadratic | None]
"""What a score reads beside logits, from the same."""


class LeftOut(NamedTuple):
    """What a step says of images of its task that it was made without."""

    logits: Tensor
    """(m, all classes)."""
    labels: Tensor
    """(m,), among all classes."""
    form: Tensor
    """(m,): what a score reads beside logits; 0 where none does."""


class Temperature(NamedTuple):
    """A number that logits are divided by, and what is known of it."""

    value: float = 1.0
    information: float = 0.0
    """The Fisher information of its logarithm in the images of one step, the largest of all steps so far."""


UNDIVIDED = Temperature()
"""Before the first step."""


def temperature_of(record: Mapping[str, Any]) -> Temperature:
    """Return what the rows of a step are divided by, and what is known of it."""
    facts = record.get("freezing", {})
    return Temperature(facts.get("temperature", 1.0), facts.get("temperature_information", 0.0))


def left_out_logits(
    features: Tensor,
    labels: Tensor,
    *,
    task: str,
    statistics: Mapping[str, ClassStatistics],
    step_classes: StepClasses,
    settle: _Settle,
    generator: torch.Generator,
    form: _Form = lambda _: None,
) -> LeftOut:
    """Return what is said of images of a task under rows made without them.

    Of each class a fifth at a time is left out. An image that is alone in its class never is.

    Args:
        features: (n, d) of the task's images.
        labels: (n,), 0 … classes − 1 within the task.
        task: the last one of `statistics`.
        statistics: of what each task saw, in the features of this step.
        step_classes: which classes those tasks saw that may have seen known ones.
        settle: is given one entry for each class.
    """
    rank = statistics[task].factors.shape[2]
    known = labels_by_step({name: len(taken.images) for name, taken in statistics.items()}, step_classes)
    own, classes = torch.tensor(known[task]), 1 + max(map(max, known.values()))
    part = _parts(labels, generator=generator)
    out = torch.nonzero(part >= 0).flatten()
    most = max(1, min(_IMAGES, _LOGITS // classes))
    looked = torch.zeros(len(labels), dtype=torch.bool)
    looked[out[torch.randperm(len(out), generator=generator)[:most]]] = True
    found = [LeftOut(torch.zeros(0, classes), torch.zeros(0, dtype=torch.long), torch.zeros(0))]
    for which in range(_PARTS):
        mine = looked & (part == which)
        if mine.any():
            rest = class_statistics(features[part != which], labels[part != which], rank=rank)
            without = statistics_by_arrival({**statistics, task: rest}, step_classes)
            some, beside = features[mine].float(), form(without)
            logits = block_logits(settle(without).values(), some)
            values = torch.zeros(len(some)) if beside is None else beside.of(some.double()).float()
            found.append(LeftOut(logits, own[labels[mine]], values))
    return LeftOut(*map(torch.cat, zip(*found, strict=True)))


def _parts(labels: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return which part each image is left out with (n,), −1 for one that is alone in its class."""
    part = torch.full((len(labels),), -1)
    for label in labels.unique():
        own = torch.nonzero(labels == label).flatten()
        if len(own) > 1:
            part[own[torch.randperm(len(own), generator=generator)]] = torch.arange(len(own)) % _PARTS
    return part


def fitted_temperature(logits: Tensor, labels: Tensor, *, before: Temperature = UNDIVIDED) -> Temperature:
    """Return the T whose softmax of logits / T has the least cross-entropy (Guo et al., ICML 2017).

    What earlier steps know counts too, by a penalty J (x − 1 − log x) of x = T before / T, where J is their
    information. A task whose images are all right has none to add. Where no step has any, one image more counts, of
    which every class is equally likely, as the least would be at T = 0. The information is the largest of a step, not
    the sum of all, so that a chain may go on to harder tasks.

    Args:
        logits: (m, classes). At least one image, and two classes.
        labels: (m,), 0 … classes − 1.
        before: the temperature of the step before.
    """
    found = logits.double()
    known = before.information
    aim = found.gather(1, labels[:, None]).sum() + (0 if known else found.mean())
    low, high = -_WIDEST, _WIDEST
    for _ in range(_HALVINGS):  # the slope by 1 / T rises with it
        middle = (low + high) / 2
        scale = float(np.exp(middle))
        expected = ((found * scale).softmax(dim=1) * found).sum(dim=1)
        slope = expected.sum() + (known * (before.value - 1 / scale) if known else expected.mean()) - aim
        if slope > 0:
            high = middle
        else:
            low = middle
    scale = float(np.exp((low + high) / 2))
    if (found.argmax(dim=1, keepdim=True) == labels[:, None]).all():
        return Temperature(1 / scale, known)
    chances = (found * scale).softmax(dim=1)
    spread = (chances * found**2).sum(dim=1) - (chances * found).sum(dim=1) ** 2
    return Temperature(1 / scale, max(known, float(spread.sum()) * scale**2))


def tempered(rows: Mapping[str, HeadRows], temperature: float) -> dict[str, HeadRows]:
    """Return rows whose logits are those of `rows` divided by a temperature."""
    found: dict[str, HeadRows] = {}
    for task, block in rows.items():
        linear = HeadBlock(block.weight / temperature, block.bias / temperature)
        found[task] = linear
        if isinstance(block, QuadraticBlock):
            root = temperature**0.5
            found[task] = QuadraticBlock(*linear, block.products / root, block.offsets / root)
    return found


def calibration_of(logits: Tensor, labels: Tensor) -> float:
    """Return the expected calibration error of logits (n, classes), a share of 1 (15 ranges of confidence)."""
    confidence, named = logits.double().softmax(dim=1).max(dim=1)
    return float(calibration_error(confidence.numpy(), (named == labels).numpy()))
