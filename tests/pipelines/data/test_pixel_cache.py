"""Decoded test images are kept, found by what decides their pixels, and never believed without their checksum."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.data import pixel_cache
from pipelines.data.decoding import decode
from pipelines.data.packed import ImageRow, read_images, write_images
from pipelines.data.pixel_cache import PackedImages, pixel_batches
from pipelines.project.environment import DECODED_GIB
from pipelines.project.errors import InputError
from pipelines.project.fingerprints import fingerprint_of
from pipelines.project.layout import DECODED
from sdlora.preprocessing import Preprocessing
from tests.support.chains import TINY_PREPROCESSING as WAY
from tests.support.chains import encoded, picture

CPU = torch.device("cpu")
SIZE = 3 * 8 * 8 + 32
"""Bytes of an image with its checksum."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DECODED_GIB, raising=False)
    return tmp_path


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the images that are decoded, as they are."""
    found: list[str] = []

    def decode_one(table: object, index: int, preprocessing: Preprocessing) -> np.ndarray:
        found.append(str(table["id"][index]))  # type: ignore[index]
        return original(table, index, preprocessing)

    original: Callable[..., np.ndarray] = pixel_cache.decode_one
    monkeypatch.setattr(pixel_cache, "decode_one", decode_one)
    return found


def pack(name: str, *, count: int, seed: int = 0) -> Path:
    path = Path(name)
    images = [encoded(picture(seed + index)) for index in range(count)]
    write_images(path, [ImageRow(f"{path.stem}/{i}", 0, image, "s", "p") for i, image in enumerate(images)])
    return path


def batches(*paths: Path, size: int = 4, way: Preprocessing = WAY) -> list[torch.Tensor]:
    return list(pixel_batches([PackedImages(path, way) for path in paths], batch_size=size, device=CPU))


def expected(*paths: Path, way: Preprocessing = WAY) -> np.ndarray:
    return np.concatenate([decode(read_images(path), way) for path in paths])


def kept() -> list[Path]:
    return sorted(DECODED.iterdir()) if DECODED.is_dir() else []


def assert_right(found: list[torch.Tensor], *paths: Path) -> None:
    np.testing.assert_array_equal(torch.cat(found).numpy(), expected(*paths))


def test_the_batches_are_the_decoded_images_in_order_and_none_spans_two_files() -> None:
    paths = [
        pack("t01.arrow", count=10),
        pack("t02.arrow", count=3, seed=50),
        pack("t03.arrow", count=4, seed=90),
    ]

    found = batches(*paths)

    assert [len(batch) for batch in found] == [4, 4, 2, 3, 4]
    assert_right(found, *paths)


def test_an_image_is_decoded_once_however_many_steps_are_tested_on_it(decodings: list[str]) -> None:
    first, second = pack("t01.arrow", count=10), pack("t02.arrow", count=3, seed=50)

    batches(first)
    decodings.clear()
    found = batches(first, second)
    assert sorted(decodings) == ["t02/0", "t02/1", "t02/2"]
    again = batches(first, second, size=2)

    assert len(decodings) == 3
    assert_right(found, first, second)
    assert_right(again, first, second)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"interpolation": "bilinear"}, id="interpolation"),
        pytest.param({"crop_pct": 0.5}, id="crop"),
        pytest.param({"crop_mode": "border"}, id="crop-mode"),
        pytest.param({"input_size": (3, 6, 8)}, id="size"),
        pytest.param({"mean": (0.2, 0.3, 0.4), "crop_mode": "border"}, id="colour-of-the-border"),
    ],
)
def test_what_changes_the_pixels_is_decoded_anew(decodings: list[str], change: dict[str, object]) -> None:
    path, way = pack("t01.arrow", count=5), replace(WAY, **change)  # type: ignore[arg-type]
    batches(path)

    found = batches(path, way=way)

    assert len(decodings) == 10
    np.testing.assert_array_equal(torch.cat(found).numpy(), expected(path, way=way))


def test_other_images_under_the_same_name_are_decoded_anew(decodings: list[str]) -> None:
    batches(pack("t01.arrow", count=5))

    path = pack("t01.arrow", count=5, seed=70)

    assert_right(batches(path), path)
    assert len(decodings) == 10


def test_another_version_of_the_decoder_decodes_anew(
    decodings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack("t01.arrow", count=5)
    batches(path)

    monkeypatch.setattr(pixel_cache, "decoder", lambda: {"pillow": "1.0"})
    batches(path)

    assert len(decodings) == 10


def test_the_decoder_names_the_libraries_that_make_pixels() -> None:
    found = pixel_cache.decoder()

    assert found["pillow"] == Image.__version__
    assert found["libjpeg_turbo"]
    code = [fingerprint_of(part) for part in (PackedImages, Preprocessing)]
    assert found["code"] == [part.sha256 for part in code]
    names = {definition.name for part in code for definition in part.definitions}
    assert {"decode_one", "opened_picture", "without_metadata", "on_white", "Preprocessing"} <= names


@pytest.mark.parametrize("place", [0, 3 * SIZE + 5, -1], ids=["first", "a-pixel", "a-checksum"])
def test_a_damaged_image_is_decoded_again_and_the_file_goes(
    decodings: list[str], capsys: pytest.CaptureFixture[str], place: int
) -> None:
    path = pack("t01.arrow", count=5)
    batches(path)
    (file,) = kept()
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    decodings.clear()

    assert_right(batches(path), path)

    assert len(decodings) == 1
    assert "is damaged" in capsys.readouterr().err
    assert kept() == []


def test_a_file_under_another_ones_name_is_not_believed(decodings: list[str]) -> None:
    first, second = pack("t01.arrow", count=5), pack("t02.arrow", count=5, seed=50)
    batches(first)
    (one,) = kept()
    batches(second)
    (other,) = set(kept()) - {one}
    os.replace(one, other)
    decodings.clear()

    assert_right(batches(second), second)

    assert len(decodings) == 5


@pytest.mark.parametrize("content", [b"", b"x" * 17], ids=["empty", "cut-off"])
def test_a_file_of_another_length_is_made_again(decodings: list[str], content: bytes) -> None:
    path = pack("t01.arrow", count=5)
    batches(path)
    (file,) = kept()
    whole = file.read_bytes()
    file.write_bytes(content)

    assert_right(batches(path), path)

    assert file.read_bytes() == whole
    assert len(decodings) == 10


def test_the_folder_may_be_deleted_while_it_is_read() -> None:
    path = pack("t01.arrow", count=10)
    batches(path)

    found: list[torch.Tensor] = []
    for batch in pixel_batches([PackedImages(path, WAY)], batch_size=4, device=CPU):
        found.append(batch)
        for file in kept():
            file.unlink()
    DECODED.rmdir()

    assert_right(found, path)
    assert_right(batches(path), path)


def test_two_processes_that_decode_the_same_leave_one_whole_file(decodings: list[str]) -> None:
    path = pack("t01.arrow", count=10)
    slow = pixel_batches([PackedImages(path, WAY)], batch_size=4, device=CPU)
    first = next(slow)

    assert_right(batches(path), path)  # it begins and ends while the other one is at it
    assert_right([first, *slow], path)

    assert len(kept()) == 1
    decodings.clear()
    assert_right(batches(path), path)
    assert decodings == []


def test_what_was_interrupted_leaves_nothing() -> None:
    working = pixel_batches([PackedImages(pack("t01.arrow", count=10), WAY)], batch_size=4, device=CPU)
    next(working)
    assert len(kept()) == 1

    working.close()

    assert kept() == []


def test_a_picture_that_cannot_be_decoded_is_named_and_nothing_kept(folder: Path) -> None:
    path = folder / "t01.arrow"
    write_images(
        path, [ImageRow("t01/a", 0, encoded(picture(1)), "s", "p"), ImageRow("t01/b", 0, b"no", "s", "p")]
    )

    with pytest.raises(InputError, match=r"^t01/b: .*; replace the image$"):
        batches(path)

    assert kept() == []


def test_a_full_disk_costs_a_line_and_no_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixel_cache, "_write", full)
    path = pack("t01.arrow", count=10)

    assert_right(batches(path), path)

    assert capsys.readouterr().err.count("are not kept in .sdlora/decoded") == 1
    assert kept() == []


def test_a_folder_that_cannot_be_made_costs_a_line_and_no_image(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".sdlora").write_text("a file")
    path = pack("t01.arrow", count=10)

    assert_right(batches(path), path)

    assert capsys.readouterr().err.count("are not kept") == 1


def test_images_of_no_file_are_no_trouble(folder: Path) -> None:
    path = folder / "t01.arrow"
    write_images(path, [])

    assert batches(path) == []
    assert batches() == []


# ---- room


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set how many images of `WAY` may be kept."""

    def set_room(images: int) -> None:
        monkeypatch.setenv(DECODED_GIB, repr(images * SIZE / 2**30))

    return set_room


def test_zero_keeps_and_reads_nothing(decodings: list[str], room: Callable[[int], None]) -> None:
    path = pack("t01.arrow", count=5)
    batches(path)

    room(0)
    assert_right(batches(path), path)

    assert len(decodings) == 10


def test_what_was_not_used_for_longest_makes_room(room: Callable[[int], None]) -> None:
    paths = [pack(f"t0{index}.arrow", count=5, seed=20 * index) for index in range(3)]
    files = []
    for age, path in zip((300, 100, 0), paths, strict=True):
        room(10)
        before = set(kept())
        batches(path)
        (new,) = set(kept()) - before
        files.append(new)
        os.utime(new, (time.time() - age, time.time() - age))

    assert set(kept()) == {files[1], files[2]}


def test_what_this_evaluation_uses_does_not_make_room(
    decodings: list[str], room: Callable[[int], None]
) -> None:
    paths = [pack(f"t0{index}.arrow", count=5, seed=20 * index) for index in range(3)]
    room(10)
    batches(*paths)
    decodings.clear()

    batches(*paths)

    assert len(kept()) == 2
    assert sorted(decodings) == [f"t02/{index}" for index in range(5)]


def test_more_than_there_is_room_for_removes_nothing(room: Callable[[int], None]) -> None:
    small, large = pack("t01.arrow", count=5), pack("t02.arrow", count=11, seed=50)
    room(10)
    batches(small)
    before = kept()

    assert_right(batches(large), large)

    assert kept() == before


def test_half_of_the_free_disk_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2 * 5 * SIZE - 2})
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda path: usage)

    batches(pack("t01.arrow", count=5))
    assert kept() == []
    batches(pack("t02.arrow", count=4))

    assert len(kept()) == 1


def test_the_old_and_the_abandoned_go_and_nothing_else(folder: Path) -> None:
    path = pack("t01.arrow", count=5)
    batches(path)
    (file,) = kept()
    partial = DECODED / f"{file.name}.{'0' * 32}.partial"
    young = DECODED / f"{file.name}.{'1' * 32}.partial"
    for stranger in (partial, young, DECODED / "notes.txt"):
        stranger.write_bytes(b"x")
    hours = time.time() - 2 * 3600
    days = time.time() - 31 * 86400
    os.utime(partial, (hours, hours))
    for name in (file, DECODED / "notes.txt"):
        os.utime(name, (days, days))

    batches(pack("t02.arrow", count=5, seed=50))

    left = set(kept())
    assert {young, DECODED / "notes.txt"} < left
    assert not {file, partial} & left


@pytest.mark.parametrize("text", ["much", "nan", "inf"])
def test_a_budget_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(DECODED_GIB, text)

    with pytest.raises(
        InputError, match=rf"^SDLORA_DECODED_GIB: '{text}' is no number of GiB; set one, or 0"
    ):
        batches(pack("t01.arrow", count=1))
