"""A fit's images come out the same from wherever they lie, and lie on the device only where they fit."""

import pytest
import torch

from sdlora.image_store import ImageStore

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def parts(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (size, 3, 4, 5), generator=generator, dtype=torch.uint8) for size in sizes]


@pytest.mark.parametrize("sizes", [(7,), (3, 1, 5), (1, 1, 1)])
def test_a_batch_is_that_of_all_images_in_a_row(sizes: tuple[int, ...]) -> None:
    given = parts(*sizes)
    whole, store = torch.cat(given), ImageStore(given, CPU)
    assert len(store) == len(whole)
    for seed in range(5):
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[: 2 + seed]
        assert torch.equal(store[chosen], whole[chosen])
    assert torch.equal(torch.cat(list(store.split(2))), whole)


def test_images_that_stay_in_main_memory_are_not_copied() -> None:
    given = parts(4, 3)
    given_places = [part.data_ptr() for part in given]
    assert [part.data_ptr() for part in ImageStore(given, CPU)._parts] == given_places


@pytest.mark.parametrize(("room", "fits"), [(None, True), (7 * 60, True), (7 * 60 - 1, False), (0, False)])
def test_they_lie_on_the_device_where_all_fit(room: int | None, fits: bool) -> None:
    store = ImageStore(parts(4, 3), ELSEWHERE, room=room)
    assert store.on_device == fits
    batch = store[torch.tensor([6, 0])]
    assert (batch.device, batch.shape) == (ELSEWHERE, (2, 3, 4, 5))
