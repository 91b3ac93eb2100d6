"""Statistics stay as they were taken, and maps of later steps carry them to the features of today."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdlora.classifier import ModelState
from sdlora.drift import DriftMap, carried, drift_map
from sdlora.freezing import recompute_head
from sdlora.head import HeadBlock
from sdlora.heads import HEADS, discriminant
from sdlora.statistics import ClassStatistics, class_statistics
from tests.support.tiny_model import learn

SIZE = 16


def features(seed: int, images: int = 200) -> Tensor:
    return torch.randn(images, SIZE, generator=torch.Generator().manual_seed(seed)) + 1


def random_map(seed: int) -> DriftMap:
    random = torch.Generator().manual_seed(seed)
    return DriftMap(0.3 * torch.randn(SIZE, SIZE, generator=random), torch.randn(SIZE, generator=random))


def moved(step: DriftMap, points: Tensor) -> Tensor:
    return points + points @ step.matrix.T + step.offset


def taken(seed: int, rank: int = 2) -> ClassStatistics:
    return class_statistics(features(seed), torch.arange(200) % 2, rank=rank)


def test_no_change_of_features_moves_nothing() -> None:
    old = features(1)
    found = drift_map(old, old)

    assert not found.matrix.any()
    assert not found.offset.any()


def test_a_shift_of_all_features_is_a_shift_of_what_was_taken() -> None:
    old, shift = features(1), torch.arange(SIZE, dtype=torch.float32)
    found = carried(
        {"t01": taken(2), "t02": taken(3)}, {"t02": drift_map(old, old + shift)}, tasks=["t01", "t02"]
    )

    torch.testing.assert_close(found["t01"].mean, taken(2).mean + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["t01"].factors, taken(2).factors, rtol=1e-5, atol=1e-5)


def test_an_affine_change_on_more_images_than_features_is_recovered_without_a_ridge() -> None:
    old, true = features(1), random_map(4)
    found = drift_map(old, moved(true, old), ridge=1e-12)

    torch.testing.assert_close(found.matrix, true.matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.offset, true.offset, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.3, 1e12])
def test_the_mean_of_the_images_moves_as_it_did_whatever_the_ridge(ridge: float) -> None:
    old, new = features(1), moved(random_map(4), features(1))
    found = drift_map(old, new, ridge=ridge)

    torch.testing.assert_close(moved(found, old).mean(0), new.mean(0), rtol=1e-4, atol=1e-4)
    assert ridge < 1 or found.matrix.abs().max() < 1e-9


def test_a_single_image_moves_everything_alike() -> None:
    old = features(1, images=1)
    found = drift_map(old, old + 2)

    assert not found.matrix.any()
    torch.testing.assert_close(found.offset, torch.full((SIZE,), 2.0))


def test_a_map_and_lda_are_the_same_however_many_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many images and classes only some are in double precision."""
    generator = torch.Generator().manual_seed(3)
    old = torch.randn(50, 4, generator=generator)
    new = old + 0.1 * torch.randn(50, 4, generator=generator)
    taken = {"t01": class_statistics(old, torch.arange(50) % 7, rank=2)}
    head = {"t01": HeadBlock(torch.zeros(7, 4), torch.zeros(7))}

    def all_of_it() -> list[Tensor]:
        found = carried({**taken, "t02": taken["t01"]}, {"t02": drift_map(old, new)}, tasks=["t01", "t02"])
        return [*drift_map(old, new), *found["t01"], *discriminant(head, taken, generator=generator)["t01"]]

    whole = all_of_it()
    monkeypatch.setattr("sdlora.drift._ROWS", 8)
    monkeypatch.setattr("sdlora.drift._CLASSES", 2)
    monkeypatch.setattr("sdlora.heads._CLASSES", 2)
    for one, other in zip(whole, all_of_it(), strict=True):
        torch.testing.assert_close(one, other)


def test_maps_are_applied_in_the_order_of_the_steps_to_what_was_taken_before_them() -> None:
    tasks = ["t01", "t02", "t03", "t04"]
    statistics = {task: taken(place) for place, task in enumerate(tasks)}
    drift = {"t02": random_map(12), "t04": random_map(14)}  # t03 moved nothing
    found = carried(statistics, drift, tasks=tasks)

    for task, later in (("t01", ["t02", "t04"]), ("t02", ["t04"]), ("t03", ["t04"]), ("t04", [])):
        mean, factors = statistics[task].mean.double(), statistics[task].factors.double()
        for step in later:
            matrix, offset = (part.double() for part in drift[step])
            mean, factors = mean + mean @ matrix.T + offset, factors + matrix @ factors
        torch.testing.assert_close(found[task].mean, mean.float())
        torch.testing.assert_close(found[task].factors, factors.float())
        assert torch.equal(found[task].spread, statistics[task].spread)
    assert found["t04"] is statistics["t04"]


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.settle])
def test_a_later_step_leaves_statistics_and_maps_as_they_were_and_adds_its_own(name: str) -> None:
    chain, held = ModelState(), ModelState()
    for place, task in enumerate(["t01", "t02", "t03"], start=1):
        old, new = features(place), features(place + 10)
        step = replace(learn(place), statistics=held.statistics, drift=held.drift)
        chain = recompute_head(
            held,
            step,
            task=task,
            labels=torch.arange(200) % 2,
            features=lambda which, before=held, old=old, new=new: old if which is before else new,
            head=HEADS[name],
            covariance_rank=2,
            generator=torch.Generator().manual_seed(0),
        )
        assert list(chain.drift) == ["t02", "t03"][: place - 1]
        assert all(chain.drift[key] is held.drift[key] for key in held.drift)
        assert all(chain.statistics[key] is held.statistics[key] for key in held.statistics)
        held = chain
