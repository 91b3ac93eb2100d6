"""A picture is what a viewer shows of it: whatever its file says beside, and in whatever bits it says it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data import decoding
from pipelines.data.decoding import open_picture, opened_picture, picture_hash, strict_pictures
from pipelines.data.source_files import image_bytes
from tests.support.case_files import (
    GREY_TAGS,
    RGB,
    chunk,
    encoded,
    grey_tiff,
    keyed_png,
    tiff,
    with_chunks,
)
from tests.support.fuzzing import assert_line, quiet_libraries

PLAIN = encoded(Image.fromarray(RGB))
TURNED = Image.Exif()
TURNED[0x0112] = 6


def pixels(data: bytes) -> np.ndarray:
    with strict_pictures(), quiet_libraries():
        return np.asarray(open_picture(data))


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError, match=r".") as caught, strict_pictures(), quiet_libraries():
        open_picture(data)
    assert_line(str(caught.value))
    return str(caught.value)


# ---- what is transparent


def test_a_picture_with_clear_pixels_is_one_as_png_and_as_webp_whatever_colour_they_hide() -> None:
    clear = np.dstack([RGB, np.full((40, 40), 255, np.uint8)])
    clear[10:30, 10:30, 3] = 0
    black = clear.copy()
    black[10:30, 10:30, :3] = 0
    white = clear.copy()
    white[10:30, 10:30] = 255
    files = [
        encoded(Image.fromarray(clear)),
        encoded(Image.fromarray(clear), "WEBP", lossless=True),
        encoded(Image.fromarray(black)),
        encoded(Image.fromarray(white[:, :, :3])),
    ]

    assert len({picture_hash(open_picture(data)) for data in files}) == 1
    np.testing.assert_array_equal(pixels(files[0]), white[:, :, :3])


def test_what_shows_through_a_half_clear_pixel_is_part_of_the_picture() -> None:
    half = Image.new("RGBA", (4, 4), (200, 40, 40, 128))

    assert pixels(encoded(half))[0, 0].tolist() == [227, 147, 147]
    assert picture_hash(open_picture(encoded(half))) != picture_hash(
        open_picture(encoded(half.convert("RGB")))
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_white_in_any_number_of_bits(bits: int) -> None:
    highest = 2**bits - 1
    values = np.full((4, 6), highest)
    values[1:3, 1:3] = 0
    values[0, 0] = 1

    found = pixels(keyed_png(values, bits, [0]))
    other = pixels(keyed_png(values, bits, [1]))

    one = 255 // highest if bits <= 8 else 0
    assert found.shape == (4, 6, 3)
    assert (found[1:3, 1:3] == 255).all()
    assert (found[0, 0] == one).all()
    assert (other[1:3, 1:3] == 0).all()
    assert (other[0, 0] == 255).all()
    assert (other[3] == 255).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_white_and_one_beside_it_is_not(bits: int) -> None:
    values = np.zeros((2, 2, 3), int)
    values[0, 0] = (1, 2, 3)
    values[0, 1] = (1, 2, 4)

    found = pixels(keyed_png(values, bits, [1, 2, 3]))

    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].max() <= 4
    assert found[1].max() == 0


def test_a_profile_leaves_the_transparency_of_grey_alone() -> None:
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    clear = Image.new("LA", (4, 4), (0, 0))

    assert (pixels(encoded(clear, icc_profile=bytes(profile))) == 255).all()


# ---- metadata


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000)), id="long-text"),
        pytest.param(chunk(b"tEXt", b"Comment\0hello", checksum=1), id="text-checksum"),
        pytest.param(chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 3_000_000)), id="long-profile"),
        pytest.param(chunk(b"iCCP", b"profile\0\0" + b"junk"), id="profile-of-junk"),
        pytest.param(chunk(b"iCCP", b"profile\0\7"), id="profile-of-a-kind-there-is-not"),
        pytest.param(chunk(b"iCCP", b"profile", checksum=1), id="profile-cut-off"),
        pytest.param(chunk(b"eXIf", b"junk"), id="exif-of-junk"),
        pytest.param(chunk(b"gAMA", b""), id="gamma-cut-off"),
        pytest.param(chunk(b"acTL", b"1"), id="animation-cut-off"),
        pytest.param(chunk(b"tIME", b"1", checksum=1), id="time-checksum"),
    ],
)
def test_a_fault_of_metadata_is_no_fault_of_the_picture(data: bytes) -> None:
    np.testing.assert_array_equal(pixels(with_chunks(PLAIN, data)), RGB)


def test_a_picture_is_upright_though_other_metadata_is_broken() -> None:
    turned = encoded(Image.fromarray(RGB).rotate(90), exif=TURNED)

    np.testing.assert_array_equal(pixels(with_chunks(turned, chunk(b"tEXt", b"a\0b", checksum=1))), RGB)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_broken_exif_is_no_fault_of_the_picture_in_any_format(file_format: str) -> None:
    options = (
        {"lossless": True} if file_format == "WEBP" else {"quality": 100} if file_format == "JPEG" else {}
    )
    data = bytearray(encoded(Image.fromarray(RGB), file_format, exif=TURNED, **options))
    if file_format == "TIFF":
        data = bytearray(encoded(Image.fromarray(RGB), file_format, tiffinfo={34665: 2**31, 270: "hello"}))
    else:
        at = data.index(b"MM\0*")
        data[at : at + 8] = b"\xff" * 8

    found = pixels(bytes(data))
    assert abs(found.astype(int) - pixels(encoded(Image.fromarray(RGB), file_format, **options))).max() == 0


def test_a_tiff_is_read_whatever_its_text_and_its_other_pages_are() -> None:
    several = encoded(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.new("RGB", (3, 3))])
    tags = {256: (4, [4]), 257: (4, [4]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    odd = tiff({**tags, 34665: (4, [2**31]), 700: (3, [7]), 34853: (4, [3])}, bytes(range(16)))

    np.testing.assert_array_equal(pixels(several), RGB)
    np.testing.assert_array_equal(pixels(odd).ravel(), range(16))


# ---- bits


def test_a_pgm_of_16_bits_is_read_by_its_own_range() -> None:
    values = struct.pack(">4H", 0, 1000, 2000, 4000)

    assert pixels(b"P5\n4 1\n4000\n" + values).ravel().tolist() == [0, 64, 128, 255]
    assert pixels(b"P5\n4 1\n65535\n" + values).ravel().tolist() == [0, 3, 7, 15]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        pytest.param(grey_tiff(sample_format=2), "its pixels are whole numbers without a range (mode I)", id="signed"),
        pytest.param(grey_tiff(2), "it is a TIFF of 2 channels of 16-bit whole numbers, which is not read", id="alpha"),
        pytest.param(grey_tiff(3), "it is a TIFF of 3 channels of 16-bit whole numbers, which is not", id="three"),
        pytest.param(grey_tiff()[:60], "it is no image that Pillow knows", id="cut-off"),
        pytest.param(grey_tiff(bits=64, sample_format=3), "a TIFF of 1 channel of 64-bit floating-point", id="doubles"),
        pytest.param(encoded(Image.new("F", (2, 2)), "TIFF"), "floating-point numbers without a range", id="floats"),
        pytest.param(encoded(Image.new("LAB", (2, 2)), "TIFF"), "its colours are L*a*b* (mode LAB)", id="lab"),
        pytest.param(b"", "it is empty", id="empty"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_called_what_it_is(data: bytes, fault: str) -> None:
    assert fault in refusal(data)


def test_upper_bits_are_what_is_seen_of_sixteen() -> None:
    values = np.arange(0, 65535, 17, dtype=np.uint16)[:3840].reshape(64, 60)

    for data in (encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF")):
        np.testing.assert_array_equal(pixels(data), values >> 8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_channels_in_planes_of_their_own_are_read_in_any_number_of_bits(bits: int, order: str) -> None:
    values = np.arange(48).reshape(3, 4, 4) * (5 if bits == 8 else 1300)
    planes = values.astype(f"{order}u{bits // 8}")
    tags = {**GREY_TAGS, 258: (3, [bits] * 3), 262: (3, [2]), 277: (3, [3]), 284: (3, [2])}

    found = pixels(tiff(tags, *(plane.tobytes() for plane in planes), order=order))

    np.testing.assert_array_equal(found.transpose(2, 0, 1), planes if bits == 8 else planes >> 8)


@pytest.mark.parametrize("white", [0, 1])
@pytest.mark.parametrize("bits", [8, 16])
def test_one_channel_is_read_whether_it_is_said_to_be_a_plane_or_not(bits: int, white: int) -> None:
    values = np.arange(16, dtype=f"<u{bits // 8}") * (10 if bits == 8 else 3000)
    tags = {**GREY_TAGS, 258: (3, [bits]), 262: (3, [white]), 277: (3, [1])}

    found = [pixels(tiff({**tags, 284: (3, [planes])}, values.tobytes())) for planes in (1, 2)]

    np.testing.assert_array_equal(*found)


# ---- files


def test_only_a_regular_file_is_read_and_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "log.png").symlink_to("/proc/kmsg")
    (tmp_path / "folder.png").mkdir()
    with open(tmp_path / "holes.png", "wb") as file:
        file.truncate(3 * 2**30)
    (tmp_path / "plain.png").write_bytes(PLAIN)
    (tmp_path / "link.png").symlink_to("plain.png")

    for name, fault in {
        "pipe.png": "it is a pipe, not a file",
        "zero.png": "it is a device, not a file",
        "folder.png": "it is a folder, not a file",
        "holes.png": "it has 3,221,225,472 bytes, more than 536,870,912",
    }.items():
        with pytest.raises(ValueError, match=fault):
            image_bytes(tmp_path / name)
    assert image_bytes(tmp_path / "link.png") == PLAIN
    assert not Path("/proc/kmsg").exists() or image_bytes(tmp_path / "log.png") == b""


# ---- memory


def test_threads_wait_until_there_is_room_for_a_large_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_ROOM", decoding._Room(1000))
    opened, most, lock = 0, 0, threading.Lock()

    def look(_: int) -> None:
        nonlocal opened, most
        with opened_picture(PLAIN):
            with lock:
                opened += 1
                most = max(most, opened)
            time.sleep(0.05)
            with lock:
                opened -= 1

    with strict_pictures(), ThreadPoolExecutor(3) as pool:
        list(pool.map(look, range(3)))
    assert most == 1


def test_a_large_picture_takes_little_more_than_its_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (6_000, 6_000), "red").save(tmp_path / "large.png", compress_level=1)
    program = """
import resource, sys
from pathlib import Path
import imagehash, numpy, PIL.Image
from pipelines.data.decoding import opened_picture, picture_hash, strict_pictures
from pipelines.data.duplicates import perceptual_hash
from pipelines.data.source_files import image_bytes

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with strict_pictures(), opened_picture(image_bytes(Path(sys.argv[1]))) as picture:
    picture_hash(picture), perceptual_hash(picture)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "large.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 1.3 * 4 * 6_000**2 / 1024
