"""What becomes of the head when a step is frozen: kept as trained, or settled anew from statistics of the classes.

The rows of different steps were trained apart, each against the classes of its own task, so their logits are not
comparable. Each head but `linear` replaces all rows, old ones included, by rows that are: what it needs is a few
statistics per class, never an image. The result is a linear head in every case, so nothing else knows of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sdlora.head import HeadBlock
from sdlora.statistics import ClassStatistics

_SAMPLES, _EPOCHS, _BATCH = 256, 10, 256
"""Of `aligned`: drawn per class and epoch, passes, samples in a step (SLCA, GengDavid/SLCA@169d4e6, with 5 passes)."""
_STEPS, _MOST_STEPS = 500, 1000
"""Of `aligned`: at least so many steps, because ten passes over a few classes are too few. At most about so many:
beyond 100 classes fewer samples are drawn of each. The rows go on from those of the step before, so a chain makes up
for it (docs/explanation/method.md)."""
_RATE, _DECAY = 0.005, 5e-4
"""Of `aligned`: Adam's rate, cosine to 0, and its decoupled weight decay. SLCA's SGD is too slow for so few passes: it
leaves accuracy behind on held-out images (docs/explanation/method.md)."""
_SHRINKAGE = 0.05
"""Of `lda`: the part of the pooled covariance that is spread evenly, against classes with few images."""
_LEAST = 0.01
"""Of `ncm` and `lda`: the least variance of a feature, as a share of the mean square of the classes' means. Single or
flat images have less, down to rounding, and logits, which are divided by it, would have no bound."""

_CLASSES = 2**10
"""Classes whose principal directions are in double precision at a time."""


class _Settle(Protocol):
    """All rows anew, task id → block, from the trained ones and the statistics of every class so far."""

    def __call__(
        self,
        head: Mapping[str, HeadBlock],
        statistics: Mapping[str, ClassStatistics],
        *,
        generator: torch.Generator,
    ) -> dict[str, HeadBlock]: ...


@dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of head."""

    settle: _Settle | None
    """None where the rows stay as they were trained."""
    covariance: bool = False
    """Whether it reads more of the classes than their means and one variance."""


def class_means(
    head: Mapping[str, HeadBlock], statistics: Mapping[str, ClassStatistics], *, generator: torch.Generator
) -> dict[str, HeadBlock]:
    """Return rows of the nearest class mean: logits −‖f − μ_c‖² / 2σ², σ² the mean variance.

    It is Bayes' rule for classes that are round and equally wide: w_c = μ_c/σ², b_c = −‖μ_c‖²/2σ². A term that all
    classes share is left out.
    """
    variance = torch.cat([_variances(s) * s.images.double() for s in statistics.values()]).sum()
    variance = variance / torch.cat([s.images for s in statistics.values()]).sum()
    variance = torch.maximum(variance, _least_variance(statistics))
    blocks = {}
    for task, (_, mean, _, _) in statistics.items():
        weight = mean.double() / variance
        blocks[task] = _block(weight, -(weight * mean).sum(dim=1) / 2, like=head[task])
    return blocks


def discriminant(
    head: Mapping[str, HeadBlock], statistics: Mapping[str, ClassStatistics], *, generator: torch.Generator
) -> dict[str, HeadBlock]:
    """Linear discriminant analysis: Bayes' rule for Gaussian classes that share their covariance C.

    w_c = C⁻¹μ_c, b_c = −μ_cᵀC⁻¹μ_c / 2, with C the mean of the classes' covariances by their number of images.
    """
    size = next(iter(statistics.values())).mean.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64)
    images = 0.0
    for count, _, factors, spread in statistics.values():
        for some, images_of in zip(factors.split(_CLASSES), count.split(_CLASSES), strict=True):
            scaled = some.double() * images_of.double().sqrt()[:, None, None]
            total += torch.einsum("cik,cjk->ij", scaled, scaled)
        total += torch.eye(size, dtype=torch.float64) * (count.double() * spread.double()).sum()
        images += float(count.sum())
    pooled, unit = total / images, torch.eye(size, dtype=torch.float64)
    pooled += unit * (_least_variance(statistics) - pooled.trace() / size).clamp_min(0)
    inverse = torch.linalg.inv((1 - _SHRINKAGE) * pooled + _SHRINKAGE * unit * (pooled.trace() / size))
    blocks = {}
    for task, (_, mean, _, _) in statistics.items():
        weight = mean.double() @ inverse
        blocks[task] = _block(weight, -(weight * mean).sum(dim=1) / 2, like=head[task])
    return blocks


def aligned(
    head: Mapping[str, HeadBlock], statistics: Mapping[str, ClassStatistics], *, generator: torch.Generator
) -> dict[str, HeadBlock]:
    """Train all rows on from where they are, on samples of every class's Gaussian (Zhang et al., ICCV 2023, SLCA).

    Features are drawn from N(mean, factors·factorsᵀ + spread·I), new ones in every epoch, the same number of every
    class; plain cross-entropy over all classes. With a single task the rows were trained together already and stay.
    """
    if len(statistics) < 2:
        return dict(head)
    counts = [len(block.bias) for block in head.values()]
    classes = sum(counts)
    with torch.enable_grad():
        weight = torch.cat([block.weight for block in head.values()]).clone().requires_grad_()
        bias = torch.cat([block.bias for block in head.values()]).clone().requires_grad_()
        optimizer = torch.optim.AdamW([weight, bias], lr=_RATE, weight_decay=_DECAY)
        drawn_of_each = min(_SAMPLES, max(1, _MOST_STEPS * _BATCH // (_EPOCHS * classes)))
        labels = torch.arange(classes).repeat_interleave(drawn_of_each)
        each = math.ceil(len(labels) / _BATCH)
        epochs = max(_EPOCHS, math.ceil(_STEPS / each))
        steps, step = epochs * each, 0
        for _ in range(epochs):
            drawn = torch.cat([samples(s, drawn_of_each, generator=generator) for s in statistics.values()])
            for chosen in torch.randperm(len(labels), generator=generator).split(_BATCH):
                for group in optimizer.param_groups:
                    group["lr"] = _RATE * (1 + math.cos(math.pi * step / steps)) / 2
                batch = drawn[chosen].to(weight.dtype)
                loss = nn.functional.cross_entropy(batch @ weight.T + bias, labels[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
    blocks = zip(weight.detach().split(counts), bias.detach().split(counts), strict=True)
    return {
        task: HeadBlock(weight=rows.clone(), bias=offsets.clone())
        for task, (rows, offsets) in zip(head, blocks, strict=True)
    }


def samples(statistics: ClassStatistics, each: int, *, generator: torch.Generator) -> Tensor:
    """Return `each` features of every class (classes · each, d), class by class, from its Gaussian."""
    classes, size, rank = statistics.factors.shape
    inside = torch.randn(classes, each, rank, generator=generator)
    around = torch.randn(classes, each, size, generator=generator)
    drawn = statistics.mean[:, None] + inside @ statistics.factors.transpose(1, 2)
    return (drawn + around * statistics.spread.sqrt()[:, None, None]).reshape(-1, size)


def _least_variance(statistics: Mapping[str, ClassStatistics]) -> Tensor:
    """Return the least variance of a feature that is believed, a scalar. Of means that are all 0 any will do."""
    square = torch.cat([s.mean for s in statistics.values()]).double().square().mean()
    return _LEAST * square if square > 0 else torch.ones_like(square)


def _variances(statistics: ClassStatistics) -> Tensor:
    """Return the mean variance of a feature, per class (classes,) float64."""
    size = statistics.mean.shape[1]
    squares = [some.double().square().sum(dim=(1, 2)) for some in statistics.factors.split(_CLASSES)]
    return statistics.spread.double() + torch.cat(squares) / size


def _block(weight: Tensor, bias: Tensor, *, like: HeadBlock) -> HeadBlock:
    return HeadBlock(weight=weight.to(like.weight.dtype), bias=bias.to(like.bias.dtype))


HEADS = {
    "linear": Head(settle=None),
    "ncm": Head(settle=class_means),
    "lda": Head(settle=discriminant, covariance=True),
    "aligned": Head(settle=aligned, covariance=True),
}
"""The kinds of head by name."""
