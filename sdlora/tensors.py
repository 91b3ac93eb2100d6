"""Tensors in safetensors files: sorted keys, fixed metadata, so that equal tensors give equal bytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

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
    data = path.read_bytes()
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); make it again") from error


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the file at `path` as the file itself holds them, not in memory: to copy from, not to keep.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); make it again") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
