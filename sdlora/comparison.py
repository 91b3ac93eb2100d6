"""What can be said of predictions, and of two models' predictions of the same images, with its uncertainty."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


def wilson_interval(right: int, images: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return where an accuracy of `right` out of `images` may truly lie (Wilson, 1927).

    The whole of 0..1 for no image.
    """
    if not images:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / images
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    # At the ends the exact bound is the end itself, which rounding would miss.
    return 0.0 if right == 0 else middle - half, 1.0 if right == images else middle + half


class Flips(NamedTuple):
    """Images of which two models say different things, one of them the right one."""

    lost: int
    """Right before, wrong now: negative flips."""
    gained: int
    """Wrong before, right now."""
    images: int

    @property
    def negative_rate(self) -> float:
        """Share of all images that were right before and are wrong now. NaN for no image."""
        return self.lost / self.images if self.images else math.nan

    @property
    def p_value(self) -> float:
        """Probability of a difference at least as large if both models are equally good: McNemar's exact test.

        Two-sided, of `lost` against `gained` from a fair coin (McNemar, 1947); 1 where nothing flipped.
        """
        flips, least = self.lost + self.gained, min(self.lost, self.gained)
        tail = term = 1
        for k in range(least):
            term = term * (flips - k) // (k + 1)  # the binomial coefficient of k + 1
            tail += term
        # Python divides whole numbers of any size exactly, so many flips overflow nothing.
        return min(1.0, 2 * tail / 2**flips)


def flips(right_before: ArrayLike, right_now: ArrayLike) -> Flips:
    """Count the flips between two models' answers to the same images, (n,) booleans each."""
    before, now = np.asarray(right_before, dtype=bool), np.asarray(right_now, dtype=bool)
    if before.shape != now.shape:
        raise ValueError(f"answers to {before.size} and {now.size} images: they must be the same images")
    return Flips(int((before & ~now).sum()), int((~before & now).sum()), int(before.size))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for having looked so many times (Holm, 1979), in their order.

    Whoever calls something a change where its adjusted value is below 5 % is wrong about any of them in at most 5 % of
    cases, however the tests depend on each other.
    """
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def auroc(known: ArrayLike, unknown: ArrayLike) -> float:
    """Return how often an unknown image has a higher score than a known one; of equal ones half count.

    It is the area under the receiver operating characteristic. NaN where there is none of either.
    """
    low, high = np.sort(np.asarray(known, dtype=np.float64)), np.asarray(unknown, dtype=np.float64)
    if not low.size or not high.size:
        return math.nan
    above = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return float(above.mean() / (2 * low.size))


def missed_share(known: ArrayLike, unknown: ArrayLike, *, kept: float = 0.95) -> float:
    """Return the share of unknown images that pass for known at the least score that keeps such a share of the known.

    At 0.95 it is the false positive rate at 95 % (FPR95), known images being the positive ones. NaN as `auroc`.
    """
    low, high = np.sort(np.asarray(known, dtype=np.float64)), np.asarray(unknown, dtype=np.float64)
    if not low.size or not high.size:
        return math.nan
    return float((high <= low[math.ceil(kept * low.size) - 1]).mean())


class Bin(NamedTuple):
    """The images whose confidence lies in one range."""

    lowest: float
    highest: float
    images: int
    confidence: float
    """Mean confidence of its images; NaN without any."""
    accuracy: float
    """Share of its images that are named right; NaN without any."""


def calibration_bins(confidence: ArrayLike, right: ArrayLike, *, bins: int = 15) -> list[Bin]:
    """Sort images by confidence (n,) into equally wide ranges of 0..1, each open below and closed above."""
    sure, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=bool)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for index in range(bins):
        mine = place == index
        count = int(mine.sum())
        mean, share = (float(sure[mine].mean()), float(hit[mine].mean())) if count else (math.nan, math.nan)
        found.append(Bin(index / bins, (index + 1) / bins, count, mean, share))
    return found


def calibration_error(confidence: ArrayLike, right: ArrayLike, *, bins: int = 15) -> float:
    """Expected calibration error: mean over images of |confidence − accuracy| of their range. NaN for no image.

    Naeini et al., AAAI 2015; 15 ranges as Guo et al., ICML 2017.
    """
    found = [each for each in calibration_bins(confidence, right, bins=bins) if each.images]
    images = sum(each.images for each in found)
    gap = sum(each.images * abs(each.confidence - each.accuracy) for each in found)
    return gap / images if images else math.nan
