from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.data.packed import ImageRow, SampleRow, write_images, write_stored_images
from pipelines.data.scratch_files import ByteStore, scratch_tensor

WORDS = [b"abc", b"", b"\x00\x01", b"defgh", b"", b"i"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stored(chosen: list[int]) -> pa.LargeBinaryArray:
    """Some of the words, from the disk."""
    with ByteStore() as store:
        for word in WORDS:
            store.append(word)
        return store.column(np.array(chosen, dtype=np.int64))


@pytest.mark.parametrize(
    "chosen", [[], [0], [1], [1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 2, 5], [1, 4], [4, 5]], ids=str
)
def test_bytes_come_back_in_their_order_whichever_are_chosen(chosen: list[int]) -> None:
    column = stored(chosen)

    column.validate(full=True)
    assert column.to_pylist() == [WORDS[place] for place in chosen]
    assert not list(Path(".sdlora").iterdir())  # the file has no name


def test_images_from_the_disk_make_the_bytes_of_images_in_memory() -> None:
    rows = [ImageRow(f"t01/test/a/{i}.png", i, word, "s" * i, "p") for i, word in enumerate(WORDS)]
    samples = [SampleRow(row.id, "test", row.label, row.sha256, row.pixels, "") for row in rows]
    for chosen in ([], [1, 2, 3], [0, 3, 5]):
        write_images(Path("memory.arrow"), [rows[place] for place in chosen])
        write_stored_images(Path("disk.arrow"), [samples[place] for place in chosen], stored(list(chosen)))

        assert Path("memory.arrow").read_bytes() == Path("disk.arrow").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_without_room_in_memory_is_as_any_other(dtype: torch.dtype) -> None:
    held, mapped = (scratch_tensor((3, 5), dtype, room=room) for room in (1000, 0))
    for tensor in (held, mapped):
        tensor.copy_(torch.arange(15).view(3, 5))

    assert held.dtype == mapped.dtype == dtype
    assert torch.equal(held, mapped)
