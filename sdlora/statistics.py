"""What a head may remember of a class: how many images, their mean feature, and how they spread about it."""

from typing import NamedTuple

import torch
from torch import Tensor


class ClassStatistics(NamedTuple):
    """Statistics of the classes of one task, in a feature space of size d. No sample can be restored from them.

    The covariance of class c is modelled as `factors[c] factors[c]ᵀ + spread[c]·I`.
    """

    images: Tensor
    """(classes,) int64, how many it was taken from."""
    mean: Tensor
    """(classes, d)."""
    factors: Tensor
    """(classes, d, k): the k leading principal directions, scaled by their standard deviation beyond the spread."""
    spread: Tensor
    """(classes,): the mean variance of the directions that are left."""


def statistics_shapes(classes: int) -> dict[str, tuple[int | str, ...]]:
    """Return the shapes of the fields, for `check_tensors`."""
    return {
        "images": (classes,),
        "mean": (classes, "features"),
        "factors": (classes, "features", "principal directions"),
        "spread": (classes,),
    }


def class_statistics(features: Tensor, labels: Tensor, *, rank: int) -> ClassStatistics:
    """Statistics of features (n, d) by label (n,) 0 … classes − 1. `rank` principal directions per class.

    A class of n images has at most n − 1 directions; what it lacks is 0.
    """
    classes, size = int(labels.max()) + 1, features.shape[1]
    images = torch.bincount(labels, minlength=classes)
    places = labels.argsort(stable=True).split(images.tolist())
    mean = torch.zeros(classes, size)
    factors = torch.zeros(classes, size, rank)
    spread = torch.zeros(classes)
    for label, own in enumerate(places):
        found = features[own].double()
        centre = found.mean(dim=0)
        centred = found - centre
        # Unbiased; a class of one image has no spread of its own.
        variances, directions = _principal(centred / max(len(centred) - 1, 1) ** 0.5)
        kept = min(rank, len(variances))
        rest = variances[kept:].sum() / max(size - kept, 1)
        mean[label], spread[label] = centre, rest
        factors[label, :, :kept] = directions[:, :kept] * (variances[:kept] - rest).clamp_min(0).sqrt()
    return ClassStatistics(images=images, mean=mean, factors=factors, spread=spread)


def _principal(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Variances (m,), falling, and directions (d, m) of centred samples (n, d) divided by √(n − 1)."""
    _, values, right = torch.linalg.svd(scaled, full_matrices=False)
    return values.square(), right.T
