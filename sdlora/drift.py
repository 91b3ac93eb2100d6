"""How the features of one step became those of the next, and what that makes of statistics that were taken before."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdlora.statistics import ClassStatistics

_RIDGE = 0.3
"""The penalty of the map, as a share of the mean square of a centred feature. From 0.1 to 1 held-out accuracy hardly
differs (docs/explanation/method.md)."""

_ROWS = 2**16
"""Images whose features are in double precision at a time."""

_CLASSES = 2**10
"""Classes whose principal directions are."""


class DriftMap(NamedTuple):
    """An affine map of features of size d: f ← f + matrix f + offset."""

    matrix: Tensor
    """(d, d) float32."""
    offset: Tensor
    """(d,) float32."""


DRIFT_SHAPES: dict[str, tuple[int | str, ...]] = {"matrix": ("features", "features"), "offset": ("features",)}
"""The shapes of the fields, for `check_tensors`."""


def drift_map(old: Tensor, new: Tensor, *, ridge: float = _RIDGE) -> DriftMap:
    """Return the map from old features to new ones, by ridge regression of the change (an identity-ridge map).

    D = (F_new − F_old)ᵀ F_old (F_oldᵀ F_old + λI)⁻¹ of centred features, λ = ridge · tr(F_oldᵀ F_old) / d, and the mean
    moves as it did. No change of features moves nothing, and a large ridge is the shift of the mean alone. Sources:
    tungts1101/spectral_merging@9826a87 (exp21.py), SLDC (arXiv 2511.09926).

    Args:
        old: (n, d) features of the task's images under the model before the step, paired with
        new: (n, d) under the model after it.
    """
    size = old.shape[1]
    centre, shift = torch.zeros(2, size, dtype=torch.float64)
    gram, cross = torch.zeros(2, size, size, dtype=torch.float64)
    for before, after in _doubles(old, new):
        centre += before.sum(dim=0)
        shift += (after - before).sum(dim=0)
    centre /= len(old)
    shift /= len(old)
    for before, after in _doubles(old, new):
        centred, moved = before - centre, after - before - shift
        gram += centred.T @ centred
        cross += centred.T @ moved
    penalty = (ridge * gram.trace() / len(gram)).clamp_min(torch.finfo(torch.float64).tiny)
    inner = gram + penalty * torch.eye(len(gram), dtype=torch.float64)
    matrix = torch.linalg.solve(inner, cross).T
    return DriftMap(matrix=matrix.float(), offset=(shift - matrix @ centre).float())


def _doubles(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs in double precision, some at a time: of a million images all would not fit the memory."""
    for some, others in zip(old.split(_ROWS), new.split(_ROWS), strict=True):
        yield some.double(), others.double()


def carried(
    statistics: Mapping[str, ClassStatistics], drift: Mapping[str, DriftMap], *, tasks: Sequence[str]
) -> dict[str, ClassStatistics]:
    """Return the statistics of each task in the features of the last step.

    The statistics of a task go through the maps of all later steps, in their order: μ ← μ + Dμ + b, U ← U + DU. The
    maps are composed from the last one back, so each task's statistics are moved once.

    Args:
        statistics: task id → what was taken at its own step.
        drift: step → its map; a step without one moved nothing.
        tasks: all tasks so far, in order of arrival.
    """
    found: dict[str, ClassStatistics] = {}
    whole: tuple[Tensor, Tensor] | None = None
    for task in reversed(tasks):
        taken = statistics[task]
        if whole is not None:
            linear, constant = whole
            mean = taken.mean.double() @ linear.T + constant
            moved = [(linear @ some.double()).float() for some in taken.factors.split(_CLASSES)]
            taken = taken._replace(mean=mean.float(), factors=torch.cat(moved))
        found[task] = taken
        if task in drift:
            matrix, offset = (part.double() for part in drift[task])
            step = matrix + torch.eye(len(matrix), dtype=torch.float64)
            whole = (step, offset) if whole is None else (whole[0] @ step, whole[0] @ offset + whole[1])
    return {task: found[task] for task in tasks}
