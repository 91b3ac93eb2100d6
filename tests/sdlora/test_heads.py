"""Settled heads are what their statistics say, and the statistics are those of the features."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sdlora.classifier import ModelState
from sdlora.freezing import freeze, recompute_head
from sdlora.head import GrowingHead, HeadBlock, HeadRows, block_logits
from sdlora.heads import (
    HEADS,
    aligned,
    class_means,
    discriminant,
    own_part,
    regularised_discriminant,
    samples,
)
from sdlora.methods import METHODS
from sdlora.statistics import ClassStatistics, class_statistics
from tests.support.tiny_model import learn, make_fit, settings

SIZE = 6


def clouds(seed: int, classes: int, each: int = 200, *, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features of Gaussian classes with random centres; the first coordinate is stretched."""
    random = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, SIZE, generator=random)
    labels = torch.arange(classes).repeat_interleave(each)
    noise = torch.randn(len(labels), SIZE, generator=random)
    noise[:, 0] *= stretch
    return centres[labels] + noise, labels


def zero_rows(classes: int) -> HeadBlock:
    return HeadBlock(weight=torch.zeros(classes, SIZE), bias=torch.zeros(classes))


def logits(blocks: Mapping[str, HeadRows], features: Tensor) -> Tensor:
    return block_logits(blocks.values(), features)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_statistics_are_mean_and_covariance_of_each_class() -> None:
    features, labels = clouds(1, 3)
    found = class_statistics(features, labels, rank=SIZE)

    for label in range(3):
        own = features[labels == label].double()
        covariance = found.factors[label].double() @ found.factors[label].double().T
        covariance += found.spread[label].double() * torch.eye(SIZE)
        torch.testing.assert_close(found.mean[label].double(), own.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(covariance, torch.cov(own.T), rtol=1e-4, atol=1e-5)
    assert found.images.tolist() == [200] * 3


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_smaller_rank_keeps_the_largest_directions_and_the_whole_variance(rank: int) -> None:
    features, labels = clouds(1, 1, stretch=4.0)
    found = class_statistics(features, labels, rank=rank)
    held = found.factors.double().square().sum() + SIZE * found.spread.double().sum()

    assert held.item() == pytest.approx(torch.cov(features.double().T).trace().item(), rel=1e-5)
    if rank:
        assert found.factors[0, 0, 0].abs() > 3.4


def test_a_class_of_one_image_has_a_mean_and_no_spread() -> None:
    found = class_statistics(torch.ones(1, SIZE), torch.zeros(1, dtype=torch.long), rank=3)

    assert torch.equal(found.mean, torch.ones(1, SIZE))
    assert not found.factors.any()
    assert not found.spread.any()
    blocks = class_means({"t01": zero_rows(1)}, {"t01": found}, generator=generator())
    assert blocks["t01"].weight.isfinite().all()


def test_ncm_names_the_nearest_mean() -> None:
    parts = {"t01": clouds(1, 3), "t02": clouds(2, 4)}
    statistics = {task: class_statistics(*part, rank=0) for task, part in parts.items()}
    blocks = class_means({"t01": zero_rows(3), "t02": zero_rows(4)}, statistics, generator=generator())
    features = torch.cat([features for features, _ in parts.values()])
    means = torch.cat([s.mean for s in statistics.values()])

    assert torch.equal(logits(blocks, features).argmax(1), torch.cdist(features, means).argmin(1))


def test_lda_names_the_class_of_the_nearest_mean_in_mahalanobis_distance() -> None:
    features, labels = clouds(3, 5, stretch=5.0)
    statistics = {"t01": class_statistics(features, labels, rank=SIZE)}
    found = logits(discriminant({"t01": zero_rows(5)}, statistics, generator=generator()), features)
    means = statistics["t01"].mean.double()
    centred = torch.cat([features[labels == c].double() - means[c] for c in range(5)])
    pooled = centred.T @ centred / (len(centred) - 5)
    pooled = 0.95 * pooled + 0.05 * pooled.trace() / SIZE * torch.eye(SIZE)
    gaps = features.double()[:, None] - means
    distances = torch.einsum("nci,ij,ncj->nc", gaps, torch.linalg.inv(pooled), gaps)

    assert torch.equal(found.argmax(1), distances.argmin(1))
    plain = logits(class_means({"t01": zero_rows(5)}, statistics, generator=generator()), features)
    assert (found.argmax(1) == labels).sum() > (plain.argmax(1) == labels).sum()


def double_rows(classes: int) -> HeadBlock:
    return HeadBlock(*(part.double() for part in zero_rows(classes)))


def two_tasks(rank: int = 3) -> dict[str, ClassStatistics]:
    """Statistics of two tasks whose classes scatter differently, of different numbers of images."""
    return {
        "t01": class_statistics(*clouds(1, 3, each=40, stretch=4.0), rank=rank),
        "t02": class_statistics(*clouds(2, 4, each=25), rank=rank),
    }


def dense_logits(statistics: Mapping[str, ClassStatistics], features: Tensor, own: float) -> Tensor:
    """The logits of `rgda` by inverting each class's matrix."""
    images, means, factors, spreads = (
        torch.cat([getattr(each, field) for each in statistics.values()]).double()
        for field in ("images", "mean", "factors", "spread")
    )
    share, unit = images / images.sum(), torch.eye(SIZE, dtype=torch.float64)
    spread = (share * spreads).sum()
    outer = factors @ factors.transpose(1, 2)
    pooled = (share[:, None, None] * outer).sum(0) + spread * unit
    found = []
    for mean, mine in zip(means, outer, strict=True):
        matrix = 0.95 * ((1 - own) * pooled + own * (mine + spread * unit))
        matrix += 0.05 * pooled.trace() / SIZE * unit
        gaps = features - mean
        found.append(-torch.einsum("ni,ij,nj->n", gaps, torch.linalg.inv(matrix), gaps) / 2)
    return torch.stack(found, dim=1)


def gaps_between(found: Tensor) -> Tensor:
    """Logits without what all classes share."""
    return found - found.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("own", [None, 0.0, 0.3, 1.0])
def test_rgda_is_the_gaussian_discriminant_of_each_classs_own_matrix(own: float | None) -> None:
    statistics = two_tasks()
    features = torch.cat([clouds(1, 3)[0], clouds(2, 4)[0]]).double()
    rows = {"t01": double_rows(3), "t02": double_rows(4)}
    blocks = regularised_discriminant(rows, statistics, generator=generator(), own=own)
    part = own_part(statistics) if own is None else own

    assert part > 0.1 or own == 0
    torch.testing.assert_close(
        gaps_between(logits(blocks, features)),
        gaps_between(dense_logits(statistics, features, part)),
        rtol=1e-9,
        atol=1e-9,
    )


def test_rgda_with_nothing_of_a_class_of_its_own_is_lda() -> None:
    statistics, rows = two_tasks(), {"t01": double_rows(3), "t02": double_rows(4)}
    features = clouds(5, 4)[0].double()
    plain = logits(discriminant(rows, statistics, generator=generator()), features)
    found = logits(regularised_discriminant(rows, statistics, generator=generator(), own=0.0), features)

    torch.testing.assert_close(gaps_between(found), gaps_between(plain), rtol=1e-9, atol=1e-9)
    assert torch.equal(found.argmax(1), plain.argmax(1))


def test_rgda_of_round_classes_is_ncm() -> None:
    statistics, rows = two_tasks(rank=0), {"t01": double_rows(3), "t02": double_rows(4)}
    features = clouds(5, 4)[0].double()
    plain = logits(class_means(rows, statistics, generator=generator()), features)
    found = logits(regularised_discriminant(rows, statistics, generator=generator(), own=1.0), features)

    torch.testing.assert_close(gaps_between(found), gaps_between(plain), rtol=1e-9, atol=1e-9)


def test_rgda_of_tasks_in_another_order_has_the_same_logits_in_that_order() -> None:
    statistics, rows = two_tasks(), {"t01": double_rows(3), "t02": double_rows(4)}
    features = clouds(5, 4)[0].double()
    found = logits(regularised_discriminant(rows, statistics, generator=generator()), features)
    turned = {task: statistics[task] for task in ("t02", "t01")}
    other = logits(regularised_discriminant(rows, turned, generator=generator()), features)

    torch.testing.assert_close(torch.cat([other[:, 4:], other[:, :4]], dim=1), found, rtol=1e-9, atol=1e-9)


def test_rgda_tells_classes_apart_that_differ_in_their_scatter_alone() -> None:
    random = torch.Generator().manual_seed(7)
    labels = torch.arange(2).repeat_interleave(400)
    features = torch.randn(800, SIZE, generator=random)
    features[:400, 0] *= 6
    features[400:, 1] *= 6
    statistics = {"t01": class_statistics(features, labels, rank=2)}

    def right(name: str) -> float:
        settle = HEADS[name].settle
        assert settle is not None
        found = logits(settle({"t01": zero_rows(2)}, statistics, generator=generator()), features)
        return float((found.argmax(1) == labels).double().mean())

    assert right("rgda") > 0.8
    assert right("lda") < 0.6


@pytest.mark.parametrize("each", [8, 1000])
def test_classes_of_one_scatter_have_hardly_anything_of_their_own(each: int) -> None:
    assert own_part({"t01": class_statistics(*clouds(1, 20, each=each, stretch=3.0), rank=SIZE)}) < 0.1


def test_classes_of_different_scatter_have_more_of_their_own_the_more_images_they_have() -> None:
    parts = []
    for each in (4, 20, 1000):
        labels = torch.arange(SIZE).repeat_interleave(each)
        features = torch.randn(len(labels), SIZE, generator=torch.Generator().manual_seed(1))
        features[torch.arange(len(labels)), labels] *= 4
        parts.append(own_part({"t01": class_statistics(features, labels, rank=SIZE)}))

    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(0.3, abs=0.01)


def test_a_growing_head_computes_quadratic_blocks_beside_linear_ones() -> None:
    statistics = two_tasks()
    blocks: dict[str, HeadRows] = {
        **regularised_discriminant(
            {"t01": zero_rows(3), "t02": zero_rows(4)}, statistics, generator=generator()
        ),
        "t03": HeadBlock(torch.ones(2, SIZE), torch.ones(2)),
    }
    head, features = GrowingHead(), clouds(5, 4)[0]
    for block in blocks.values():
        head.grow(block)

    torch.testing.assert_close(head(features), logits(blocks, features))
    torch.testing.assert_close(head.newest(features), features.sum(1, keepdim=True).expand(-1, 2) + 1)
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_aligned_rows_make_the_logits_of_two_tasks_comparable() -> None:
    parts = {"t01": clouds(1, 3), "t02": clouds(2, 3)}
    statistics = {task: class_statistics(*part, rank=3) for task, part in parts.items()}
    # Each block is right among its own classes, and the second shouts the first down.
    rows = {
        task: class_means({task: zero_rows(3)}, {task: s}, generator=generator())[task]
        for task, s in statistics.items()
    }
    rows["t02"] = HeadBlock(weight=rows["t02"].weight, bias=rows["t02"].bias + 10)
    features = torch.cat([features for features, _ in parts.values()])
    labels = torch.cat([parts["t01"][1], parts["t02"][1] + 3])

    def right(blocks: dict[str, HeadBlock]) -> float:
        return (logits(blocks, features).argmax(1) == labels).double().mean().item()

    assert right(rows) < 0.8
    assert right(aligned(rows, statistics, generator=generator())) > 0.9


def test_aligned_takes_as_many_steps_for_many_classes_as_for_a_hundred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []
    entropy = torch.nn.functional.cross_entropy

    def counted(found: Tensor, labels: Tensor) -> Tensor:
        batches.append(len(labels))
        return entropy(found, labels)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", counted)
    for classes in (50, 300):
        blank = ClassStatistics(
            torch.full((classes,), 5),
            torch.randn(classes, 2),
            torch.zeros(classes, 2, 0),
            torch.ones(classes),
        )
        rows = {task: HeadBlock(torch.zeros(classes, 2), torch.zeros(classes)) for task in ("t01", "t02")}
        batches.clear()
        aligned(rows, dict.fromkeys(rows, blank), generator=generator())
        assert 950 <= len(batches) <= 1050


def test_aligned_rows_depend_on_the_generator_alone() -> None:
    statistics = {task: class_statistics(*clouds(i, 2), rank=2) for i, task in enumerate(("t01", "t02"))}
    rows = {task: zero_rows(2) for task in statistics}
    first, second = (aligned(rows, statistics, generator=generator()) for _ in range(2))

    assert all(torch.equal(first[task].weight, second[task].weight) for task in rows)


def test_samples_have_the_mean_and_covariance_of_the_class() -> None:
    statistics = class_statistics(*clouds(1, 1, stretch=3.0), rank=2)
    drawn = torch.cat(
        [samples(statistics, 256, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    )
    covariance = statistics.factors[0] @ statistics.factors[0].T + statistics.spread[0] * torch.eye(SIZE)

    torch.testing.assert_close(drawn.mean(0), statistics.mean[0], rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("name", ["ncm", "lda", "rgda"])
@pytest.mark.parametrize("each", [1, 2, 20])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-3])
def test_logits_of_single_or_flat_images_are_bounded_and_name_the_nearest_mean(
    name: str, each: int, noise: float
) -> None:
    random = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(4, SIZE, generator=random)
    labels = torch.arange(4).repeat_interleave(each)
    features = centres[labels] + noise * torch.randn(4 * each, SIZE, generator=random)
    parts = {"t01": labels < 1, "t02": labels >= 1}
    statistics = {
        task: class_statistics(features[mine], labels[mine] - labels[mine].min(), rank=2)
        for task, mine in parts.items()
    }
    settle = HEADS[name].settle
    assert settle is not None
    found = logits(
        settle({"t01": zero_rows(1), "t02": zero_rows(3)}, statistics, generator=generator()), features
    )

    assert torch.equal(found.argmax(1), labels)
    assert found.abs().max() < 1e4


@pytest.mark.parametrize("name", HEADS)
def test_settling_keeps_trained_rows_and_directions(name: str) -> None:
    before = learn(1)
    fit = make_fit(before, 2)
    for _ in fit.run():
        pass
    step = freeze(before, fit.result(), method=METHODS["sdlora"], settings=settings()).learned
    random = torch.Generator().manual_seed(0)
    drawn = {True: torch.randn(24, 16, generator=random), False: torch.randn(24, 16, generator=random)}
    labels = torch.arange(2).repeat_interleave(12)
    chain = ModelState()
    for task, learned in (("t01", before), ("t02", step)):
        chain = recompute_head(
            chain,
            learned,
            task=task,
            labels=labels,
            features=lambda which: drawn[which.directions is step.directions],
            head=HEADS[name],
            covariance_rank=3,
            generator=generator(),
        )

    assert chain.directions is step.directions
    assert all(torch.equal(chain.head[task].weight, step.head[task].weight) for task in step.head)
    assert list(chain.settled) == ([] if name == "linear" else ["t01", "t02"])
    assert list(chain.statistics) == list(chain.settled)
    assert chain.rows.keys() == {"t01", "t02"}
