"""Tensors in files: the same from memory and from the file itself, and no broken file is read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora.tensors import mapped_tensors, read_tensors, write_tensors

Reader = Callable[[Path], dict[str, torch.Tensor]]
READERS = pytest.mark.parametrize("read", [read_tensors, mapped_tensors], ids=["read", "mapped"])
TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2]), "none": torch.zeros(0, 4)}


@READERS
def test_tensors_come_back_to_the_bit(read: Reader, tmp_path: Path) -> None:
    write_tensors(tmp_path / "folder/some.safetensors", TENSORS)

    found = read(tmp_path / "folder/some.safetensors")

    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)
    assert [found[name].dtype for name in TENSORS] == [tensor.dtype for tensor in TENSORS.values()]


@READERS
def test_a_file_that_is_cut_off_is_named(read: Reader, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(
        ValueError, match=r"some\.safetensors: not a whole safetensors file .*; make it again"
    ):
        read(path)


@READERS
def test_a_missing_file_is_one(read: Reader, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        read(tmp_path / "missing.safetensors")


def test_what_is_written_over_the_file_later_is_not_in_the_tensors_that_were_read(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, TENSORS)
    found = read_tensors(path)

    write_tensors(path, {name: tensor + 1 for name, tensor in TENSORS.items()})

    assert torch.equal(found["b"], TENSORS["b"])
