"""Pictures of a notebook, in whatever form, are what the backbone takes of the files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from sdlora.pictures import class_pixels, pixels_of
from tests.support.chains import TINY_PREPROCESSING, picture

NAMES = ["wren", "robin"]
SIZED = [[picture(seed).resize((9, 11)) for seed in (place, place + 1, place + 2)] for place in (0, 10)]
"""Three pictures of each class."""
ORDER = [(0, 1), (1, 0), (0, 0), (1, 2), (0, 2), (1, 1)]
"""Class and place of all of them, mixed."""


class Pairs(Dataset[tuple[Image.Image, int]]):
    """A dataset that names its classes, as those of torchvision do."""

    classes = ("owl", *NAMES)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return SIZED[index % 2][index // 2], 1 + index % 2


class ClassLabel:
    names = NAMES


class Rows:
    """What is read of a Hugging Face `Dataset`."""

    column_names = ("image", "label", "id")

    def __init__(self, **columns: str) -> None:
        kinds = {"Image": type("Image", (), {}), "ClassLabel": ClassLabel, "Value": type("Value", (), {})}
        self.features = {name: kinds[kind]() for name, kind in columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(6):
            yield {"image": SIZED[index % 2][index // 2], "label": index % 2, "id": str(index)}


def stack(place: int) -> np.ndarray:
    return np.stack([np.asarray(image) for image in SIZED[place]])


def tensors(place: int) -> torch.Tensor:
    return torch.from_numpy(stack(place)).permute(0, 3, 1, 2)


FORMS: dict[str, tuple[Any, Any]] = {
    "pictures": (dict(zip(NAMES, SIZED, strict=True)), None),
    "arrays": ({name: list(stack(place)) for place, name in enumerate(NAMES)}, None),
    "a stack": ({name: stack(place) for place, name in enumerate(NAMES)}, None),
    "numbers from 0 to 1": ({name: stack(place) / 255 for place, name in enumerate(NAMES)}, None),
    "tensors": ({name: tensors(place) for place, name in enumerate(NAMES)}, None),
    "tensors from 0 to 1": ({name: tensors(place).float() / 255 for place, name in enumerate(NAMES)}, None),
    "a generator": ({name: iter(SIZED[place]) for place, name in enumerate(NAMES)}, None),
    "a dataset": (Pairs(), None),
    "a part of one": (Subset(Pairs(), range(6)), None),
    "rows": (Rows(image="Image", label="ClassLabel", id="Value"), None),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """What the stages make of the same pictures."""
    return {
        name: np.stack([TINY_PREPROCESSING.pixels(image) for image in images])
        for name, images in zip(NAMES, SIZED, strict=True)
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_pixels_of_the_files(form: str, expected: dict[str, np.ndarray]) -> None:
    found = class_pixels(*FORMS[form], TINY_PREPROCESSING)

    assert list(found) == NAMES
    for name, pixels in found.items():
        np.testing.assert_array_equal(pixels.numpy(), expected[name])


@pytest.mark.parametrize("kind", ["names", "numbers", "tensor"])
def test_pictures_with_labels_are_sorted_by_label(kind: str, expected: dict[str, np.ndarray]) -> None:
    images = [SIZED[place][index] for place, index in ORDER]
    numbers = [place for place, _ in ORDER]
    labels = {"names": [NAMES[n] for n in numbers], "numbers": numbers, "tensor": torch.tensor(numbers)}
    found = class_pixels(images, labels[kind], TINY_PREPROCESSING)

    own = {"wren": "wren", "robin": "robin"} if kind == "names" else {"wren": "0", "robin": "1"}
    assert list(found) == sorted(own.values())
    for place, name in enumerate(NAMES):
        places = [index for which, index in ORDER if which == place]
        np.testing.assert_array_equal(found[own[name]].numpy(), expected[name][places])


def test_numbers_without_names_are_sorted_as_numbers() -> None:
    data = TensorDataset(torch.zeros(3, 1, 8, 8), torch.tensor([10, 9, 2]))
    assert list(class_pixels(data, None, TINY_PREPROCESSING)) == ["2", "9", "10"]


def test_grey_pictures_and_transparent_ones_are_taken_as_pillow_takes_them() -> None:
    grey, clear = picture(3, mode="L").resize((8, 8)), picture(4, mode="RGBA").resize((8, 8))
    clear.putalpha(grey)
    for image in (grey, clear):
        array = np.asarray(image)
        tensor = torch.from_numpy(array.copy())
        tensor = tensor if tensor.ndim == 2 else tensor.permute(2, 0, 1)
        for form in (array, tensor):
            np.testing.assert_array_equal(
                pixels_of(form, TINY_PREPROCESSING, ""), TINY_PREPROCESSING.pixels(image)
            )
    digits = {"0": np.zeros((2, 8, 8))}
    assert class_pixels(digits, None, TINY_PREPROCESSING)["0"].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8)), None, "type ndarray names no classes; give {name: pictures}"),
        (
            {"wren": ["a.png"]},
            None,
            "wren, picture 0: of type str, .*; open the file first, as PIL.Image.open does",
        ),
        (
            {"train": Rows(image="Image")},
            None,
            "train: a data set of its own, expected pictures; give it alone",
        ),
        (
            {"wren": "photos"},
            None,
            r"wren: of type str, expected several pictures: a list, or a stack \(n, …\)",
        ),
        ({"wren": SIZED[0][0]}, None, "wren: of type Image, expected several pictures"),
        ({"wren": torch.zeros(3, 8, 8)}, None, "wren: a tensor of 3×8×8, expected several pictures"),
        ({"wren": np.zeros((3, 8, 8))}, None, "an array of 3×8×8 may be one picture or several grey ones"),
        ({"wren": [np.zeros((5, 8, 8))]}, None, r"picture 0: an array of 5×8×8, expected \(h, w\) or"),
        ({"wren": np.zeros((2, 8, 8, 2))}, None, "picture 0: an array of 8×8×2, expected"),
        ({"wren": np.zeros((2, 64))}, None, "wren: an array of 2×64, expected several pictures"),
        (
            {"wren": [np.full((8, 8), 16.0)]},
            None,
            "picture 0: values from 16 to 16; floating-point ones go from 0",
        ),
        ({"wren": [np.full((8, 8), np.nan)]}, None, "picture 0: values from nan to nan"),
        ({"wren": [np.zeros((8, 8), int)]}, None, "picture 0: values of int64; convert them to uint8"),
        ({"wren": [Image.new("F", (8, 8))]}, None, "picture 0: a picture of mode F has no known range"),
        (SIZED[0], ["wren"], "3 pictures and 1 labels; give one for each"),
        (SIZED[0], [0.5, 1.5, 2.5], "a label is of type float, expected a name or a whole number"),
        (SIZED[0], None, "item 0: of type Image, expected a picture and its label"),
        (Subset(Pairs(), [0]).dataset.classes, None, "item 0: of type str, expected a picture and its label"),
        (
            Rows(image="Image", other="Image"),
            None,
            r"the columns are image \(Image\), other \(Image\); expected",
        ),
    ],
)
def test_what_is_no_labelled_picture_is_named_in_one_line(images: Any, labels: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        class_pixels(images, labels, TINY_PREPROCESSING)
    assert "\n" not in str(refused.value)
