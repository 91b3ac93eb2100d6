import errno
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.decoding import (
    decode,
    decoding_threads,
    in_parallel,
    open_picture,
    picture_hash,
    strict_pictures,
)
from pipelines.data.packed import ImageRow, SampleRow, read_images, write_images, write_samples
from pipelines.project.errors import InputError
from pipelines.runtime.memory import device_room, free_memory, memory_room
from sdlora.preprocessing import Preprocessing
from tests.support.repository import REPOSITORY

NOISE = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def rows_of(*images: bytes) -> list[ImageRow]:
    return [ImageRow(f"t01/train/a/{i}.png", i, image, "s", "p") for i, image in enumerate(images)]


def table_of(tmp_path: Path, *images: bytes) -> pa.Table:
    write_images(tmp_path / "images.arrow", rows_of(*images))
    return read_images(tmp_path / "images.arrow")


def decoded(
    tmp_path: Path,
    *images: Image.Image,
    channels: int = 3,
    size: tuple[int, int] = (4, 4),
    crop_pct: float = 1.0,
) -> np.ndarray:
    table = table_of(tmp_path, *(encoded(image) for image in images))
    return decode(table, preprocessing(channels=channels, size=size, crop_pct=crop_pct))


def preprocessing(
    *, channels: int = 3, size: tuple[int, int] = (4, 4), crop_pct: float = 1.0
) -> Preprocessing:
    return Preprocessing(
        input_size=(channels, *size),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation="bilinear",
        crop_pct=crop_pct,
        crop_mode="center",
    )


def test_images_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = rows_of(b"abc", b"", b"\x00")

    write_images(tmp_path / "images.arrow", rows)

    table = read_images(tmp_path / "images.arrow")
    assert [ImageRow(**row) for row in table.to_pylist()] == rows
    assert table.schema.names == ["id", "label", "image", "sha256", "pixels"]
    assert table.schema.field("label").type == pa.int32()
    assert table["image"].num_chunks == 1


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [SampleRow("t01/test/a/1.png", "test", 3, "s", "p", "h")]

    write_samples(tmp_path / "samples.arrow", rows)

    assert [SampleRow(**row) for row in read_images(tmp_path / "samples.arrow").to_pylist()] == rows


def test_equal_rows_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, rows_of(b"abc", b"defg"))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_missing_file_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.arrow: the file is missing; run `sdlora run`"):
        read_images(tmp_path / "train.arrow")


def test_a_cut_off_file_of_images_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train.arrow", rows_of(b"abc"))
    whole = (tmp_path / "train.arrow").read_bytes()
    (tmp_path / "train.arrow").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InputError, match=r"train\.arrow: not an Arrow file .*; delete it"):
        read_images(tmp_path / "train.arrow")


def test_an_image_of_the_exact_size_is_not_resampled(tmp_path: Path) -> None:
    out = decoded(tmp_path, Image.fromarray(NOISE), size=(6, 5))

    np.testing.assert_array_equal(out[0].transpose(1, 2, 0), NOISE)


def test_the_shorter_side_is_scaled_and_the_centre_cut_out(tmp_path: Path) -> None:
    wide = Image.new("RGB", (24, 8), "red")
    wide.paste("blue", (8, 0, 16, 8))

    out = decoded(tmp_path, wide, size=(8, 8))

    np.testing.assert_array_equal(out[0], np.asarray(Image.new("RGB", (8, 8), "blue")).transpose(2, 0, 1))


def test_the_embedded_pictures_are_decoded_to_their_own_pixels(tmp_path: Path) -> None:
    embedded = REPOSITORY / "pipelines/data/embedded/glyphs100/glyphs100.arrow"
    images = [bytes(image) for image in pa.ipc.open_file(embedded).read_all()["image"][::400].to_pylist()]
    expected = [np.asarray(Image.open(io.BytesIO(image))) for image in images]

    out = decode(table_of(tmp_path, *images), preprocessing(channels=1, size=(32, 32)))

    np.testing.assert_array_equal(out[:, 0], expected)


def test_crop_pct_cuts_the_border_off(tmp_path: Path) -> None:
    framed = Image.new("L", (8, 8), 255)
    framed.paste(0, (2, 2, 6, 6))

    out = decoded(tmp_path, framed, channels=1, size=(4, 4), crop_pct=0.5)

    np.testing.assert_array_equal(out, np.zeros((1, 1, 4, 4), np.uint8))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (3, 4), (300, 7)])
def test_images_of_any_shape_fill_a_size_of_any_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    out = decoded(tmp_path, Image.new("L", shape, 200), size=(5, 3), crop_pct=0.9)

    assert out.shape == (1, 3, 5, 3)
    assert (out == 200).all()


def test_colour_becomes_grey_and_grey_becomes_colour(tmp_path: Path) -> None:
    colour, grey = Image.new("RGB", (4, 4), (10, 10, 10)), Image.new("L", (4, 4), 10)

    assert (decoded(tmp_path, colour, grey, channels=1) == 10).all()
    assert (decoded(tmp_path, colour, grey, channels=3) == 10).all()


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    assert (decoded(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == 255).all()


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 256 * 7, 65535, 32768]], np.uint16))

    assert decoded(tmp_path, deep, channels=1, size=(1, 4)).ravel().tolist() == [0, 7, 255, 128]


def test_a_picture_that_the_camera_turned_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_picture(encoded(Image.fromarray(NOISE).rotate(90, expand=True), exif=exif))

    np.testing.assert_array_equal(np.asarray(turned), NOISE)


@pytest.mark.parametrize(
    ("mode", "file_format", "found"),
    [
        pytest.param("1", "PNG", "L", id="bilevel"),
        pytest.param("L", "JPEG", "L", id="grey-jpeg"),
        pytest.param("LA", "PNG", "RGB", id="grey-with-alpha"),
        pytest.param("P", "PNG", "RGB", id="palette"),
        pytest.param("P", "GIF", "RGB", id="gif"),
        pytest.param("RGB", "JPEG", "RGB", id="jpeg"),
        pytest.param("RGB", "BMP", "RGB", id="bmp"),
        pytest.param("RGB", "TIFF", "RGB", id="tiff"),
        pytest.param("RGB", "WEBP", "RGB", id="webp"),
        pytest.param("RGBA", "PNG", "RGB", id="alpha"),
        pytest.param("RGBA", "WEBP", "RGB", id="webp-with-alpha"),
        pytest.param("CMYK", "JPEG", "RGB", id="cmyk-jpeg"),
        pytest.param("CMYK", "TIFF", "RGB", id="cmyk-tiff"),
        pytest.param("YCbCr", "JPEG", "RGB", id="ycbcr"),
        pytest.param("I;16", "PNG", "L", id="16-bit-png"),
        pytest.param("I;16", "TIFF", "L", id="16-bit-tiff"),
    ],
)
def test_every_kind_of_image_opens_as_8_bit_grey_or_colour(mode: str, file_format: str, found: str) -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    if mode == "I;16":
        picture = Image.fromarray(np.full((16, 16), 85 * 257, np.uint16))
    elif mode == "P":
        picture = red.quantize(2)
    else:
        picture = red.convert(mode)
    if mode == "RGBA":  # an opaque one may be stored without its alpha
        picture.putalpha(254)

    opened = open_picture(encoded(picture, file_format))

    assert (opened.mode, opened.size) == (found, (16, 16))
    level = np.asarray(opened.convert("L"), np.int64)
    if mode == "1":  # dithered
        assert set(np.unique(level)) == {0, 255}
    else:
        assert abs(level - 88).max() <= 4


def exchanged_profile() -> bytes:
    """sRGB's own profile with the primaries of red and green exchanged, under another name."""
    from PIL import ImageCms

    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "GRBx".encode("utf-16-be"))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_are_those_that_the_profile_means(file_format: str) -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 40))
    options = {"quality": 100} if file_format in ("JPEG", "WEBP") else {}

    opened = open_picture(encoded(red, file_format, icc_profile=exchanged_profile(), **options))

    assert abs(np.asarray(opened, np.int64)[8, 8] - (40, 200, 40)).max() <= 5


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_profile_leaves_transparency_alone(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 40, 40, 0)).convert(mode)
    options: dict[str, object] = {"transparency": 0} if mode == "P" else {}

    opened = open_picture(encoded(clear, icc_profile=exchanged_profile(), **options))

    assert np.asarray(opened).min() == 255


@pytest.mark.parametrize("name", ["junk", "srgb", "of-another-space"])
def test_a_profile_of_srgb_or_of_no_use_changes_no_pixel(name: str) -> None:
    from PIL import ImageCms

    profiles = {
        "junk": b"junk",
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "of-another-space": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    }

    opened = open_picture(encoded(Image.fromarray(NOISE), icc_profile=profiles[name]))

    np.testing.assert_array_equal(np.asarray(opened), NOISE)


def test_the_first_page_of_several_is_the_picture() -> None:
    first, second = Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 200)

    opened = open_picture(encoded(first, "TIFF", save_all=True, append_images=[second]))

    assert opened.getextrema() == (10, 10)


def test_the_same_picture_has_one_hash_in_every_encoding() -> None:
    grey = Image.fromarray(NOISE[:, :, 0])
    same = [
        encoded(grey), encoded(grey, compress_level=0), encoded(grey, "BMP"), encoded(grey.convert("RGB")),
        encoded(grey.convert("P")), encoded(grey.convert("RGBA")), encoded(grey, "WEBP", lossless=True),
    ]  # fmt: skip

    assert len(set(same)) == len(same)
    assert len({picture_hash(open_picture(data)) for data in same}) == 1


def test_other_pixels_or_another_shape_have_another_hash() -> None:
    grey = Image.fromarray(NOISE[:, :, 0])
    changed = grey.copy()
    changed.putpixel((0, 0), 255 - NOISE[0, 0, 0].item())
    others = [grey, changed, grey.reduce(2), Image.frombytes("L", (6, 5), grey.tobytes())]

    assert len({picture_hash(image) for image in others}) == len(others)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"hello", "it is no image", id="text"),
        pytest.param(encoded(Image.fromarray(NOISE))[:60], "truncated|broken|incomplete", id="cut-off"),
        pytest.param(
            encoded(Image.new("F", (2, 2)), "TIFF"), r"floating-point numbers .* \(mode F\)", id="floats"
        ),
    ],
)
def test_a_picture_that_cannot_be_decoded_says_why(data: bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault), strict_pictures():
        open_picture(data)


@pytest.mark.parametrize("limit", [29, 14])
def test_a_huge_picture_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"more than {limit} pixels"), strict_pictures(limit):
        open_picture(encoded(Image.fromarray(NOISE)))


def test_the_limit_can_be_chosen_and_holds_while_pictures_are_opened_only() -> None:
    usual = Image.MAX_IMAGE_PIXELS

    with strict_pictures(29), pytest.raises(ValueError, match="more than 29 pixels"):
        open_picture(encoded(Image.fromarray(NOISE)))
    with strict_pictures(30):
        assert open_picture(encoded(Image.fromarray(NOISE))).size == (5, 6)
    assert usual == Image.MAX_IMAGE_PIXELS


def test_what_was_packed_is_decoded_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)

    assert decoded(tmp_path, Image.fromarray(NOISE)).shape == (1, 3, 4, 4)


def test_decoding_names_a_broken_image(tmp_path: Path) -> None:
    table = table_of(tmp_path, b"hello")

    with pytest.raises(InputError, match=r"t01/train/a/0\.png: it is no image"):
        decode(table, preprocessing())


def test_a_strip_that_would_fill_the_memory_when_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match="it is 5000×2, one side more than 100 times the other; cut it"):
        open_picture(encoded(Image.new("L", (5000, 2))))


def test_no_format_is_opened_for_which_pillow_starts_another_program() -> None:
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="it is no image that Pillow knows"):
        open_picture(drawing)


def test_damage_anywhere_in_a_file_of_images_is_one_line_or_none(tmp_path: Path) -> None:
    path = tmp_path / "images.arrow"
    write_images(path, rows_of(*(encoded(Image.new("L", (4, 4), value)) for value in range(3))))
    whole = path.read_bytes()
    said = set()
    for at in range(0, len(whole), 7):
        data = bytearray(whole)
        data[at] ^= 0xFF
        path.write_bytes(data)
        try:
            read_images(path).to_pylist()
        except InputError as error:
            said.add(str(error).partition(" (")[0])
    assert said == {f"{path}: not an Arrow file"}


@pytest.mark.parametrize(
    ("threads", "expected"), [("1", 1), ("2,4", 2), ("900", 3), ("0", 3), ("", 3), ("x", 3)]
)
def test_the_processors_of_this_process_decode_or_as_many_as_omp_num_threads_says(
    monkeypatch: pytest.MonkeyPatch, threads: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5, 7})
    monkeypatch.setenv("OMP_NUM_THREADS", threads)

    assert decoding_threads() == expected


def test_work_in_threads_comes_back_in_order_and_is_not_far_ahead_of_whoever_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.data.decoding.decoding_threads", lambda: 3)
    begun: list[int] = []

    def work(index: int) -> int:
        begun.append(index)
        return -index

    found = in_parallel(work, range(10_000))

    assert [next(found) for _ in range(5)] == [0, -1, -2, -3, -4]
    assert len(begun) < 100
    assert list(found) == [-index for index in range(5, 10_000)]


def test_images_without_room_in_memory_are_the_same_from_a_file_that_nobody_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = table_of(tmp_path, *(encoded(Image.fromarray(NOISE[:, :, index])) for index in range(3)))
    way = preprocessing()
    size = 3 * 3 * 4 * 4
    held, mapped = decode(table, way, room=size), decode(table, way, room=size - 1)
    assert not (tmp_path / ".sdlora").exists() or list((tmp_path / ".sdlora").iterdir()) == []
    assert type(held.base).__name__ != "mmap"
    assert type(mapped.base).__name__ == "mmap"
    assert np.array_equal(held, mapped)
    mapped += 1  # as writable as any


def test_a_disk_that_is_full_is_an_error_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left") as found:
        decode(table_of(tmp_path, encoded(Image.fromarray(NOISE))), preprocessing(), room=0)
    assert found.value.filename == ".sdlora"


def test_room_is_what_is_set_or_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.runtime.memory.CGROUP", tmp_path)
    whole = free_memory()
    assert 0 < memory_room() <= whole
    assert device_room() is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 150000\nactive_file 50000\nfile 9\n")
    assert free_memory() > 10**6
    (tmp_path / "memory.max").write_text("1300000\n")
    assert (free_memory(), memory_room()) == (1_000_000, 500_000)
    monkeypatch.setenv("SDLORA_IMAGES_GIB", "0.5")
    assert memory_room() == device_room() == 2**29
    monkeypatch.setenv("SDLORA_IMAGES_GIB", "half")
    with pytest.raises(
        InputError, match=r"^SDLORA_IMAGES_GIB: 'half' is no number of GiB; set one, or none$"
    ):
        memory_room()
