"""Whatever stands in an image file or a manifest, it is read, or one line says why not."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.data.decoding import open_picture, picture_hash, strict_pictures
from pipelines.data.duplicates import perceptual_hash
from pipelines.data.source_files import image_bytes
from pipelines.data.sources import class_names, task_images
from pipelines.project.errors import InputError
from pipelines.project.settings import Data
from tests.support.case_files import RGB, chunk, encoded, grey_tiff, keyed_png, with_chunks
from tests.support.fuzzing import CASES, SEARCH, assert_answered, assert_line, quiet_libraries

# ---- mutations of bytes


@st.composite
def mutated(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """One of some valid files, with a few changes: bytes flipped, numbers made large, pieces cut, doubled, mixed."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        # Most of what matters stands at the beginning.
        size = draw(st.sampled_from([64, 512, len(data), len(data)]))
        at = draw(st.integers(0, max(0, min(size, len(data)) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 12, 100]))
        kind = draw(st.sampled_from(["flip", "number", "cut", "insert", "double", "end", "mix"]))
        if kind == "flip":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":
            value = draw(st.sampled_from([0, 1, 0x7F, 0xFF]))
            data[at : at + length] = bytes([value]) * length
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "double":
            data[at:at] = data[at : at + length]
        elif kind == "end":
            del data[at:]
        else:
            other = draw(st.sampled_from(whole))
            data[at : at + length] = other[at : at + length]
    return bytes(data)


# ---- pictures


@functools.cache
def pictures() -> list[bytes]:
    """Small pictures in every format and kind that is read, with metadata of every kind."""
    colour = Image.fromarray(RGB[:12, :10])
    grey, deep = colour.convert("L"), Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10) * 500)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    exif.get_ifd(0x8769)[0xA002] = 10
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    said = {
        "exif": exif,
        "icc_profile": profile.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be")),
    }
    said["xmp"] = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="3"/></x:xmpmeta>'
    png_said = {"exif": exif, "icc_profile": said["icc_profile"]}
    return [
        encoded(colour, **png_said), encoded(colour.quantize(8), transparency=1), encoded(deep),
        encoded(colour.convert("RGBA"), **png_said), encoded(grey.convert("1")), encoded(colour.convert("LA")),
        with_chunks(encoded(colour), chunk(b"tEXt", b"a\0b"), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>")),
        keyed_png(np.asarray(grey) // 16, 4, [3]), keyed_png(np.asarray(colour, int) * 257, 16, [1, 2, 3]),
        encoded(colour, save_all=True, append_images=[colour.rotate(90, expand=False)]),
        encoded(colour, "JPEG", **said), encoded(colour, "JPEG", progressive=True), encoded(grey, "JPEG"),
        encoded(colour.convert("CMYK"), "JPEG"), encoded(colour.quantize(8), "GIF", transparency=1),
        encoded(grey, "GIF", save_all=True, append_images=[grey.rotate(180)], comment=b"hello"),
        encoded(colour, "BMP"), encoded(colour.quantize(8), "BMP"), encoded(grey.convert("1"), "BMP"),
        *(encoded(colour, "TIFF", compression=name, **png_said) for name in
          ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        encoded(colour, "TIFF", save_all=True, append_images=[grey], tiffinfo={270: "hello"}),
        encoded(deep, "TIFF"), encoded(grey.convert("1"), "TIFF", compression="group4"), grey_tiff(2), grey_tiff(),
        encoded(colour, "WEBP", lossless=True, **said), encoded(colour, "WEBP", **said),
        encoded(colour.convert("RGBA"), "WEBP", save_all=True, append_images=[colour.rotate(90).convert("RGBA")]),
        encoded(colour, "PPM"), encoded(grey, "PPM"), encoded(deep, "PPM"), b"P2\n# words\n3 2\n7\n0 1 2 3 4 7\n",
        b"P3 1 1 255 1 2 3", b"P1 2 1 0 1", b"P5 2 1 4000 " + bytes(4),
    ]  # fmt: skip


def assert_picture_is_answered(data: bytes) -> None:
    with strict_pictures(100_000), quiet_libraries():
        try:
            picture = open_picture(data)
        except ValueError as error:
            assert_line(str(error))
            return
    assert picture.mode in ("L", "RGB")
    assert len(picture_hash(picture)) == 64
    assert len(perceptual_hash(picture)) in (0, 64)


def test_the_pictures_of_the_search_are_read() -> None:
    with strict_pictures():
        read = [
            isinstance(data, bytes) and open_picture(data).size for data in pictures() if data != grey_tiff(2)
        ]
    assert all(read)


@pytest.mark.fuzz
@SEARCH
@given(st.deferred(lambda: mutated(pictures())))
def test_an_image_file_is_read_or_named_in_a_line_whatever_bytes_it_has(data: bytes) -> None:
    assert_picture_is_answered(data)


@pytest.mark.parametrize("path", sorted((CASES / "pictures").glob("*")), ids=lambda path: path.name)
def test_pictures_that_a_search_has_found_are_answered(path: Path) -> None:
    assert_picture_is_answered(image_bytes(path))


# ---- manifests

COLUMNS = ("file_name", "label", "split")
ROWS = [
    ("1.png", "a", "train"),
    ("im/2.png", "a", "test"),
    ("im/3.png", "b", "train"),
    ("4.png", "b", "test"),
]
DATA = Data(duplicates="refuse", test_fraction=0.2, seed=0, validation=None, max_pixels=100)


def as_csv(rows: list[dict[str, object]]) -> bytes:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([row.get(name, "") for name in names] for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_jsonl(rows: list[dict[str, object]]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_parquet(rows: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, object]]], bytes]] = {
    "list.csv": as_csv,
    "list.jsonl": as_jsonl,
    "list.parquet": as_parquet,
}
PLAIN = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=300),
    st.sampled_from(
        [
            "../1.png",
            "/1.png",
            "1.png\0",
            "a\nb",
            "x" * 5000 + ".png",
            "im",
            "\u202e1.png",
            "a\u200cb",
            "${seed}",
        ]
    ),
    st.sampled_from([10**400, [1] * 200, {"bytes": "x", "path": None}, [], {}]),
)


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, object]]:
    """The rows of a good manifest, some cells and columns of which are others."""
    rows = [dict(row) for row in PLAIN]
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.sampled_from(rows))
        kind = draw(st.sampled_from(["cell", "cell", "remove", "name", "row"]))
        name = draw(st.sampled_from([*COLUMNS, "path", "other"]))
        if kind == "cell":
            row[name] = draw(values)
        elif kind == "remove":
            row.pop(name, None)
        elif kind == "name":
            row[draw(st.text(max_size=100))] = row.pop(name, "x")
        else:
            rows.append(dict(row))
    return rows


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("data/raw/own")
    for file, _, _ in ROWS:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"")
    return folder


def assert_manifest_is_answered(source: Path, name: str, data: bytes) -> None:
    (source / name).write_bytes(data)
    for read in (
        lambda: class_names(source, manifest=name, shown=str(source)),
        lambda: task_images(source, ["a", "b"], manifest=name, data=DATA),
    ):
        with quiet_libraries():
            try:
                read()
            except InputError as error:
                assert_answered(error)
                assert_line(str(error))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", WRITERS)
@SEARCH
@given(st.data())
def test_a_manifest_is_read_or_named_in_a_line_whatever_bytes_it_has(
    source: Path, name: str, data: st.DataObject
) -> None:
    assert_manifest_is_answered(source, name, data.draw(mutated([WRITERS[name](PLAIN)])))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", WRITERS)
@SEARCH
@given(tables())
def test_a_manifest_is_read_or_named_in_a_line_whatever_its_cells_say(
    source: Path, name: str, rows: list[dict[str, object]]
) -> None:
    try:
        data = WRITERS[name](rows)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # nothing that Parquet can hold
        return
    assert_manifest_is_answered(source, name, data)


@pytest.mark.parametrize("path", sorted((CASES / "manifests").glob("*")), ids=lambda path: path.name)
def test_manifests_that_a_search_has_found_are_answered(source: Path, path: Path) -> None:
    assert_manifest_is_answered(source, f"list{path.suffix}", path.read_bytes())
