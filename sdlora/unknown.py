"""Whether an image is of none of the known classes: scores that rise as it looks less like any of them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quadratic(NamedTuple):
    """A quadratic form of features f of size d: gᵀ matrix g + linear · g + constant, with g = f − middle."""

    matrix: Tensor
    """(d, d), symmetric."""
    middle: Tensor
    """(d,)."""
    linear: Tensor
    """(d,)."""
    constant: Tensor
    """(1,)."""

    def of(self, features: Tensor) -> Tensor:
        """Return the form (n,) of features (n, d), in their type."""
        matrix, middle, linear, constant = (part.to(features.dtype) for part in self)
        centred = features - middle
        return ((centred @ matrix + linear) * centred).sum(dim=1) + constant

    def divided(self, by: float) -> "Quadratic":
        """Return the form divided by a number, in single precision."""
        matrix, middle, linear, constant = self
        return Quadratic(*(part.float() for part in (matrix / by, middle, linear / by, constant / by)))


FORM_SHAPES: dict[str, tuple[int | str, ...]] = {
    "matrix": ("features", "features"),
    "middle": ("features",),
    "linear": ("features",),
    "constant": (1,),
}
"""The shapes of the fields of a form, for `check_tensors`."""


def squared_distance(precision: Tensor, centre: Tensor, *, middle: Tensor) -> Quadratic:
    """Return (f − centre)ᵀ precision (f − centre) as a form about another middle, in double precision."""
    apart = middle - centre
    across = precision @ apart
    return Quadratic(precision, middle, 2 * across, (apart @ across)[None])


def difference(form: Quadratic, other: Quadratic) -> Quadratic:
    """Return the difference of two forms about one middle."""
    matrix, _, linear, constant = other
    return Quadratic(form.matrix - matrix, form.middle, form.linear - linear, form.constant - constant)


def _by_distance(logits: Tensor, form: Tensor) -> Tensor:
    return form - 2 * logits.max(dim=1).values


def _by_energy(logits: Tensor, form: Tensor) -> Tensor:
    return -logits.logsumexp(dim=1)


def _by_largest_logit(logits: Tensor, form: Tensor) -> Tensor:
    return -logits.max(dim=1).values


SCORES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relative": _by_distance,
    "mahalanobis": _by_distance,
    "energy": _by_energy,
    "max_logit": _by_largest_logit,
}
"""The scores by name, each (n,) of logits (n, classes) and of the form (n,) that a distance is read with.

`mahalanobis` is the squared distance to the nearest class, by the covariances that the head takes the classes to have.
`relative` is that less the squared distance to all classes as one Gaussian (Ren et al., 2021, arXiv 2106.09022). Logits
of heads in closed form are minus half such distances, less what all classes share: the form is that. `energy` is minus
the logarithm of the sum of exp(logit) (Liu et al., NeurIPS 2020), `max_logit` minus the largest one.
"""
DISTANCES = ("relative", "mahalanobis")
"""Scores that read a form."""


class Rejection(NamedTuple):
    """What a step calls unknown: what scores above the threshold."""

    score: str
    """A name of `SCORES`."""
    threshold: float
    form: Quadratic | None = None
    """Of `DISTANCES`."""


class UnknownScore(nn.Module):
    """The score of images from their features and their logits."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__()
        self.threshold = rejection.threshold
        self._score = SCORES[rejection.score]
        for name, part in (rejection.form._asdict() if rejection.form else {}).items():
            self.register_buffer(name, part.clone())

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """(n,) of features (n, d) and logits (n, classes)."""
        form = torch.zeros(())
        if hasattr(self, "matrix"):
            form = Quadratic(*(getattr(self, name) for name in Quadratic._fields)).of(features)
        return self._score(logits, form)
