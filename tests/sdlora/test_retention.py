"""What a step's drift costs earlier classes is estimated without their images, and near what it costs in truth."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdlora.classifier import ModelState
from sdlora.freezing import FrozenStep, recompute_head, settled
from sdlora.head import HeadBlock
from sdlora.heads import HEADS
from sdlora.retention import Retention, estimated_retention
from tests.support.tiny_model import learn

SIZE, EACH = 24, 60


def features(classes: int, *, seed: int, apart: float = 6.0) -> tuple[Tensor, Tensor]:
    """Features (n, d) of round classes whose means are so far apart, and labels."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, SIZE, generator=generator) * apart / (2 * SIZE) ** 0.5
    labels = torch.arange(classes).repeat_interleave(EACH)
    return means[labels] + torch.randn(len(labels), SIZE, generator=generator), labels


def moved(found: Tensor, labels: Tensor, *, by: float, seed: int) -> Tensor:
    """The features after each class went its own way."""
    way = torch.randn(int(labels.max()) + 1, SIZE, generator=torch.Generator().manual_seed(seed))
    return found + by * torch.nn.functional.normalize(way)[labels]


def two_steps(
    first: tuple[Tensor, Tensor], old: Tensor, new: Tensor, labels: Tensor
) -> tuple[ModelState, ModelState]:
    """What a step left that learned the first classes, and the next one, which moved `old` to `new`."""
    rows = HeadBlock(torch.zeros(int(first[1].max()) + 1, SIZE), torch.zeros(int(first[1].max()) + 1))
    options = {"head": HEADS["lda"], "covariance_rank": 8, "generator": torch.Generator()}
    before = recompute_head(
        ModelState(), ModelState(head={"t01": rows}), task="t01", labels=first[1],
        features=lambda learned: first[0], **options,
    )  # fmt: skip
    fitted = HeadBlock(torch.zeros(int(labels.max()) + 1, SIZE), torch.zeros(int(labels.max()) + 1))
    learned = replace(before, head={**before.head, "t02": fitted}, directions={"t02": {}})
    after = recompute_head(
        before, learned, task="t02", labels=labels,
        features=lambda which: new if which is learned else old, **options,
    )  # fmt: skip
    return before, after


def estimate(before: ModelState, after: ModelState, old: Tensor, new: Tensor, labels: Tensor) -> Retention:
    generator = torch.Generator().manual_seed(3)
    return estimated_retention(
        before, after, task="t02", old=old, new=new, labels=labels, generator=generator
    )


def right(learned: ModelState, found: Tensor, labels: Tensor) -> float:
    weight = torch.cat([block.weight for block in learned.settled.values()])
    bias = torch.cat([block.bias for block in learned.settled.values()])
    return float(((found @ weight.T + bias).argmax(dim=1) == labels).double().mean())


def test_a_shift_of_all_features_alike_loses_nothing() -> None:
    first, (old, labels) = features(10, seed=0), features(10, seed=1)
    new = old + 5.0
    found = estimate(*two_steps(first, old, new, labels), old, new, labels)

    assert found.residual < 1e-4
    assert found.kept > 0.97


@pytest.mark.parametrize("by", [1.0, 4.0, 12.0])
def test_the_estimate_is_near_the_truth_where_earlier_classes_move_as_the_new_ones_do(by: float) -> None:
    first, (old, labels) = features(10, seed=0), features(10, seed=1)
    new = moved(old, labels, by=by, seed=2)
    before, after = two_steps(first, old, new, labels)
    found = estimate(before, after, old, new, labels)
    fresh, fresh_labels = features(10, seed=0)

    assert found.before == pytest.approx(right(before, fresh, fresh_labels), abs=0.05)
    truth = right(after, moved(fresh, fresh_labels, by=by, seed=5), fresh_labels)
    assert found.after == pytest.approx(truth, abs=0.2)


def test_more_drift_leaves_less() -> None:
    first, (old, labels) = features(10, seed=0), features(10, seed=1)
    found = [
        estimate(*two_steps(first, old, new, labels), old, new, labels)
        for new in (moved(old, labels, by=by, seed=2) for by in (0.5, 4.0, 12.0, 40.0))
    ]

    assert [one.after for one in found] == sorted((one.after for one in found), reverse=True)
    assert [one.residual for one in found] == sorted(one.residual for one in found)
    assert found[0].kept > 0.9
    assert found[-1].kept < 0.35 < 1 < found[-1].residual


@pytest.mark.parametrize("classes", [1, 2, 3, 400])
def test_any_number_of_classes_has_an_estimate_and_the_same_one_every_time(classes: int) -> None:
    first, (old, labels) = features(classes, seed=0, apart=40.0), features(classes, seed=1, apart=40.0)
    new = old + 0.01 * old.roll(1, dims=1)
    states = two_steps(first, old, new, labels)
    found = estimate(*states, old, new, labels)

    assert found == estimate(*states, old, new, labels)
    assert found.before > 0.99
    assert found.after > 0.99


def test_a_step_says_what_drift_cost_and_adds_it_to_what_was_lost() -> None:
    before = learn(1)
    old, labels = features(2, seed=0)
    learned = learn(2)
    start = recompute_head(
        ModelState(), before, task="t01", labels=labels, features=lambda _: old,
        head=HEADS["lda"], covariance_rank=2, generator=torch.Generator(),
    )  # fmt: skip

    def step(new: Tensor, lost: float) -> dict[str, object]:
        whole = FrozenStep(learned=learned, trained=learned, facts={"kept": 1})
        found = settled(
            start, whole, task="t02", labels=labels, features=lambda which: new if which is learned else old,
            head=HEADS["lda"], covariance_rank=2, generator=torch.Generator(), drawn=torch.Generator().manual_seed(0),
            lost=lost,
        )  # fmt: skip
        assert set(found.learned.settled) == {"t01", "t02"}
        return dict(found.facts)

    assert step(old, 0.0) == {"kept": 1}
    assert step(old, 0.25) == {"kept": 1, "drift_loss": 0.25}
    new = moved(old, torch.arange(len(old)), by=30.0, seed=1)
    facts = step(new, 0.25)
    kept = min(1.0, facts["old_accuracy_after"] / facts["old_accuracy_before"])  # type: ignore[operator]
    assert facts["drift_loss"] == pytest.approx(1 - 0.75 * kept, abs=1e-3)
    assert facts["drift_residual"] > 0  # type: ignore[operator]
