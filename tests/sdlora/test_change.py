"""How far weights and features moved agrees with the same from whole matrices."""

import numpy as np
import pytest
from scipy.linalg import subspace_angles

from sdlora.change import (
    Pair,
    Update,
    inner_products,
    linear_cka,
    norm,
    overlap,
    overlaps,
    principal_cosines,
    relative_changes,
    weighted_sum,
)

RNG = np.random.default_rng(3)
TARGETS = ("blocks.0.attn.q", "blocks.0.attn.v")


def a_pair(rows: int = 12, columns: int = 9, rank: int = 3) -> Pair:
    return Pair(RNG.normal(size=(rows, rank)), RNG.normal(size=(rank, columns)))


def an_update(*tasks: str, like: Update | None = None) -> Update:
    directions = {
        task: like.directions[task]
        if like and task in like.directions
        else {name: a_pair() for name in TARGETS}
        for task in tasks
    }
    return Update(
        targets=TARGETS if tasks else (),
        directions=directions,
        magnitudes={task: RNG.normal(size=len(TARGETS)) for task in tasks},
    )


def whole(update: Update, target: str) -> np.ndarray:
    if not update.directions:
        return np.zeros((12, 9))
    return sum(
        update.magnitudes[task][TARGETS.index(target)] * pairs[target].up @ pairs[target].down
        for task, pairs in update.directions.items()
    )


def test_the_norm_is_that_of_the_product() -> None:
    for pair in (a_pair(), weighted_sum([(1.0, a_pair())] * 40)):
        assert norm(pair) == pytest.approx(np.linalg.norm(pair.up @ pair.down))


def test_a_sum_is_that_of_the_products() -> None:
    first, second = a_pair(), a_pair(rank=1)
    found = weighted_sum([(2.0, first), (-0.5, second)])
    np.testing.assert_allclose(
        found.up @ found.down, 2 * first.up @ first.down - 0.5 * second.up @ second.down
    )
    assert norm(weighted_sum([])) == 0


def test_the_change_between_any_two_steps_is_that_of_the_weights() -> None:
    then = an_update("t01", "t02")
    now = an_update("t01", "t02", "t03", like=then)
    norms = {name: 7.0 for name in TARGETS}
    for left, right in ((now, then), (then, now), (now, an_update()), (an_update(), now)):
        for target, change in relative_changes(left, right, norms).items():
            expected = np.linalg.norm(whole(left, target) - whole(right, target)) / 7
            assert change == pytest.approx(expected)
    assert relative_changes(now, then, norms).keys() == set(TARGETS)


def test_what_did_not_move_changed_by_nothing_at_all() -> None:
    then = an_update("t01", "t02")
    assert set(relative_changes(then, then, dict.fromkeys(TARGETS, 1.0)).values()) == {0.0}


def test_a_direction_of_the_same_task_in_another_run_counts_whole() -> None:
    one, other = an_update("t01"), an_update("t01")
    found = relative_changes(one, other, dict.fromkeys(TARGETS, 1.0))[TARGETS[0]]
    assert found == pytest.approx(np.linalg.norm(whole(one, TARGETS[0]) - whole(other, TARGETS[0])))


@pytest.mark.parametrize(("r", "s"), [(3, 3), (2, 5), (1, 1)])
def test_principal_angles_are_scipys(r: int, s: int) -> None:
    left, right = RNG.normal(size=(20, r)), RNG.normal(size=(20, s))
    np.testing.assert_allclose(
        np.arccos(principal_cosines(left, right)), np.sort(subspace_angles(left, right)), atol=1e-7
    )


def test_a_space_within_the_other_overlaps_wholly_and_a_perpendicular_one_not_at_all() -> None:
    left = RNG.normal(size=(20, 4))
    assert overlap(left, left[:, :2] @ RNG.normal(size=(2, 2))) == pytest.approx(1)
    q, _ = np.linalg.qr(RNG.normal(size=(20, 8)))
    assert overlap(q[:, :4], q[:, 4:]) == pytest.approx(0, abs=1e-12)
    assert np.isnan(overlap(left, np.zeros((20, 2))))


def test_columns_that_depend_on_others_count_once() -> None:
    left = RNG.normal(size=(20, 2))
    assert len(principal_cosines(np.hstack([left, left]), RNG.normal(size=(20, 5)))) == 2


def test_alignment_knows_rotation_scale_and_offset() -> None:
    x = RNG.normal(size=(50, 6))
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    y = RNG.normal(size=(50, 4))
    centre = np.eye(50) - 1 / 50
    k, other = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # the same from kernels, n×n
    expected = (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())
    assert linear_cka(x, y) == pytest.approx(expected)
    assert np.isnan(linear_cka(np.ones((5, 2)), RNG.normal(size=(5, 2))))


def test_inner_products_are_those_of_the_products() -> None:
    pairs = [a_pair(), a_pair(rank=1), a_pair(rank=0), a_pair(rank=5)]
    products = [pair.up @ pair.down for pair in pairs]
    expected = [[float((one * other).sum()) for other in products] for one in products]
    np.testing.assert_allclose(inner_products(pairs), expected, atol=1e-12)
    assert inner_products([]).shape == (0, 0)


def test_overlaps_are_those_of_every_two_spaces() -> None:
    first = RNG.normal(size=(12, 3))
    spaces = [first, first @ RNG.normal(size=(3, 2)), RNG.normal(size=(12, 5)), np.zeros((12, 2))]
    expected = [[overlap(one, other) for other in spaces] for one in spaces]
    np.testing.assert_allclose(overlaps(spaces), expected)
    assert overlaps(spaces)[0, 1] == pytest.approx(1)
    assert overlaps([]).shape == (0, 0)
