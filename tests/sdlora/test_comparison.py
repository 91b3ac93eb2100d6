"""Statements about predictions agree with scipy, and with counting by hand."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from sdlora.comparison import (
    Flips,
    auroc,
    calibration_bins,
    calibration_error,
    flips,
    holm,
    missed_share,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "images"), [(0, 5), (1, 5), (5, 5), (98, 100), (731, 2000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_of_an_accuracy_is_wilsons(right: int, images: int, confidence: float) -> None:
    expected = stats.binomtest(right, images).proportion_ci(confidence, method="wilson")
    assert wilson_interval(right, images, confidence=confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_without_images_nothing_is_known() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert math.isnan(Flips(0, 0, 0).negative_rate)
    assert math.isnan(calibration_error([], []))


@pytest.mark.parametrize("rounded", [0, 6])
def test_what_scores_tell_is_what_scikit_learn_says_ties_included(rounded: int) -> None:
    random = np.random.default_rng(0)
    known, unknown = random.normal(0, 2, 400).round(rounded), random.normal(1.5, 2, 300).round(rounded)
    truth, scores = np.repeat([0, 1], [400, 300]), np.concatenate([known, unknown])

    assert auroc(known, unknown) == pytest.approx(roc_auc_score(truth, scores))
    passing, kept, _ = roc_curve(
        1 - truth, -scores, drop_intermediate=False
    )  # the known are the positive ones
    assert missed_share(known, unknown) == pytest.approx(passing[np.flatnonzero(kept >= 0.95)[0]])
    assert math.isnan(auroc([], unknown))
    assert math.isnan(missed_share(known, []))


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (1, 0), (0, 6), (3, 3), (12, 4), (700, 801), (3000, 2000)]
)
def test_the_test_of_flips_is_the_exact_binomial_one(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert Flips(lost, gained, 10_000).p_value == pytest.approx(expected, rel=1e-9)


def test_flips_count_each_way() -> None:
    found = flips([True, True, False, False, True], [True, False, True, False, False])
    assert found == (2, 1, 5)
    assert found.negative_rate == 2 / 5


def test_flips_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="answers to 2 and 3 images"):
        flips([True, True], [True, True, False])


def test_looking_often_is_paid_for_as_holm_says() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; none may be below one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_calibration_by_hand() -> None:
    confidence, right = [0.95, 0.85, 0.55, 0.05, 1.0, 0.5], [True, False, True, False, True, True]
    bins = calibration_bins(confidence, right, bins=2)
    assert [each.images for each in bins] == [2, 4]  # 0.5 is in the lower half, closed above
    assert bins[0].accuracy == 0.5
    assert bins[1].confidence == pytest.approx((0.95 + 0.85 + 0.55 + 1.0) / 4)
    expected = (2 * abs(0.275 - 0.5) + 4 * abs(0.8375 - 0.75)) / 6
    assert calibration_error(confidence, right, bins=2) == pytest.approx(expected)


def test_a_model_that_is_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = np.full(1000, 0.75)
    right = np.arange(1000) % 4 != 0
    order = rng.permutation(1000)
    assert calibration_error(confidence[order], right[order]) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.ones(10), np.zeros(10, dtype=bool)) == 1.0
