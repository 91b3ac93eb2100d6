"""What a step's drift does to the classes before it, estimated without one of their images."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sdlora.classifier import ModelState
from sdlora.drift import drift_map
from sdlora.head import HeadRows, block_logits

_IMAGES = 2**13
"""Images of the task that are looked at; more change no digit that is shown."""
FEW_CLASSES = 4
"""With fewer classes than these, half of them is a single one. A map of one class knows no direction between classes,
so its error is taken for twice the variance of that of the whole map (docs/explanation/method.md)."""
_DRAWS, _MOST_OF_EACH = 2**13, 64
"""Made features of all earlier classes together, about, and at most of each."""
_CLASSES = 2**8
"""Classes of which features are made at a time."""


class Retention(NamedTuple):
    """The estimated accuracy of the classes before a step, shares of 1."""

    before: float
    """Under the rows of the step before, in its features."""
    after: float
    """Under the rows of the step, in its features, among all classes so far."""
    residual: float
    """What the drift map leaves of the movement of a class that it was not fitted on, by the distance of the nearest
    class means: from 1 on, means lie as far from where they are believed to be as from each other."""

    @property
    def kept(self) -> float:
        """The share of the accuracy that is left, at most 1."""
        return min(1.0, self.after / self.before) if self.before else 1.0


def estimated_retention(
    before: ModelState,
    learned: ModelState,
    *,
    task: str,
    old: Tensor,
    new: Tensor,
    labels: Tensor,
    generator: torch.Generator,
) -> Retention:
    """Return how well the classes before a step are still told apart after it, as far as the task's images tell.

    A map is fitted on half of the task's classes, and its error is what it leaves of the movement of the others, which
    it has seen as little as earlier ones. Features of an earlier class are made from its mean, from how the task's
    own images scatter about theirs under the model before (which has not been trained on them, while the statistics of
    an earlier class are of images that it was trained on), and after the step from an error of the map.

    Args:
        before: what had been learned before the step.
        learned: what has been learned after it, with settled rows.
        task: the step's task.
        old: (n, d) features of the task's images under the model before, paired with
        new: (n, d) under the model after.
        labels: (n,) of these images, 0 … classes − 1 within the task.
    """
    chosen = torch.randperm(len(labels), generator=generator)[:_IMAGES].sort().values
    old, new = old[chosen].double(), new[chosen].double()
    _, labels = labels[chosen].unique(return_inverse=True)
    left = _left_by_the_map(old, new, labels, generator=generator)
    shift = _class_means(left, labels)
    scatter = old - _class_means(old, labels)[labels]
    scatter *= (len(old) / max(len(old) - len(shift), 1)) ** 0.5
    matrix = learned.drift[task].matrix.double()
    was, now = _means(before), _means(learned)
    after = _accuracy(
        now[: len(was)],
        scatter + scatter @ matrix.T,
        learned.settled,
        errors=(_factor(left - shift[labels]), _factor(shift)),
        generator=generator,
    )
    return Retention(
        before=_accuracy(was, scatter, before.settled, errors=None, generator=generator),
        after=after,
        residual=float(shift.square().sum(dim=1).mean().sqrt() / _nearest(now)),
    )


def _left_by_the_map(old: Tensor, new: Tensor, labels: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return what a map fitted on other classes leaves of the movement of each image, (n, d).

    Of a single class the images are halved.
    """
    classes = int(labels.max()) + 1
    units = labels if classes > 1 else torch.arange(len(labels))
    half = (torch.randperm(int(units.max()) + 1, generator=generator) % 2)[units]
    left = torch.zeros_like(old)
    for mine in (half == 0, half == 1):
        if mine.any() and not mine.all():
            fitted = drift_map(old[~mine], new[~mine])
            left[mine] = (new - old)[mine] - old[mine] @ fitted.matrix.double().T - fitted.offset.double()
    return left * 0.5**0.5 if 1 < classes < FEW_CLASSES else left


def _means(learned: ModelState) -> Tensor:
    """Return the means of all classes, carried to the last step, (classes, d), in order of arrival."""
    return torch.cat([each.mean for each in learned.statistics_now().values()]).double()


def _class_means(features: Tensor, labels: Tensor) -> Tensor:
    """(classes, d) of features (n, d)."""
    sums = torch.zeros(int(labels.max()) + 1, features.shape[1], dtype=features.dtype)
    sums.index_add_(0, labels, features)
    return sums / torch.bincount(labels)[:, None]


def _factor(deviations: Tensor) -> Tensor:
    """Return F (at most d, d) with FᵀF the mean of the squares of deviations (n, d)."""
    return torch.linalg.qr(deviations / len(deviations) ** 0.5)[1]


def _accuracy(
    means: Tensor,
    scatter: Tensor,
    rows: Mapping[str, HeadRows],
    *,
    errors: tuple[Tensor, Tensor] | None,
    generator: torch.Generator,
) -> float:
    """Return the share of made features of each class, of which the rows come first, that the rows name right."""
    each = min(_MOST_OF_EACH, max(1, _DRAWS // len(means)))
    right = 0
    for labels, some in zip(torch.arange(len(means)).split(_CLASSES), means.split(_CLASSES), strict=True):
        place = torch.randint(len(scatter), (len(some), each), generator=generator)
        made = some[:, None] + scatter[place]
        for factor, times in () if errors is None else zip(errors, (each, 1), strict=True):
            noise = torch.randn(len(some), times, len(factor), generator=generator, dtype=torch.float64)
            made = made + noise @ factor
        named = block_logits(rows.values(), made).argmax(dim=2)
        right += int((named == labels[:, None]).sum())
    return right / (len(means) * each)


def _nearest(means: Tensor) -> Tensor:
    """Return the mean distance of a class to the nearest other, a scalar."""
    found = [torch.cdist(some, means).topk(2, largest=False).values[:, 1] for some in means.split(_CLASSES)]
    return torch.cat(found).mean()
