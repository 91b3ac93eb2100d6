"""Augmentation in batch is torchvision's, image by image and in distribution, and leaves alone what it should."""

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop

from sdlora.augmentation import DRAWS, crop_and_flip, random_boxes

IMAGES = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def draws(seed: int = 0, count: int = len(IMAGES)) -> Tensor:
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed))


def test_no_crop_and_no_flip_is_the_identity() -> None:
    assert crop_and_flip(IMAGES, crop_scale=1.0, flip=False, draws=draws()) is IMAGES


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    flipped = crop_and_flip(IMAGES, crop_scale=1.0, flip=True, draws=draws())
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, IMAGES, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(flipped, IMAGES, strict=True)]

    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize("shape", [(16, 16), (12, 20), (9, 30)], ids=str)
@pytest.mark.parametrize("flip", [False, True], ids=["straight", "flipped"])
def test_every_image_is_what_torchvision_makes_of_the_same_box(shape: tuple[int, int], flip: bool) -> None:
    images, given = torch.rand(32, 3, *shape, generator=torch.Generator().manual_seed(1)), draws(2, 32)
    boxes = random_boxes(*shape, crop_scale=0.08, draws=given).long().tolist()
    made = crop_and_flip(images, crop_scale=0.08, flip=flip, draws=given)
    for image, mine, box, mirrored in zip(images, made, boxes, given[:, -1] < 0.5, strict=True):
        theirs = resized_crop(image, *box, list(shape), InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(mine, hflip(theirs) if flip and mirrored else theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (10, 64), (64, 10)], ids=str)
@pytest.mark.parametrize("crop_scale", [0.05, 0.5, 0.9])
def test_boxes_are_distributed_as_those_of_torchvision(shape: tuple[int, int], crop_scale: float) -> None:
    """Each edge of the box by the test of Kolmogorov and Smirnov, on 3,000 boxes of each."""
    torch.manual_seed(3)
    image = torch.zeros(1, *shape)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [crop_scale, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    mine = random_boxes(*shape, crop_scale=crop_scale, draws=draws(4, 3000)).long()

    assert (mine[:, :2] >= 0).all()
    assert (mine[:, :2] + mine[:, 2:] <= torch.tensor(shape)).all()
    for edge in range(4):
        assert ks_2samp(mine[:, edge], theirs[:, edge]).pvalue > 1e-3


def test_the_same_draws_make_the_same_crops() -> None:
    first, again, other = (
        crop_and_flip(IMAGES, crop_scale=0.1, flip=False, draws=draws(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
