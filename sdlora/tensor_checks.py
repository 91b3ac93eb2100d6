"""What tensors a file may hold: by name, type and shape, and finite. Torch's or numpy's, so it loads no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sdlora.records import regular_size, shown


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file as arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    regular_size(path)
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:
        fault = shown(str(error), 100)
        raise ValueError(f"{path}: not a whole safetensors file ({fault}); restore it") from error


def check_tensors(
    path: Path,
    tensors: Mapping[str, Any],
    expected: Mapping[str, tuple[int | str, ...]],
    sizes: dict[str, int],
) -> None:
    """Refuse the tensors of a file, torch's or numpy's, that are not these, float32 (`images`: int64) and finite.

    Args:
        expected: name → shape. A size that is a word is what `sizes` has of it, or what is found first, kept there.

    Raises:
        ValueError: they are others.
    """
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise ValueError(f"{path}: it lacks the tensor {shown(name)}; restore the file")
        if name not in expected:
            raise ValueError(f"{path}: the tensor {shown(name)} does not belong there; restore the file")
    for name, dimensions in expected.items():
        found, kind = tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")
        wanted = "int64" if name == "images" else "float32"
        if len(found) == len(dimensions):
            for word, size in zip(dimensions, found, strict=True):
                if isinstance(word, str):
                    sizes.setdefault(word, size)
        right = tuple(sizes.get(word, word) if isinstance(word, str) else word for word in dimensions)
        if found != right or kind != wanted:
            told = [f"{of} {'×'.join(map(str, shape))}" for of, shape in ((kind, found), (wanted, right))]
            raise ValueError(f"{path}: {shown(name)} is {told[0]}, expected {told[1]}; restore the file")
        require_finite(path, {name: tensors[name]})


def direction_shapes(task: str, targets: Sequence[str]) -> dict[str, tuple[int | str, ...]]:
    """Return what the file of a task's direction holds: B (rows, r) and A (r, columns) of every target."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for target in targets:
        rank = f"rank of {task} at {target}"
        shapes |= {
            f"{target}.up": (f"rows of {target}", rank),
            f"{target}.down": (rank, f"columns of {target}"),
        }
    return shapes


def require_finite(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse tensors, torch's or numpy's, with a value that is no number.

    Raises:
        ValueError: there is one.
    """
    for name, tensor in tensors.items():
        if not np.isfinite(np.asarray(tensor)).all():
            raise ValueError(f"{path}: {shown(name)} holds NaN or infinity; restore the file")
