"""The geometry is timm's to the pixel, and what timm leaves open is as documented."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

from sdlora.preprocessing import RESAMPLING, TRANSPOSITIONS, Preprocessing, on_white, upright

GENERATOR = np.random.default_rng(0)
SIZES = [(32, 32), (24, 24), (24, 18)]
"""(height, width) of the target."""
SHAPES = [
    (32, 32), (33, 32), (32, 33), (31, 47), (47, 31), (24, 18), (18, 24), (7, 90), (91, 8), (64, 65), (65, 64),
    (100, 75), (75, 101), (17, 17), (1, 9), (9, 1), (53, 37), (200, 131),
]  # fmt: skip


def preprocessing(**changes: object) -> Preprocessing:
    values = {
        "input_size": (3, 24, 24),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    return Preprocessing(**{**values, **changes})


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(GENERATOR.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def by_timm(own: Preprocessing, picture: Image.Image, *, normalize: bool) -> torch.Tensor:
    transform = timm.data.create_transform(
        own.input_size,
        is_training=False,
        interpolation=own.interpolation,
        mean=own.mean,
        std=own.std,
        crop_pct=own.crop_pct,
        crop_mode=own.crop_mode,
        normalize=normalize,
    )
    return transform(picture)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.9, 0.875, 0.8])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_are_those_of_timm(crop_mode: str, crop_pct: float, mode: str) -> None:
    channels = 1 if mode == "L" else 3
    for (height, width), shape in product(SIZES, SHAPES):
        own = preprocessing(
            input_size=(channels, height, width),
            mean=(0.485, 0.456, 0.406)[:channels],
            std=(0.2,) * channels,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )
        picture = noise(*shape, mode=mode)
        if crop_mode == "border" and min(shape) * min(height, width) < max(shape):
            continue  # timm would scale the shorter side to no pixel at all
        expected = by_timm(own, picture, normalize=False).numpy()
        np.testing.assert_array_equal(own.pixels(picture), expected, f"{shape} to {height, width}")


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_every_interpolation_is_that_of_timm(interpolation: str) -> None:
    own, picture = preprocessing(interpolation=interpolation), noise(50, 41)

    np.testing.assert_array_equal(own.pixels(picture), by_timm(own, picture, normalize=False).numpy())
    assert RESAMPLING[interpolation] == Image.Resampling[interpolation.upper()]


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_transform_is_that_of_timm_to_the_bit(crop_mode: str) -> None:
    own, picture = preprocessing(crop_mode=crop_mode), noise(50, 41)

    assert torch.equal(own(picture), by_timm(own, picture, normalize=True))


def test_a_very_long_picture_still_has_a_pixel_across() -> None:
    assert preprocessing(crop_mode="border").pixels(noise(400, 1)).shape == (3, 24, 24)


def test_a_square_picture_of_the_size_is_not_resampled() -> None:
    picture = noise(32, 32, "L")
    own = preprocessing(input_size=(1, 32, 32), mean=(0.5,), std=(0.5,), crop_pct=1.0)

    np.testing.assert_array_equal(own.pixels(picture)[0], np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_pillow_would(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(9, 5).save(tmp_path / "turned.png", exif=exif)
    picture = Image.open(tmp_path / "turned.png")

    np.testing.assert_array_equal(np.asarray(upright(picture)), np.asarray(ImageOps.exif_transpose(picture)))
    assert torch.equal(preprocessing()(picture), preprocessing()(ImageOps.exif_transpose(picture)))
    assert set(TRANSPOSITIONS) == set(range(2, 9))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    picture = noise(24, 24).convert("RGBA")
    picture.putalpha(noise(24, 24, "L"))
    expected = Image.alpha_composite(
        Image.new("RGBA", picture.size, "white"),
        picture if mode == "RGBA" else picture.convert(mode).convert("RGBA"),
    )
    found = on_white(picture.convert(mode))

    np.testing.assert_array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected))


def test_an_opaque_picture_is_left_as_it_is() -> None:
    picture = noise(4, 4)

    assert on_white(picture) is picture


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_a_picture_without_a_known_range_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"a picture of mode {mode} has no known range; convert it"):
        preprocessing()(Image.new(mode, (4, 4)))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param({"input_size": [4, 8, 8]}, "images of 4 channels; choose one", id="channels"),
        pytest.param({"interpolation": "random"}, "'random'; known are nearest", id="interpolation"),
        pytest.param({"crop_mode": "tile"}, "crop_mode is 'tile'; known are center", id="crop-mode"),
    ],
)
def test_a_backbone_with_other_needs_is_refused(change: dict[str, object], fault: str) -> None:
    config = {
        "input_size": [3, 8, 8],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    found = Preprocessing.of({"pretrained_cfg": config})

    assert found == replace(found, input_size=(3, 8, 8), mean=(0.5,) * 3, crop_pct=0.9)
    with pytest.raises(ValueError, match=fault):
        Preprocessing.of({"pretrained_cfg": {**config, **change}})
