"""One temperature makes images that no row was made of less surprising, and changes no answer."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sdlora.calibration import Temperature, fitted_temperature, left_out_logits, tempered
from sdlora.head import HeadBlock, HeadRows, block_logits
from sdlora.heads import HEADS
from sdlora.statistics import ClassStatistics, class_statistics

SIZE = 30


def images(seed: int, classes: int, each: int) -> tuple[Tensor, Tensor]:
    """Features of classes with tails that no Gaussian has, and labels. The centres are the same for every seed."""
    centres = torch.randn(classes, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(classes).repeat_interleave(each)
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), SIZE, generator=random)
    return centres[labels] + noise * torch.randn(len(labels), 1, generator=random).mul(0.9).exp(), labels


def blank(classes: int) -> HeadBlock:
    return HeadBlock(torch.zeros(classes, SIZE), torch.zeros(classes))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def of_two_tasks(features: Tensor, labels: Tensor) -> dict[str, ClassStatistics]:
    """Statistics of a first task of the first four classes, and of a second one."""
    old = labels < 4
    return {
        "t01": class_statistics(features[old], labels[old], rank=8),
        "t02": class_statistics(features[~old], labels[~old] - 4, rank=8),
    }


@pytest.mark.parametrize("name", ["ncm", "lda", "rgda"])
def test_left_out_images_of_a_task_make_new_images_of_all_tasks_less_surprising(name: str) -> None:
    settle = HEADS[name].settle
    assert settle is not None
    features, labels = images(1, 8, each=25)
    statistics, rows = of_two_tasks(features, labels), {"t01": blank(4), "t02": blank(4)}

    def made(of: Mapping[str, ClassStatistics]) -> Mapping[str, HeadRows]:
        return settle(rows, of, generator=generator())

    logits, truths, _ = left_out_logits(
        features[labels >= 4], labels[labels >= 4] - 4, task="t02", statistics=statistics, step_classes={},
        settle=made, generator=generator(),
    )  # fmt: skip
    temperature = fitted_temperature(logits, truths).value
    others, their = images(2, 8, each=200)
    before = block_logits(made(statistics).values(), others)
    after = block_logits(tempered(made(statistics), temperature).values(), others)

    assert len(truths) == 100
    assert set(truths.tolist()) == {4, 5, 6, 7}
    assert torch.equal(after.argmax(1), before.argmax(1))
    torch.testing.assert_close(after * temperature, before, rtol=1e-4, atol=1e-3)
    entropy = torch.nn.functional.cross_entropy
    assert entropy(after, their) < 0.95 * entropy(before, their)


def test_the_temperature_is_that_by_which_calibrated_logits_were_multiplied() -> None:
    random = generator()
    logits = 2 * torch.randn(20000, 5, generator=random)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=random).flatten()

    assert fitted_temperature(logits, labels).value == pytest.approx(1, abs=0.03)
    assert fitted_temperature(7 * logits, labels).value == pytest.approx(7, abs=0.2)


def test_a_task_that_is_too_easy_to_tell_leaves_the_temperature_to_the_steps_before() -> None:
    easy, right = 40 * torch.eye(3)[torch.arange(90) % 3], torch.arange(90) % 3
    alone = fitted_temperature(easy, right)
    before = Temperature(5.0, 70.0)
    after = fitted_temperature(easy, right, before=before)

    assert alone.value > 6
    assert alone.information == 0
    assert after.value == pytest.approx(5, rel=0.1)
    assert after.information == 70


def test_steps_that_know_as_much_meet_between_their_temperatures() -> None:
    random = generator()
    logits = 2 * torch.randn(2000, 5, generator=random)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=random).flatten()
    own = fitted_temperature(logits, labels)

    met = [
        fitted_temperature(logits, labels, before=Temperature(2.0, share * own.information)).value
        for share in (1e-9, 0.1, 1, 10, 1e9)
    ]
    assert met == sorted(met)
    assert met[0] == pytest.approx(own.value, rel=1e-2)
    assert 1.2 < met[2] < 1.7
    assert met[-1] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("right", [True, False])
def test_the_temperature_of_answers_that_are_all_right_or_all_wrong_is_finite(right: bool) -> None:
    logits = torch.eye(3)[torch.arange(30) % 3] * 10
    labels = torch.arange(30) % 3 if right else (torch.arange(30) + 1) % 3

    assert 0 < fitted_temperature(logits, labels).value < 1e12


def test_an_image_that_is_alone_in_its_class_is_never_left_out() -> None:
    features, labels = images(1, 2, each=6)
    features, labels = features[:7], labels[:7]
    settle = HEADS["lda"].settle
    assert settle is not None
    logits, truths, _ = left_out_logits(
        features,
        labels,
        task="t01",
        statistics={"t01": class_statistics(features, labels, rank=2)},
        step_classes={},
        settle=lambda of: settle({"t01": blank(2)}, of, generator=generator()),
        generator=generator(),
    )

    assert truths.tolist() == [0] * 6
    assert logits.isfinite().all()
