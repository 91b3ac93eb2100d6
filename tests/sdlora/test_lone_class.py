"""A task of one class is learned by every method, and adds no direction: nothing tells the class from any other."""

import pytest
import torch
from torch import Tensor

from sdlora.classifier import ModelState, merged_classifier
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze, recompute_head
from sdlora.heads import HEADS
from sdlora.methods import METHODS
from sdlora.preprocessing import normalise
from tests.support.tiny_model import finish, learn, make_fit, settings, tiny_task, tiny_vit

CHOICES = [
    *((method, "continuous") for method in METHODS),
    *(("sdlora", formulation) for formulation in FORMULATIONS if formulation != "continuous"),
]


def features(learned: ModelState, images: Tensor) -> Tensor:
    with torch.no_grad():
        model = merged_classifier(tiny_vit(), learned)
        return model.features(normalise(images, mean=[0.5], std=[0.5]))


@pytest.mark.parametrize(("method", "formulation"), CHOICES)
def test_a_task_of_one_class_after_others_leaves_the_features_as_they_were(
    method: str, formulation: str
) -> None:
    chosen = settings(formulation)
    before = learn(1, method=method, chosen=chosen)
    fit = make_fit(before, 2, method=method, chosen=chosen, lone=[2])
    result = finish(fit)
    after = freeze(before, result, method=METHODS[method], settings=chosen).learned
    images, _ = tiny_task(1)

    assert list(after.head) == ["t01", "t02"]
    if METHODS[method].joint:  # all classes at once are more than one
        assert fit.total_steps
        assert list(after.directions) == ["t02"]
        return
    assert not fit.total_steps
    assert not fit.curve
    assert not result.factors
    assert after.directions is before.directions
    assert all(torch.equal(after.magnitudes[task], before.magnitudes[task]) for task in before.magnitudes)
    assert after.magnitudes.keys() == before.magnitudes.keys()
    assert torch.equal(features(after, images), features(before, images))


@pytest.mark.parametrize(("method", "formulation"), CHOICES)
def test_a_chain_goes_on_after_tasks_of_one_class_the_first_among_them(method: str, formulation: str) -> None:
    learned = learn(4, method=method, chosen=settings(formulation, tolerance=0.0), lone=[1, 3])

    trains = bool(METHODS[method].targets)
    kept = ["t04"] if METHODS[method].replaces else ["t02", "t04"]
    assert list(learned.directions) == (kept if trains else [])
    assert list(learned.magnitudes) == list(learned.directions)
    assert [len(block.bias) for block in learned.head.values()] == [1, 2, 1, 2]
    images, _ = tiny_task(2)
    assert features(learned, images).isfinite().all()
    assert torch.equal(features(learned, images), features(ModelState(), images)) != trains


def test_inflora_remembers_what_a_first_task_of_one_class_looked_like() -> None:
    """The later tasks must leave its features alone, although it has no direction."""
    first = learn(1, method="inflora", lone=[1])
    second = make_fit(first, 2, method="inflora")
    path = next(iter(first.memory))
    basis = first.memory[path]

    assert basis.shape[1] > 0
    for letter in ("k", "v"):
        down = second.model.targets[f"{path}.{letter}"].down
        torch.testing.assert_close(down @ basis, torch.zeros(3, basis.shape[1]), rtol=0, atol=1e-5)


def test_the_row_of_a_lone_class_is_its_mean_as_long_as_the_rows_before() -> None:
    """Under the model that is kept, also where a formulation would start magnitudes and directions anew."""
    chosen = settings("paper")
    before = learn(2, chosen=chosen)
    row = finish(make_fit(before, 3, chosen=chosen, lone=[3])).head["t03"]
    mean = features(before, tiny_task(3, classes=1)[0]).mean(0)
    lengths = torch.cat([block.weight.norm(dim=1) for block in before.head.values()])

    assert row.weight.norm().item() == pytest.approx(lengths.mean().item(), rel=1e-5)
    torch.testing.assert_close(row.weight[0] / row.weight.norm(), mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert not row.bias.any()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lone", [[1], [2]], ids=["first", "later"])
def test_the_head_of_a_task_of_one_class_is_settled_from_statistics(head: str, lone: list[int]) -> None:
    learned = ModelState()
    for index in (1, 2):
        task, (images, labels) = f"t{index:02}", tiny_task(index, classes=1 if index in lone else 2)
        result = finish(make_fit(learned, index, lone=lone))
        step = freeze(learned, result, method=METHODS["sdlora"], settings=settings()).learned
        learned = recompute_head(
            learned,
            step,
            task=task,
            labels=labels,
            features=lambda which, images=images: features(which, images),
            head=HEADS[head],
            covariance_rank=3,
            generator=torch.Generator().manual_seed(0),
        )
    weight = torch.cat([block.weight for block in learned.rows.values()])
    bias = torch.cat([block.bias for block in learned.rows.values()])
    assert weight.isfinite().all()
    if head != "linear":
        images, _ = tiny_task(lone[0], classes=1)
        label = 0 if lone == [1] else 2
        assert (features(learned, images) @ weight.T + bias).argmax(1).eq(label).double().mean() > 0.5
