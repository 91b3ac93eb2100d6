"""Metrics of class-incremental learning, each a pure function of the accuracy matrix.

`accuracy[i, j]` is the accuracy on task j after step i, as a fraction in 0..1, NaN where j > i (the task has
not come yet); its shape is (tasks, tasks) and its indices start at 0, so index i stands for task and step
t(i+1). `samples[j]` is the number of test images of task j. Without `samples` every task counts the same (per
task); with it every image does (per sample). A `…_curve` holds the same metric after every step, of shape
(tasks,); the metric itself is the curve's last value. What compares old tasks with an earlier state is NaN
where there is no old task: no old task is not the same as no forgetting.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Matrix = NDArray[np.float64]
_Curve = NDArray[np.float64]


def accuracy_matrix(rows: Sequence[Sequence[float]]) -> _Matrix:
    """Build the matrix from one row per step: row i holds the accuracies on tasks 0 … i, in numeric order."""
    matrix = np.full((len(rows), len(rows)), np.nan)
    for i, row in enumerate(rows):
        if len(row) != i + 1:
            raise ValueError(f"after step {i + 1} there are {i + 1} tasks, got {len(row)} accuracies")
        matrix[i, : i + 1] = row
    return _checked(matrix)


def accuracy_curve(accuracy: ArrayLike, samples: ArrayLike | None = None) -> _Curve:
    """Accuracy after each step on all tasks so far: mean of the row, or pooled over all images."""
    return _mean_over_tasks(_checked(accuracy), samples)


def last_accuracy(accuracy: ArrayLike, samples: ArrayLike | None = None) -> float:
    """Accuracy after the last step on all tasks (Acc of the SD-LoRA paper: per task)."""
    return float(accuracy_curve(accuracy, samples)[-1])


def average_accuracy_curve(accuracy: ArrayLike, samples: ArrayLike | None = None) -> _Curve:
    """Mean of the accuracy curve up to each step. The steps count the same in both weightings."""
    curve = accuracy_curve(accuracy, samples)
    return np.cumsum(curve) / np.arange(1, len(curve) + 1)


def average_accuracy(accuracy: ArrayLike, samples: ArrayLike | None = None) -> float:
    """Average incremental accuracy (AAA): mean over steps t of the accuracy after t on all tasks so far.

    Rebuffi et al., iCaRL, 2017 (per sample); AAA of the SD-LoRA paper (per task).
    """
    return float(average_accuracy_curve(accuracy, samples)[-1])


def forgetting_curve(accuracy: ArrayLike, samples: ArrayLike | None = None) -> _Curve:
    """Forgetting after each step. NaN at the first."""
    matrix = _checked(accuracy)
    best_before = np.vstack([np.full(len(matrix), np.nan), np.fmax.accumulate(matrix)[:-1]])
    return _mean_over_tasks(best_before - matrix, samples)


def forgetting(accuracy: ArrayLike, samples: ArrayLike | None = None) -> float:
    """Mean over the old tasks j < T of max_{j ≤ i < T} accuracy[i, j] - accuracy[T, j], T being the last.

    Chaudhry et al., Riemannian Walk, 2018. The maximum excludes the last step itself, so a task better than
    ever counts as negative forgetting; PILOT and the released SD-LoRA code include it and never
    fall below 0. Higher is worse. NaN for a single task.
    """
    return float(forgetting_curve(accuracy, samples)[-1])


def backward_transfer_curve(accuracy: ArrayLike, samples: ArrayLike | None = None) -> _Curve:
    """Backward transfer after each step. NaN at the first."""
    matrix = _checked(accuracy)
    change = matrix - np.diag(matrix)
    np.fill_diagonal(change, np.nan)
    return _mean_over_tasks(change, samples)


def backward_transfer(accuracy: ArrayLike, samples: ArrayLike | None = None) -> float:
    """Mean over the old tasks j < T of accuracy[T, j] - accuracy[j, j], T being the last step.

    Lopez-Paz & Ranzato, GEM, 2017. Negative where later steps made old tasks worse. NaN for a single task.
    """
    return float(backward_transfer_curve(accuracy, samples)[-1])


def _mean_over_tasks(values: _Matrix, samples: ArrayLike | None) -> _Curve:
    """Mean of each row over its known (not NaN) tasks, weighted by `samples` if given. NaN where none is."""
    weights = np.ones(len(values)) if samples is None else np.asarray(samples, dtype=np.float64)
    if weights.shape != (len(values),) or not np.all(weights > 0):
        raise ValueError(f"expected {len(values)} positive numbers of samples, one per task, got {samples!r}")
    known = ~np.isnan(values)
    total = known @ weights
    summed = np.where(known, values, 0.0) @ weights
    return np.divide(summed, total, out=np.full(len(values), np.nan), where=total > 0)


def _checked(accuracy: ArrayLike) -> _Matrix:
    """Return the matrix as float64, or raise ValueError where it is not an accuracy matrix."""
    matrix = np.asarray(accuracy, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"expected a square matrix of at least one task, got the shape {matrix.shape}")
    past = np.tri(len(matrix), dtype=bool)
    if np.isnan(matrix[past]).any():
        step, task = np.argwhere(np.isnan(matrix) & past)[0] + 1
        raise ValueError(f"no accuracy on task {task} after step {step}: evaluate it, no mean can do without")
    if not np.isnan(matrix[~past]).all():
        step, task = np.argwhere(~np.isnan(matrix) & ~past)[0] + 1
        raise ValueError(f"accuracy on task {task} after step {step}, which came before it: expected NaN")
    if matrix[past].min() < 0 or matrix[past].max() > 1:
        wrong = matrix[past & ~((matrix >= 0) & (matrix <= 1))][0]
        raise ValueError(f"expected fractions in 0..1, got {wrong}")
    return matrix
