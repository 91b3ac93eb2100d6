"""What several steps have left of a class, put together."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sdlora.arrivals import labels_by_step, rows_by_arrival, statistics_by_arrival
from sdlora.head import HeadBlock, QuadraticBlock, block_logits
from sdlora.heads import HEADS
from sdlora.statistics import ClassStatistics, class_statistics

SIZE = 12


def drawn(seed: int, images: int, label: int) -> Tensor:
    """Features (images, SIZE) of a class, in double precision's range of float32."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(SIZE, generator=torch.Generator().manual_seed(label))
    return mean + torch.randn(images, SIZE, generator=generator) @ torch.diag(torch.linspace(0.2, 2, SIZE))


def covariance(statistics: ClassStatistics, row: int) -> Tensor:
    factors = statistics.factors[row].double()
    return factors @ factors.T + statistics.spread[row].double() * torch.eye(SIZE)


def taken(parts: Mapping[int, Tensor], rank: int) -> ClassStatistics:
    """The statistics of a step that saw these features by label, in rising order of the labels."""
    labels = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts.values()]))
    return class_statistics(torch.cat(list(parts.values())), labels, rank=rank)


def test_the_labels_of_a_step_follow_on_unless_it_may_have_seen_known_classes() -> None:
    sizes = {"t01": 2, "t02": 3, "t03": 1, "t04": 1}

    assert labels_by_step(sizes, {"t02": (0, 1, 2), "t03": (1,)}) == {
        "t01": [0, 1],
        "t02": [0, 1, 2],
        "t03": [1],
        "t04": [3],
    }


@pytest.mark.parametrize("rank", [0, 3, SIZE])
def test_merged_statistics_are_those_of_all_images_up_to_their_rank(rank: int) -> None:
    first, second, third = drawn(1, 40, 0), drawn(2, 7, 0), drawn(3, 1, 0)
    steps = {"t01": taken({0: first}, rank), "t02": taken({0: second}, rank), "t03": taken({0: third}, rank)}
    found = statistics_by_arrival(steps, {"t02": (0,), "t03": (0,)})
    whole = taken({0: torch.cat([first, second, third])}, rank)

    assert [len(each.images) for each in found.values()] == [1, 0, 0]
    merged = found["t01"]
    assert merged.images.tolist() == [48]
    torch.testing.assert_close(merged.mean, whole.mean)
    assert merged.factors.shape == whole.factors.shape
    torch.testing.assert_close(covariance(merged, 0).trace(), covariance(whole, 0).trace())
    if rank == SIZE:  # nothing was cut off
        torch.testing.assert_close(covariance(merged, 0), covariance(whole, 0), rtol=1e-4, atol=1e-5)


def test_the_rank_that_holds_all_images_makes_a_merge_exact() -> None:
    first, second = drawn(1, 3, 0), drawn(2, 3, 0)
    steps = {"t01": taken({0: first}, 5), "t02": taken({0: second}, 5)}
    merged = statistics_by_arrival(steps, {"t02": (0,)})["t01"]
    whole = taken({0: torch.cat([first, second])}, 5)

    torch.testing.assert_close(covariance(merged, 0), covariance(whole, 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged.spread, whole.spread, rtol=0, atol=1e-5)


def test_the_order_in_which_images_came_does_not_matter() -> None:
    parts = [drawn(seed, 5 + seed, 0) for seed in range(3)]
    orders = [(0, 1, 2), (2, 0, 1)]
    one, other = (
        statistics_by_arrival(
            {f"t0{place}": taken({0: parts[which]}, 4) for place, which in enumerate(order, start=1)},
            {"t02": (0,), "t03": (0,)},
        )["t01"]
        for order in orders
    )

    assert one.images.tolist() == other.images.tolist()
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(covariance(one, 0), covariance(other, 0), rtol=1e-4, atol=1e-5)


def test_a_class_that_one_step_saw_keeps_its_statistics_to_the_bit() -> None:
    steps = {
        "t01": taken({0: drawn(1, 9, 0), 1: drawn(2, 9, 1)}, 3),
        "t02": taken({1: drawn(3, 9, 1), 2: drawn(4, 9, 2)}, 3),
    }
    found = statistics_by_arrival(steps, {"t02": (1, 2)})

    for part, kept in zip(steps["t01"], found["t01"], strict=True):
        assert torch.equal(part[0], kept[0])
    for part, kept in zip(steps["t02"], found["t02"], strict=True):
        assert torch.equal(part[1:], kept)
    assert found["t01"].images.tolist() == [9, 18]
    assert statistics_by_arrival(steps, {}) == steps


@pytest.mark.parametrize("name", ["ncm", "lda", "rgda"])
def test_images_that_came_in_two_steps_classify_as_if_they_had_come_in_one(name: str) -> None:
    settle = HEADS[name].settle
    assert settle is not None
    images = {label: drawn(10 + label, 60, label) for label in range(4)}
    halves = [{label: its[half::2] for label, its in images.items()} for half in (0, 1)]
    steps = {"t01": taken(halves[0], SIZE), "t02": taken(halves[1], SIZE)}
    blank = HeadBlock(torch.zeros(4, SIZE), torch.zeros(4))
    rows = rows_by_arrival({"t01": blank, "t02": blank}, {"t02": (0, 1, 2, 3)}, newest=False)
    merged = settle(rows, statistics_by_arrival(steps, {"t02": (0, 1, 2, 3)}), generator=torch.Generator())
    whole = settle({"t01": blank}, {"t01": taken(images, SIZE)}, generator=torch.Generator())
    features = torch.cat([drawn(99 + label, 20, label) for label in range(4)])
    found, expected = (block_logits(blocks.values(), features) for blocks in (merged, whole))

    assert found.shape == expected.shape == (80, 4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert isinstance(merged["t02"], QuadraticBlock if name == "rgda" else HeadBlock)
    assert len(merged["t02"].bias) == 0


def test_the_row_in_use_of_a_class_is_the_one_that_was_trained_last() -> None:
    def block(*numbers: float) -> HeadBlock:
        return HeadBlock(torch.tensor(numbers)[:, None].repeat(1, 2), torch.tensor(numbers))

    head = {"t01": block(10, 11), "t02": block(20, 22), "t03": block(31)}
    seen = {"t02": (0, 2), "t03": (1,)}
    newest, first = (rows_by_arrival(head, seen, newest=which) for which in (True, False))

    # A lone class of t03 was trained against nothing.
    assert {step: rows.bias.tolist() for step, rows in newest.items()} == {
        "t01": [20, 11],
        "t02": [22],
        "t03": [],
    }
    assert {step: rows.bias.tolist() for step, rows in first.items()} == {
        "t01": [10, 11],
        "t02": [22],
        "t03": [],
    }
    assert newest["t03"].weight.shape == (0, 2)
