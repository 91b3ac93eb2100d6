"""Which classes each step saw, and one place for what several steps have left of a class: that of its arrival."""

from collections.abc import Mapping, Sequence

import torch

from sdlora.head import HeadBlock
from sdlora.statistics import ClassStatistics

StepClasses = Mapping[str, Sequence[int]]
"""Step → the labels of its classes, rising, of the steps that may see classes of earlier ones. The others bring new
classes alone, whose labels follow on."""


def labels_by_step(sizes: Mapping[str, int], step_classes: StepClasses) -> dict[str, list[int]]:
    """Return the labels of each step's classes, in the order of its rows.

    Args:
        sizes: step → how many classes it saw, in order of arrival.
    """
    found: dict[str, list[int]] = {}
    known = 0
    for step, size in sizes.items():
        found[step] = list(step_classes.get(step, range(known, known + size)))
        known = max(known, found[step][-1] + 1)
    return found


def rows_by_arrival(
    head: Mapping[str, HeadBlock], step_classes: StepClasses, *, newest: bool
) -> dict[str, HeadBlock]:
    """Return one row for each class, at the step of its arrival. A step that brought no class has none.

    Args:
        head: step → the rows of its classes, as they were trained.
        newest: whether it is the row that was trained last, else the first. The row of a class that no other was
            learned beside is not trained, so one that is known keeps what it had.
    """
    labels = labels_by_step({step: len(block.bias) for step, block in head.items()}, step_classes)
    places: dict[int, tuple[str, int]] = {}
    arrived: dict[str, list[int]] = {}
    for step, own in labels.items():
        arrived[step] = [label for label in own if label not in places]
        here = {label: (step, row) for row, label in enumerate(own)}
        places = places | here if newest and len(own) > 1 else here | places
    found = {}
    for step, own in arrived.items():
        rows = [HeadBlock(*(part[at] for part in head[where])) for where, at in map(places.__getitem__, own)]
        empty = HeadBlock(*(part[:0] for part in head[step]))
        found[step] = HeadBlock(*map(torch.stack, zip(*rows, strict=True))) if rows else empty
    return found


def statistics_by_arrival(
    statistics: Mapping[str, ClassStatistics], step_classes: StepClasses
) -> dict[str, ClassStatistics]:
    """Return one entry for each class, at the step of its arrival: the statistics of all its images.

    Args:
        statistics: step → those of its own images, all in the features of one step.
    """
    if not step_classes:
        return dict(statistics)
    labels = labels_by_step({step: len(taken.images) for step, taken in statistics.items()}, step_classes)
    places: dict[int, list[tuple[str, int]]] = {}
    for step, own in labels.items():
        for row, label in enumerate(own):
            places.setdefault(label, []).append((step, row))
    found = {}
    for step, own in labels.items():
        rows = [row for row, label in enumerate(own) if places[label][0] == (step, row)]
        found[step] = ClassStatistics(*(part[rows] for part in statistics[step]))
        for at, row in enumerate(rows):
            parts = [(statistics[where], place) for where, place in places[own[row]]]
            if len(parts) > 1:
                whole = _merged([ClassStatistics(*(part[place] for part in taken)) for taken, place in parts])
                for part, value in zip(found[step], whole, strict=True):
                    part[at] = value
    return found


def _merged(parts: Sequence[ClassStatistics]) -> ClassStatistics:
    """Return the statistics of all images of one class from those of some images each, without the first dimension.

    N = Σn, μ = Σnμᵢ / N and the unbiased covariance [Σ(nᵢ−1)Cᵢ + Σnᵢ(μᵢ−μ)(μᵢ−μ)ᵀ] / (N−1) are exact. Of the covariance
    as many principal directions are kept as each part has, and the rest goes into the spread, so its trace stays.
    """
    images = torch.stack([part.images for part in parts])
    count, total = images.double(), images.sum()
    means = torch.stack([part.mean for part in parts]).double()
    mean = (count @ means) / total
    inside, between = ((count - 1) / (total - 1)), count / (total - 1)
    stacked = [weight.sqrt() * part.factors.double() for weight, part in zip(inside, parts, strict=True)]
    stacked.append(((means - mean) * between.sqrt()[:, None]).T)
    spread = (inside * torch.stack([part.spread for part in parts]).double()).sum()
    directions, deviations, _ = torch.linalg.svd(torch.cat(stacked, dim=1), full_matrices=False)
    size, rank = parts[0].factors.shape
    kept = min(rank, len(deviations))
    rest = deviations[kept:].square().sum() / max(size - kept, 1)
    factors = torch.zeros(size, rank, dtype=torch.float64)
    factors[:, :kept] = directions[:, :kept] * (deviations[:kept].square() - rest).clamp_min(0).sqrt()
    return ClassStatistics(
        images=total, mean=mean.float(), factors=factors.float(), spread=(spread + rest).float()
    )
