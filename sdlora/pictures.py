"""_Labelled pictures as a notebook has them, in any of five forms, made what a backbone takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.dataset import Image  # Pillow as timm itself has it: arrays are scaled by what scales pictures
from torch import Tensor

from sdlora.preprocessing import Preprocessing, upright
from sdlora.records import shown

_CHANNELS = (1, 3, 4)
"""Grey, RGB, RGBA."""


class _Labelled(NamedTuple):
    """A picture of any kind, its class, and what messages call it."""

    picture: Any
    name: str
    where: str


def class_pixels(
    images: Any,  # noqa: ANN401 - five forms
    labels: Any,  # noqa: ANN401 - names or numbers
    preprocessing: Preprocessing,
) -> dict[str, Tensor]:
    """Return the pixels of each class, uint8 (n, channels, height, width), as the backbone takes them.

    Classes stand in the order of the mapping, or of the dataset's own names. Where labels alone name them they are
    sorted.

    Args:
        images: a mapping of class names to pictures; or pictures, with `labels`; or a dataset of pairs of a picture and
            a label, whose `classes` name labels that are numbers; or a Hugging Face dataset with a column of images and
            one of labels. Several pictures are an iterable of them, or a stack.
        labels: names or whole numbers, one for each picture; None where `images` holds them.

    Raises:
        TypeError: it is none of these.
        ValueError: a class has no picture, labels do not fit, or a picture cannot be read.
    """
    rows, order = _labelled(images, labels)
    found: dict[str, list[np.ndarray]] = {name: [] for name in order} if isinstance(images, Mapping) else {}
    for picture, name, where in rows:
        found.setdefault(name, []).append(pixels_of(picture, preprocessing, where))
    for name, pictures in found.items():
        if not pictures:
            raise ValueError(f"{shown(name)}: no picture; leave the class out, or give it some")
    names = [name for name in order if name in found] or sorted(found, key=_sorting)
    return {name: torch.from_numpy(np.stack(found[name])) for name in names}


def _labelled(images: Any, labels: Any = None) -> tuple[Iterable[_Labelled], list[str]]:  # noqa: ANN401 - five forms
    """Return labelled pictures one by one, and the order of the classes, as far as the form says it."""
    if labels is not None:
        return _with_labels(images, labels), []
    if isinstance(images, Mapping):
        return _of_classes(images), [str(name) for name in images]
    if hasattr(images, "column_names") and hasattr(images, "features"):
        return _of_columns(images)
    if hasattr(images, "__getitem__") and hasattr(images, "__len__") and not is_array(images):
        names = _names_of(images)
        return _of_pairs(images, names), names
    raise TypeError(
        f"type {type(images).__name__} names no classes; give {{name: pictures}}, pictures and labels, or pairs of both"
    )


def is_array(value: object) -> bool:
    """Return whether a value is an array or a tensor, of one picture or of several."""
    return isinstance(value, np.ndarray | Tensor)


def is_one(value: Any) -> bool:  # noqa: ANN401 - a picture or several
    """Return whether a value is one picture.

    An array (h, w, 1, 3 or 4), a tensor (1, 3 or 4, h, w) and either of two dimensions are; (n, h, w) are grey ones.

    Raises:
        ValueError: its three dimensions may be either.
    """
    if not is_array(value) or value.ndim != 3:
        return _is_pillow(value) or (is_array(value) and value.ndim == 2)
    first, last = value.shape[0] in _CHANNELS, value.shape[-1] in _CHANNELS
    own, other = (first, last) if isinstance(value, Tensor) else (last, first)
    if other and not own:
        order = "(channels, h, w)" if isinstance(value, Tensor) else "(h, w, channels)"
        raise ValueError(
            f"{_size(value)} may be one picture or several grey ones; of one {order} is expected, "
            "of several (n, h, w, channels) or (n, channels, h, w)"
        )
    return own


def pixels_of(picture: Any, preprocessing: Preprocessing, where: str) -> np.ndarray:  # noqa: ANN401 - several kinds
    """Return a picture of Pillow, an array or a tensor as the backbone takes it, uint8 (channels, height, width).

    Raises:
        TypeError, ValueError: it is no such picture, or its values have no range that is known.
    """
    if is_array(picture):
        picture = _from_array(picture, where)
    if not _is_pillow(picture):
        hint = "; open the file first, as PIL.Image.open does" if isinstance(picture, str | bytes) else ""
        raise TypeError(
            f"{where}: of type {type(picture).__name__}, expected a picture of Pillow, an array or a tensor{hint}"
        )
    if picture.mode[:1] in ("I", "F"):
        raise ValueError(
            f"{where}: a picture of mode {picture.mode} has no known range; convert it to 8 bits first"
        )
    try:
        return preprocessing.pixels(upright(picture))
    except OSError as error:  # what Pillow says of a broken file
        raise ValueError(f"{where}: {shown(str(error), 100)}; replace it") from error


def _is_pillow(value: object) -> bool:
    return isinstance(value, Image.Image)


def _from_array(array: np.ndarray | Tensor, where: str) -> Any:  # noqa: ANN401 - a picture of Pillow
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if isinstance(array, Tensor) and values.ndim == 3:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if (
        not values.size
        or values.ndim not in (2, 3)
        or (values.ndim == 3 and values.shape[2] not in _CHANNELS)
    ):
        order = "(h, w) or (1, 3 or 4, h, w)" if isinstance(array, Tensor) else "(h, w) or (h, w, 1, 3 or 4)"
        raise ValueError(f"{where}: {_size(array)}, expected {order}")
    return Image.fromarray(_bytes_of(values, where))


def _bytes_of(values: np.ndarray, where: str) -> np.ndarray:
    """Return values as bytes: those of bytes as they are, others from 0 to 1."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype != np.bool_ and values.dtype.kind != "f":
        raise ValueError(f"{where}: values of {values.dtype}; convert them to uint8 from 0 to 255")
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= 1):
        raise ValueError(
            f"{where}: values from {least:g} to {most:g}; floating-point ones go from 0 to 1, not normalised"
        )
    return (values.astype(np.float64) * 255).round().astype(np.uint8)


def _with_labels(images: Any, labels: Any) -> Iterator[_Labelled]:  # noqa: ANN401
    names = [_name(label, []) for label in labels]
    if hasattr(images, "__len__") and len(images) != len(names):
        raise ValueError(f"{len(images)} pictures and {len(names)} labels; give one for each")
    for place, (picture, name) in enumerate(zip(images, names, strict=True)):
        yield _Labelled(picture, name, f"picture {place}")


def _of_classes(classes: Mapping[Any, Any]) -> Iterator[_Labelled]:
    for name, pictures in classes.items():
        if hasattr(pictures, "column_names"):
            raise TypeError(f"{shown(str(name))}: a data set of its own, expected pictures; give it alone")
        if isinstance(pictures, str | bytes) or not isinstance(pictures, Iterable) or is_one(pictures):
            kind = _size(pictures) if is_array(pictures) else f"of type {type(pictures).__name__}"
            raise TypeError(
                f"{shown(str(name))}: {kind}, expected several pictures: a list, or a stack (n, …)"
            )
        for place, picture in enumerate(pictures):
            yield _Labelled(picture, str(name), f"{shown(str(name))}, picture {place}")


def _of_columns(table: Any) -> tuple[Iterator[_Labelled], list[str]]:  # noqa: ANN401 - a Hugging Face dataset
    kinds = {name: type(feature).__name__ for name, feature in (table.features or {}).items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = labels or [name for name in kinds if name in ("label", "labels")]
    if len(pictures) != 1 or len(labels) != 1:
        told = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ValueError(
            f"the columns are {told}; expected one Image and one ClassLabel, so take others off (remove_columns)"
        )
    names = [str(name) for name in getattr(table.features[labels[0]], "names", None) or []]

    def rows() -> Iterator[_Labelled]:
        for place, row in enumerate(table):
            yield _Labelled(row[pictures[0]], _name(row[labels[0]], names), f"row {place}")

    return rows(), names


def _of_pairs(dataset: Any, names: Sequence[str]) -> Iterator[_Labelled]:  # noqa: ANN401 - torch.utils.data.Dataset
    for place in range(len(dataset)):
        item = dataset[place]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(
                f"item {place}: of type {type(item).__name__}, expected a picture and its label; "
                "or give {name: pictures}, or pictures and labels"
            )
        yield _Labelled(item[0], _name(item[1], names), f"item {place}")


def _names_of(dataset: Any) -> list[str]:  # noqa: ANN401 - torch.utils.data.Dataset
    """Return what a dataset, or the one that it is a part of, calls its classes."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return [str(name) for name in getattr(dataset, "classes", [])]


def _name(label: Any, names: Sequence[str]) -> str:  # noqa: ANN401 - a name or a number of some kind
    plain = label.item() if hasattr(label, "item") else label
    if isinstance(plain, str):
        return plain
    if type(plain) is not int:
        raise TypeError(f"a label is of type {type(plain).__name__}, expected a name or a whole number")
    if names and not 0 <= plain < len(names):
        raise ValueError(f"label {plain}, but the dataset names {len(names)} classes")
    return names[plain] if names else str(plain)


def _size(array: np.ndarray | Tensor) -> str:
    return f"{'a tensor' if isinstance(array, Tensor) else 'an array'} of {'×'.join(map(str, array.shape))}"


def _sorting(name: str) -> tuple[int, str]:
    """Return what names are sorted by: numbers by their value, before others."""
    return (int(name), "") if name.isdecimal() and len(name) < 10 else (10**10, name)
