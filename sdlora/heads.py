"""What becomes of the head when a step is frozen: kept as trained, or settled anew from statistics of the classes.

The rows of different steps were trained apart, each against the classes of its own task, so their logits are not
comparable. Each head but `linear` replaces all rows, old ones included, by rows that are: what it needs is a few
statistics per class, never an image. The result is linear, but for `rgda`, which adds half a sum of squares.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sdlora.head import HeadBlock, HeadRows, QuadraticBlock
from sdlora.statistics import ClassStatistics
from sdlora.unknown import Quadratic, difference, squared_distance

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
"""Of `lda` and `rgda`: the part of the covariance that is spread evenly, against classes with few images."""
_LARGEST_PART = 0.3
"""Of `rgda`: m where nothing of how classes differ is chance (docs/explanation/method.md)."""
_LEAST = 0.01
"""Of `ncm`, `lda` and `rgda`: the least variance of a feature, as a share of the mean square of the classes' means.
Single or flat images have less, down to rounding, and logits, which are divided by it, would have no bound."""

_CLASSES = 2**10
"""Classes whose principal directions are in double precision at a time."""


class _Settle(Protocol):
    """All rows anew, task id → block, from the trained ones and the statistics of every class so far."""

    def __call__(
        self,
        head: Mapping[str, HeadRows],
        statistics: Mapping[str, ClassStatistics],
        *,
        generator: torch.Generator,
    ) -> Mapping[str, HeadRows]: ...


@dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of head."""

    settle: _Settle | None
    """None where the rows stay as they were trained."""
    covariance: bool = False
    """Whether it reads more of the classes than their means and one variance."""
    shared: Callable[[Mapping[str, ClassStatistics]], tuple[Tensor, Tensor]] | None = None
    """What all classes share of their squared distances, beside which their logits are minus half of these: a matrix P
    (d, d) and a centre c (d,) of (f − c)ᵀ P (f − c). None where the logits are no distances."""


def class_means(
    head: Mapping[str, HeadRows], statistics: Mapping[str, ClassStatistics], *, generator: torch.Generator
) -> dict[str, HeadBlock]:
    """Return rows of the nearest class mean: logits −‖f − μ_c‖² / 2σ², σ² the mean variance.

    It is Bayes' rule for classes that are round and equally wide: w_c = μ_c/σ², b_c = −‖μ_c‖²/2σ². A term that all
    classes share is left out.
    """
    variance = _mean_variance(statistics)
    blocks = {}
    for task, (_, mean, _, _) in statistics.items():
        weight = mean.double() / variance
        blocks[task] = _block(weight, -(weight * mean).sum(dim=1) / 2, like=head[task])
    return blocks


def _mean_variance(statistics: Mapping[str, ClassStatistics]) -> Tensor:
    """Return the mean variance of a feature within the classes, a scalar float64."""
    variance = torch.cat([_variances(s) * s.images.double() for s in statistics.values()]).sum()
    variance = variance / torch.cat([s.images for s in statistics.values()]).sum()
    return torch.maximum(variance, _least_variance(statistics))


def _shared_by_means(statistics: Mapping[str, ClassStatistics]) -> tuple[Tensor, Tensor]:
    size = next(iter(statistics.values())).mean.shape[1]
    unit = torch.eye(size, dtype=torch.float64)
    return unit / _mean_variance(statistics), torch.zeros(size, dtype=torch.float64)


def discriminant(
    head: Mapping[str, HeadRows], statistics: Mapping[str, ClassStatistics], *, generator: torch.Generator
) -> dict[str, HeadBlock]:
    """Linear discriminant analysis: Bayes' rule for Gaussian classes that share their covariance C.

    w_c = C⁻¹μ_c, b_c = −μ_cᵀC⁻¹μ_c / 2, with C the mean of the classes' covariances by their number of images.
    """
    inverse = _precision(_pooled_covariance(statistics), statistics)
    blocks = {}
    for task, (_, mean, _, _) in statistics.items():
        weight = mean.double() @ inverse
        blocks[task] = _block(weight, -(weight * mean).sum(dim=1) / 2, like=head[task])
    return blocks


def _shared_by_discriminant(statistics: Mapping[str, ClassStatistics]) -> tuple[Tensor, Tensor]:
    inverse = _precision(_pooled_covariance(statistics), statistics)
    return inverse, torch.zeros(len(inverse), dtype=torch.float64)


def _precision(covariance: Tensor, statistics: Mapping[str, ClassStatistics]) -> Tensor:
    """Return the inverse of a covariance (d, d) of which a part is spread evenly."""
    size = len(covariance)
    unit = torch.eye(size, dtype=torch.float64)
    whole = covariance + unit * (_least_variance(statistics) - covariance.trace() / size).clamp_min(0)
    return torch.linalg.inv((1 - _SHRINKAGE) * whole + _SHRINKAGE * unit * (whole.trace() / size))


def _pooled_covariance(statistics: Mapping[str, ClassStatistics]) -> Tensor:
    """Return the mean of the classes' covariances by their number of images, (d, d) float64."""
    size = next(iter(statistics.values())).mean.shape[1]
    total = torch.zeros(size, size, dtype=torch.float64)
    images = 0.0
    for count, _, factors, spread in statistics.values():
        for some, images_of in zip(factors.split(_CLASSES), count.split(_CLASSES), strict=True):
            scaled = some.double() * images_of.double().sqrt()[:, None, None]
            total += torch.einsum("cik,cjk->ij", scaled, scaled)
        total += torch.eye(size, dtype=torch.float64) * (count.double() * spread.double()).sum()
        images += float(count.sum())
    return total / images


def regularised_discriminant(
    head: Mapping[str, HeadRows],
    statistics: Mapping[str, ClassStatistics],
    *,
    generator: torch.Generator,
    own: float | None = None,
) -> dict[str, QuadraticBlock]:
    """Return a regularised Gaussian discriminant: each class is measured by its own covariance, in part.

    Its logits are −½ (f − μ_c)ᵀ K_c⁻¹ (f − μ_c) without log-determinant, up to a term that all classes share, with
    K_c = (1 − e)[(1 − m) S + m (U_c U_cᵀ + s I)] + e (tr S / d) I, S the pooled covariance, s the pooled spread and
    e the shrinkage. As s and the trace are pooled, K_c differs from one matrix A by U_c alone, and fᵀA⁻¹f is common:
    by Woodbury the rest is linear plus ½ ‖P_c f − P_c μ_c‖². Source: LR-RGDA (arXiv 2602.00144).

    Args:
        own: m, the part of a class's own covariance; 0 is `discriminant`. None for `own_part`.
    """
    share = own_part(statistics) if own is None else own
    inverse, middle = _shared_by_regularised(statistics, own=share)
    blocks = {}
    for task, (_, mean, factors, _) in statistics.items():
        means, like = mean.double(), head[task]
        weight = (means - middle) @ inverse
        bias = (middle @ inverse @ middle - ((means @ inverse) * means).sum(dim=1)) / 2
        products, offsets = [], []
        for some, centres in zip(factors.split(_CLASSES), means.split(_CLASSES), strict=True):
            found = _own_products(((1 - _SHRINKAGE) * share) ** 0.5 * some.double(), inverse)
            products.append(found.to(like.weight.dtype))
            offsets.append((found @ centres[:, :, None])[:, :, 0].to(like.bias.dtype))
        blocks[task] = QuadraticBlock(
            *_block(weight, bias, like=like), products=torch.cat(products), offsets=torch.cat(offsets)
        )
    return blocks


def _shared_by_regularised(
    statistics: Mapping[str, ClassStatistics], *, own: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return A⁻¹, and the middle of the classes: logits are smaller there, and float32 exacter."""
    share = own_part(statistics) if own is None else own
    pooled, spread = _pooled_covariance(statistics), _pooled_spread(statistics)
    size = len(pooled)
    unit = torch.eye(size, dtype=torch.float64)
    lacking = (_least_variance(statistics) - pooled.trace() / size).clamp_min(0)
    pooled, spread = pooled + unit * lacking, spread + lacking
    even = (1 - _SHRINKAGE) * share * spread + _SHRINKAGE * pooled.trace() / size
    inverse = torch.linalg.inv((1 - _SHRINKAGE) * (1 - share) * pooled + even * unit)
    return inverse, torch.cat([each.mean for each in statistics.values()]).double().mean(dim=0)


def _own_products(factors: Tensor, inverse: Tensor) -> Tensor:
    """Return P (classes, k, d) with PᵀP = A⁻¹ − (A + V Vᵀ)⁻¹ for V (classes, d, k) and A⁻¹ (d, d)."""
    through = inverse @ factors
    inner = factors.transpose(1, 2) @ through + torch.eye(factors.shape[2], dtype=factors.dtype)
    lower = torch.linalg.cholesky(inner)
    return torch.linalg.solve_triangular(lower, through.transpose(1, 2), upper=False)


def _pooled_spread(statistics: Mapping[str, ClassStatistics]) -> Tensor:
    """Return the mean of the classes' spreads by their number of images, a scalar float64."""
    count = torch.cat([each.images for each in statistics.values()]).double()
    spread = torch.cat([each.spread for each in statistics.values()]).double()
    return (count * spread).sum() / count.sum()


def own_part(statistics: Mapping[str, ClassStatistics]) -> float:
    """Return m of `rgda`: 0.3 of the share of how classes' covariances differ that is not chance.

    Of n images drawn from one covariance S, theirs differs from it by (‖S‖² + (tr S)²) / (n − 1) in the mean square.
    What is beyond is real. Classes of few images, or of much the same scatter, are measured by what they share.
    """
    pooled = _pooled_covariance(statistics)
    whole, trace = pooled.square().sum(), pooled.trace()
    count = torch.cat([each.images for each in statistics.values()]).double()
    apart = torch.cat([_distances(each, pooled) for each in statistics.values()])
    differ = (count * apart).sum() * len(count) / max(len(count) - 1, 1)
    chance = (count / (count - 1).clamp_min(1)).sum() * (whole + trace.square())
    return _LARGEST_PART * float((1 - chance / differ).clamp_min(0)) if differ > 0 else 0.0


def _distances(statistics: ClassStatistics, pooled: Tensor) -> Tensor:
    """Return the squared distance of each class's covariance from the pooled one (classes,) float64."""
    size, found = len(pooled), []
    for some, spread in zip(
        statistics.factors.split(_CLASSES), statistics.spread.double().split(_CLASSES), strict=True
    ):
        factors = some.double()
        grams = factors.transpose(1, 2) @ factors
        own = grams.square().sum(dim=(1, 2)) + 2 * spread * grams.diagonal(dim1=1, dim2=2).sum(dim=1)
        common = (factors * (pooled @ factors)).sum(dim=(1, 2)) + spread * pooled.trace()
        found.append(own + size * spread.square() - 2 * common + pooled.square().sum())
    return torch.cat(found)


def aligned(
    head: Mapping[str, HeadRows], statistics: Mapping[str, ClassStatistics], *, generator: torch.Generator
) -> dict[str, HeadBlock]:
    """Train all rows on from where they are, on samples of every class's Gaussian (Zhang et al., ICCV 2023, SLCA).

    Features are drawn from N(mean, factors·factorsᵀ + spread·I), new ones in every epoch, the same number of every
    class; plain cross-entropy over all classes. With a single task the rows were trained together already and stay.
    """
    if len(statistics) < 2:
        return {task: HeadBlock(block.weight, block.bias) for task, block in head.items()}
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


def _block(weight: Tensor, bias: Tensor, *, like: HeadRows) -> HeadBlock:
    return HeadBlock(weight=weight.to(like.weight.dtype), bias=bias.to(like.bias.dtype))


HEADS = {
    "linear": Head(settle=None),
    "ncm": Head(settle=class_means, shared=_shared_by_means),
    "lda": Head(settle=discriminant, covariance=True, shared=_shared_by_discriminant),
    "rgda": Head(settle=regularised_discriminant, covariance=True, shared=_shared_by_regularised),
    "aligned": Head(settle=aligned, covariance=True),
}
"""The kinds of head by name."""
LINEAR_FALLBACK = "lda"
"""The head that stands in where a format can hold no other than linear rows."""


def distance_form(
    shared: Callable[[Mapping[str, ClassStatistics]], tuple[Tensor, Tensor]],
    statistics: Mapping[str, ClassStatistics],
    *,
    relative: bool,
) -> Quadratic:
    """Return the form that a score by distance is read with, in double precision.

    Args:
        shared: that of a head.
        relative: whether the squared distance to all classes as one Gaussian is taken off: its mean is that of all
            images, its covariance what is within the classes and between them.
    """
    counts = torch.cat([each.images for each in statistics.values()]).double()
    means = torch.cat([each.mean for each in statistics.values()]).double()
    middle = counts @ means / counts.sum()
    own = squared_distance(*shared(statistics), middle=middle)
    if not relative:
        return own
    apart = (means - middle) * (counts / counts.sum()).sqrt()[:, None]
    whole = _pooled_covariance(statistics) + apart.T @ apart
    return difference(own, squared_distance(_precision(whole, statistics), middle, middle=middle))


def linear_rows(
    head: Mapping[str, HeadBlock], statistics: Mapping[str, ClassStatistics]
) -> dict[str, HeadBlock]:
    """Return the rows of `LINEAR_FALLBACK`."""
    return discriminant(head, statistics, generator=torch.Generator())
