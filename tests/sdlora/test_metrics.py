"""The metrics against a 3x3 matrix worked out by hand."""

import numpy as np
import pytest

from sdlora import metrics

# After step 1: 0.9.  After step 2: 0.6, 0.8.  After step 3: 0.7, 0.5, 1.0.  Test images: 10, 20, 30.
ROWS = [[0.9], [0.6, 0.8], [0.7, 0.5, 1.0]]
SAMPLES = [10, 20, 30]


@pytest.fixture
def accuracy() -> np.ndarray:
    """The matrix of `ROWS`."""
    return metrics.accuracy_matrix(ROWS)


def test_the_matrix_is_nan_where_a_task_has_not_come_yet(accuracy: np.ndarray) -> None:
    assert np.isnan(accuracy[np.triu_indices(3, k=1)]).all()
    assert accuracy[2].tolist() == [0.7, 0.5, 1.0]


def test_accuracy_over_steps_is_the_mean_of_the_rows(accuracy: np.ndarray) -> None:
    assert metrics.accuracy_curve(accuracy) == pytest.approx([0.9, 1.4 / 2, 2.2 / 3])
    assert metrics.last_accuracy(accuracy) == pytest.approx(2.2 / 3)


def test_accuracy_per_sample_pools_the_images(accuracy: np.ndarray) -> None:
    # right: 9 of 10, then 6 + 16 of 30, then 7 + 10 + 30 of 60
    assert metrics.accuracy_curve(accuracy, SAMPLES) == pytest.approx([9 / 10, 22 / 30, 47 / 60])
    assert metrics.last_accuracy(accuracy, SAMPLES) == pytest.approx(47 / 60)


def test_average_accuracy_is_the_mean_of_the_curve(accuracy: np.ndarray) -> None:
    assert metrics.average_accuracy(accuracy) == pytest.approx((0.9 + 0.7 + 2.2 / 3) / 3)
    assert metrics.average_accuracy(accuracy, SAMPLES) == pytest.approx((9 / 10 + 22 / 30 + 47 / 60) / 3)
    assert metrics.average_accuracy_curve(accuracy) == pytest.approx([0.9, 0.8, (1.6 + 2.2 / 3) / 3])


def test_forgetting_is_the_fall_from_the_best_earlier_step(accuracy: np.ndarray) -> None:
    # after step 3: task 1 fell from 0.9 to 0.7, task 2 from 0.8 to 0.5
    assert metrics.forgetting(accuracy) == pytest.approx((0.2 + 0.3) / 2)
    assert metrics.forgetting(accuracy, SAMPLES) == pytest.approx((10 * 0.2 + 20 * 0.3) / 30)
    assert metrics.forgetting_curve(accuracy)[1:] == pytest.approx([0.3, 0.25])


def test_forgetting_looks_at_the_best_step_not_at_the_first() -> None:
    accuracy = metrics.accuracy_matrix([[0.5], [0.9, 1.0], [0.6, 1.0, 1.0]])
    assert metrics.forgetting(accuracy) == pytest.approx(0.3 / 2)
    assert metrics.backward_transfer(accuracy) == pytest.approx(0.1 / 2)


def test_a_task_that_is_better_than_ever_is_negative_forgetting() -> None:
    accuracy = metrics.accuracy_matrix([[0.5], [0.7, 1.0]])
    assert metrics.forgetting(accuracy) == pytest.approx(-0.2)


def test_backward_transfer_is_the_change_since_a_task_was_learned(accuracy: np.ndarray) -> None:
    assert metrics.backward_transfer(accuracy) == pytest.approx((-0.2 - 0.3) / 2)
    assert metrics.backward_transfer(accuracy, SAMPLES) == pytest.approx((10 * -0.2 + 20 * -0.3) / 30)
    assert metrics.backward_transfer_curve(accuracy)[1:] == pytest.approx([-0.3, -0.25])


def test_one_task_has_no_forgetting_to_speak_of() -> None:
    accuracy = metrics.accuracy_matrix([[0.8]])
    assert metrics.last_accuracy(accuracy) == metrics.average_accuracy(accuracy) == 0.8
    assert np.isnan(metrics.forgetting(accuracy))
    assert np.isnan(metrics.backward_transfer(accuracy, [7]))


def test_the_first_step_of_a_curve_has_no_old_task(accuracy: np.ndarray) -> None:
    assert np.isnan(metrics.forgetting_curve(accuracy)[0])
    assert np.isnan(metrics.backward_transfer_curve(accuracy, SAMPLES)[0])


def test_more_than_ten_tasks_stay_in_numeric_order() -> None:
    """The released SD-LoRA code sorts keys as text, "10" before "2": its own log has 9.0 for 6.5."""
    tasks = 12
    first = np.linspace(0.5, 0.9, tasks)
    rows = [[*(first[:i] - 0.01 * i), first[i]] for i in range(tasks)]  # only the newest task is learned
    assert metrics.forgetting(metrics.accuracy_matrix(rows)) == pytest.approx(0.11)
    as_text = [
        [value for _, value in sorted(zip(map(str, range(i + 1)), row, strict=True))]
        for i, row in enumerate(rows)
    ]
    assert metrics.forgetting(metrics.accuracy_matrix(as_text)) != pytest.approx(0.11)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        pytest.param([[0.5, 0.5]], "square", id="not square"),
        pytest.param([0.5], "square", id="a vector"),
        pytest.param(np.empty((0, 0)), "at least one task", id="empty"),
        pytest.param([[0.5, np.nan], [np.nan, 0.5]], "task 1 after step 2", id="NaN below the diagonal"),
        pytest.param([[np.nan]], "task 1 after step 1", id="NaN on the diagonal"),
        pytest.param([[0.5, 0.0], [0.5, 0.5]], "task 2 after step 1", id="a number above the diagonal"),
        pytest.param([[88.4]], "fractions", id="percent"),
    ],
)
def test_what_is_not_an_accuracy_matrix_is_refused(matrix: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.last_accuracy(matrix)


@pytest.mark.parametrize("samples", [[10], [10, 20, 0], [10, 20, -1]], ids=["too few", "zero", "negative"])
def test_wrong_numbers_of_samples_are_refused(accuracy: np.ndarray, samples: list[int]) -> None:
    with pytest.raises(ValueError, match="3 positive numbers of samples"):
        metrics.forgetting(accuracy, samples)


def test_a_row_that_misses_a_task_is_refused() -> None:
    with pytest.raises(ValueError, match="after step 2 there are 2 tasks, got 1"):
        metrics.accuracy_matrix([[0.5], [0.5]])
