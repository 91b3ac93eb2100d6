"""A score says how little an image looks like any known class, and its threshold keeps the stated rate."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from sdlora.calibration import LeftOut, left_out_logits, tempered
from sdlora.false_alarms import Margin, alarm_threshold, quantile
from sdlora.head import HeadBlock, block_logits
from sdlora.heads import HEADS, distance_form, own_part
from sdlora.statistics import ClassStatistics, class_statistics
from sdlora.unknown import SCORES, Quadratic, Rejection, UnknownScore, squared_distance

SIZE, SHRINKAGE = 12, 0.05


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, classes: range, each: int) -> tuple[Tensor, Tensor]:
    """Features of classes that differ in their covariances, and labels. A class is the same for every seed."""
    labels = torch.arange(len(classes)).repeat_interleave(each)
    parts = []
    for label in classes:
        own = generator(100 + label)
        centre, mixing = 2 * torch.randn(SIZE, generator=own), torch.randn(SIZE, SIZE, generator=own) / 3
        noise = torch.randn(each, SIZE, generator=generator(1000 * seed + label))
        parts.append(centre + noise @ (mixing + torch.eye(SIZE)))
    return torch.cat(parts), labels


def statistics(each: int = 60) -> dict[str, ClassStatistics]:
    """Of a first task of three classes, and of a second one of two that has twice as many images."""
    return {
        "t01": class_statistics(*images(1, range(3), each), rank=SIZE),
        "t02": class_statistics(*images(1, range(3, 5), 2 * each), rank=SIZE),
    }


ROWS = {
    "t01": HeadBlock(torch.zeros(3, SIZE), torch.zeros(3)),
    "t02": HeadBlock(torch.zeros(2, SIZE), torch.zeros(2)),
}


def covariances(of: Mapping[str, ClassStatistics]) -> Tensor:
    """The covariance of each class (classes, d, d)."""
    unit = torch.eye(SIZE, dtype=torch.float64)
    return torch.cat([
        part.factors.double() @ part.factors.double().transpose(1, 2) + part.spread.double()[:, None, None] * unit
        for part in of.values()
    ])  # fmt: skip


def evenly(covariance: Tensor) -> Tensor:
    """A covariance of which a part is spread evenly."""
    unit = torch.eye(SIZE, dtype=torch.float64)
    return (1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / SIZE * unit


def by_definition(name: str, of: Mapping[str, ClassStatistics], features: Tensor) -> Tensor:
    """Squared distances of features (n, d) to each class, (n, classes), by dense matrices."""
    means = torch.cat([part.mean for part in of.values()]).double()
    counts = torch.cat([part.images for part in of.values()]).double()
    own = covariances(of)
    pooled = (own * counts[:, None, None]).sum(0) / counts.sum()
    unit = torch.eye(SIZE, dtype=torch.float64)
    if name == "ncm":
        used = [pooled.trace() / SIZE * unit] * len(means)
    elif name == "lda":
        used = [evenly(pooled)] * len(means)
    else:
        share = own_part(of)
        spread = (counts * torch.cat([part.spread for part in of.values()])).sum() / counts.sum()
        factors = torch.cat([part.factors for part in of.values()]).double()
        even = SHRINKAGE * pooled.trace() / SIZE * unit
        used = [
            (1 - SHRINKAGE) * ((1 - share) * pooled + share * (each @ each.T + spread * unit)) + even
            for each in factors
        ]
    found = []
    for mean, covariance in zip(means, used, strict=True):
        apart = features.double() - mean
        found.append((apart @ torch.linalg.inv(covariance) * apart).sum(1))
    return torch.stack(found, dim=1)


def background(of: Mapping[str, ClassStatistics], features: Tensor) -> Tensor:
    """Squared distances to the Gaussian of all images."""
    means = torch.cat([part.mean for part in of.values()]).double()
    counts = torch.cat([part.images for part in of.values()]).double()
    middle = (means * counts[:, None]).sum(0) / counts.sum()
    apart = (means - middle)[:, :, None] @ (means - middle)[:, None, :]
    whole = ((covariances(of) + apart) * counts[:, None, None]).sum(0) / counts.sum()
    from_middle = features.double() - middle
    return (from_middle @ torch.linalg.inv(evenly(whole)) * from_middle).sum(1)


@pytest.mark.parametrize("name", ["ncm", "lda", "rgda"])
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_distances_are_those_of_their_definition_in_units_of_the_temperature(
    name: str, temperature: float
) -> None:
    of, features = statistics(), images(2, range(7), 5)[0]
    settle, shared = HEADS[name].settle, HEADS[name].shared
    assert settle is not None
    assert shared is not None
    rows = tempered(settle(ROWS, of, generator=generator()), temperature)
    logits = block_logits(rows.values(), features.double())
    nearest = by_definition(name, of, features).min(1).values

    for score, expected in (("mahalanobis", nearest), ("relative", nearest - background(of, features))):
        form = distance_form(shared, of, relative=score == "relative").divided(temperature)
        found = UnknownScore(Rejection(score, 0.0, form))(features.double(), logits)
        torch.testing.assert_close(temperature * found, expected, rtol=1e-4, atol=1e-2)


def test_scores_of_logits_are_those_of_their_definition() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    features = torch.zeros(2, SIZE)

    largest = UnknownScore(Rejection("max_logit", 0.0))(features, logits)
    energy = UnknownScore(Rejection("energy", 0.0))(features, logits)

    assert largest.tolist() == [-3.0, 0.0]
    torch.testing.assert_close(energy, -torch.log(logits.exp().sum(1)))


def test_a_form_about_another_middle_is_the_same_distance() -> None:
    random = generator()
    root, centre, middle = (torch.randn(*shape, generator=random).double() for shape in ((4, 4), (4,), (4,)))
    features = torch.randn(10, 4, generator=random).double()

    found = squared_distance(root @ root.T, centre, middle=middle).of(features)

    torch.testing.assert_close(found, ((features - centre) @ root).square().sum(1))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.51, 3.0), (0.95, 4.0), (0.05, 1.0)])
def test_a_quantile_is_the_least_value_that_the_share_of_the_weight_is_not_above(
    share: float, expected: float
) -> None:
    values, weights = torch.tensor([3.0, 1.0, 4.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])

    assert quantile(values, weights, share) == expected
    assert quantile(values, torch.tensor([1.0, 0.0, 0.0, 1.0]), share) in (2.0, 3.0)


def rejection(
    score: str, *, rate: float, before: Margin, each: int = 60
) -> tuple[Rejection, Margin, Callable]:
    """The rejection of a second task, its margin, and what scores features."""
    head = HEADS["rgda"]
    assert head.settle is not None
    assert head.shared is not None
    of = statistics(each)
    features, labels = images(1, range(3, 5), 2 * each)

    def form(taken: Mapping[str, ClassStatistics]) -> Quadratic | None:
        assert head.shared is not None
        return distance_form(head.shared, taken, relative=True) if score == "relative" else None

    def settled(taken: Mapping[str, ClassStatistics]) -> Mapping:
        assert head.settle is not None
        return head.settle(ROWS, taken, generator=generator())

    out = left_out_logits(
        features,
        labels,
        task="t02",
        statistics=of,
        step_classes={},
        settle=settled,
        generator=generator(),
        form=form,
    )
    rows, own = tempered(settled(of), 3.0), form(of)
    found = alarm_threshold(
        score, rate, out, rows=rows, form=own and own.divided(3.0), statistics=of, temperature=3.0, before=before,
        generator=generator(),
    )  # fmt: skip
    assert found is not None
    module = UnknownScore(found[0])
    return *found, lambda some: module(some, block_logits(rows.values(), some))


@pytest.mark.parametrize("score", SCORES)
def test_images_of_all_known_classes_are_called_unknown_at_about_the_stated_rate(score: str) -> None:
    chosen, _, of = rejection(score, rate=0.1, before=Margin(), each=120)

    alarms = (of(images(5, range(5), 400)[0]) > chosen.threshold).float().split(3 * 400)

    assert all(0.04 < part.mean() < 0.2 for part in alarms), [float(part.mean()) for part in alarms]
    assert (of(images(5, range(5, 12), 100)[0]) > chosen.threshold).float().mean() > alarms[0].mean()


def test_a_margin_of_the_step_before_counts_half_its_images() -> None:
    _, own, _ = rejection("relative", rate=0.1, before=Margin())
    _, both, _ = rejection("relative", rate=0.1, before=Margin(own.value + 10, 480.0))

    assert own.images == 240
    assert both.images == 240 + 240
    assert both.value == pytest.approx(own.value + 5, abs=1e-3)


def test_a_step_of_which_no_image_can_be_left_out_has_the_margin_before_or_no_threshold() -> None:
    of = statistics()
    settle = HEADS["lda"].settle
    assert settle is not None
    rows = settle(ROWS, of, generator=generator())
    none = LeftOut(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), torch.zeros(0))

    def threshold(before: Margin) -> tuple[Rejection, Margin] | None:
        return alarm_threshold(
            "max_logit", 0.05, none, rows=rows, form=None, statistics=of, temperature=1.0, before=before,
            generator=generator(),
        )  # fmt: skip

    assert threshold(Margin()) is None
    low, high = threshold(Margin(0.0, 10.0)), threshold(Margin(2.5, 10.0))
    assert low is not None
    assert high is not None
    assert high[0].threshold - low[0].threshold == pytest.approx(2.5, abs=1e-3)
    assert high[1] == Margin(2.5, 5.0)
