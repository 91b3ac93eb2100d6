"""Augmentation in batch keeps shape and range, repeats with its generator, and leaves alone what it should."""

import torch

from sdlora.augmentation import crop_and_flip

IMAGES = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_crop_and_no_flip_is_the_identity() -> None:
    assert crop_and_flip(IMAGES, crop_scale=1.0, flip=False, generator=generator()) is IMAGES


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    flipped = crop_and_flip(IMAGES, crop_scale=1.0, flip=True, generator=generator())
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, IMAGES, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(flipped, IMAGES, strict=True)]

    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48


def test_a_crop_keeps_shape_and_range_and_repeats_with_its_generator() -> None:
    first = crop_and_flip(IMAGES, crop_scale=0.1, flip=False, generator=generator(3))
    again = crop_and_flip(IMAGES, crop_scale=0.1, flip=False, generator=generator(3))
    other = crop_and_flip(IMAGES, crop_scale=0.1, flip=False, generator=generator(4))

    assert first.shape == IMAGES.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_crop_shows_a_part_of_the_image() -> None:
    """On an image whose pixels are their own x coordinate, a crop spans no more than the image does."""
    ramp = torch.linspace(0, 1, 16).expand(64, 1, 16, 16).contiguous()
    crops = crop_and_flip(ramp, crop_scale=0.05, flip=False, generator=generator())
    spans = crops.amax((1, 2, 3)) - crops.amin((1, 2, 3))

    assert (spans <= 1).all()
    assert spans.min() < 0.4
    assert (crops.diff(dim=-1) >= -1e-6).all()
