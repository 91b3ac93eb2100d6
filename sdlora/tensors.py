"""Tensors in safetensors files: sorted keys, fixed metadata, so that equal tensors give equal bytes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sdlora.records import regular_size, shown

_METADATA = {"format": "pt"}


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the file's bytes. They depend on names and values only."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(ordered, metadata=_METADATA)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` to `path`, making its folder where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tensor_bytes(tensors))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the file at `path`, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    regular_size(path)
    with _whole(path):
        return safetensors.torch.load(path.read_bytes())


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the file at `path` as the file itself holds them, not in memory: to copy from, not to keep.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    regular_size(path)
    with _whole(path):
        return safetensors.torch.load_file(path)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Name the file that safetensors, or torch, cannot make tensors of."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        fault = shown(str(error), 100)
        raise ValueError(f"{path}: not a whole safetensors file ({fault}); make it again") from error
