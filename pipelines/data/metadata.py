"""Image files without what is no part of their pixels: text, colour profiles and EXIF blocks that cannot be read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_USED = (b"iCCP", b"eXIf")
"""Metadata of a PNG that is used where it is whole: colour profile, and how the camera was held."""
_INFLATED = 2**20
"""Bytes of a colour profile in a PNG at most, as Pillow has it."""

_TIFF_PIXELS = {
    256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347,
    512, 513, 514, 519, 520, 521, 529, 530, 531, 532,
}  # fmt: skip
"""Tags of a TIFF that its pixels are decoded by."""
_TIFF_USED = {274, 34675}
"""How the camera was held, and the colour profile."""
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _SAMPLE_FORMAT = 258, 262, 277, 284, 339
_TIFF_TYPES = {1: 1, 3: 2, 4: 4, 16: 8}
"""Types of whole numbers in a TIFF, and their bytes."""
_WIDE = (12, 16, 24, 32, 64)
"""Bits of a channel of which many kinds are not read."""
_NUMBERS = {1: "whole numbers", 2: "signed whole numbers", 3: "floating-point numbers"}


def without_metadata(data: bytes | memoryview | pa.Buffer) -> bytes | None:
    """Return an image file with its pixels, and of its metadata what is used and whole.

    None where there is nothing to leave out, or no such format.
    """
    data = bytes(data)
    if data.startswith(_PNG):
        return _bare_png(data)
    return _bare_tiff(data)


def unknown_kind(data: bytes | memoryview | pa.Buffer) -> str:
    """Return what a file is that no format of Pillow's fits."""
    if not len(data):
        return "it is empty"
    tags = {entry.tag: entry for entry in _tiff_entries(bytes(data))}
    samples, bits = _first(tags.get(_SAMPLES), default=1), _first(tags.get(_BITS), default=1)
    kind = _first(tags.get(_SAMPLE_FORMAT), default=1)
    colours = {2: (3, 4), 5: (4,)}.get(_first(tags.get(_PHOTOMETRIC), default=0), (1,))
    if bits not in _WIDE or (
        bits == 16 and kind == 1 and samples in colours
    ):  # of that kind Pillow reads whole ones
        return "it is no image that Pillow knows"
    channels = "1 channel" if samples == 1 else f"{samples} channels"
    return (
        f"it is a TIFF of {channels} of {bits}-bit {_NUMBERS.get(kind, 'values')}, which is not read; "
        "save it with 8 bits, as grey or RGB"
    )


def in_one_plane(data: bytes | memoryview | pa.Buffer) -> bytes:
    """Return a TIFF without the word that its channels stand in planes of their own: one channel always does."""
    patched = bytearray(data)
    for entry in _tiff_entries(bytes(data)):
        if entry.tag == _PLANES:
            patched[entry.place : entry.place + entry.size] = (1).to_bytes(
                entry.size, "little" if patched[:2] == b"II" else "big"
            )
    return bytes(patched)


def _bare_png(data: bytes) -> bytes | None:
    kept, start = [data[:8]], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        kind = data[start + 4 : start + 8]
        if kind in _PNG_PIXELS or (kind in _PNG_USED and _is_whole(data[start:end])):
            kept.append(data[start:end])
        if kind == b"IEND":
            break
        start = end
    bare = b"".join(kept)
    return None if len(bare) == len(data) else bare


def _is_whole(chunk: bytes) -> bool:
    """Return whether a chunk of a PNG has its checksum and, where it is a profile, unpacks to a size that is read."""
    kind, body, sum_ = chunk[4:8], chunk[8:-4], int.from_bytes(chunk[-4:])
    if zlib.crc32(kind + body) != sum_:
        return False
    if kind != b"iCCP":
        return True
    packed, unpack = body.partition(b"\0")[2], zlib.decompressobj()
    if packed[:1] != b"\0":
        return False
    try:
        unpack.decompress(packed[1:], _INFLATED)
    except zlib.error:
        return False
    return not unpack.unconsumed_tail


class _Entry(NamedTuple):
    """A tag of a TIFF's first page."""

    tag: int
    raw: bytes
    """the entry as it stands in the file"""
    place: int
    """where its values begin"""
    size: int
    """bytes of each; 0 where they are no whole numbers"""
    values: list[int]
    """whole numbers that stand in the entry itself or where it points to, the first few of them"""


def _tiff_layout(data: bytes) -> tuple[str, bool] | None:
    """Return the order of bytes, and whether numbers are of 64 bits. None where it is no TIFF."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return None
    (version,) = struct.unpack_from(f"{order}H", data, 2)
    return (order, version == 43) if version in (42, 43) else None


def _tiff_entries(data: bytes) -> Iterator[_Entry]:
    """Yield the tags of the first page, as far as they are there."""
    layout = _tiff_layout(data)
    if layout is None:
        return
    order, big = layout
    place, head, length = ("Q", "Q", 20) if big else ("I", "H", 12)
    try:
        (start,) = struct.unpack_from(order + place, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + head, data, start)
        start += struct.calcsize(order + head)
        for at in range(start, min(start + count * length, len(data) - length + 1), length):
            tag, kind, number = struct.unpack_from(f"{order}HH{place}", data, at)
            size = _TIFF_TYPES.get(kind)
            values: list[int] = []
            inside = at + length - (8 if big else 4)
            if size is not None and number:
                if number * size > (8 if big else 4):
                    (inside,) = struct.unpack_from(order + place, data, inside)
                letter = {1: "B", 2: "H", 4: "I", 8: "Q"}[size]
                shown = min(number, 8, max(0, (len(data) - inside) // size))
                values = list(struct.unpack_from(f"{order}{shown}{letter}", data, inside))
            yield _Entry(tag, data[at : at + length], inside, size or 0, values)
    except (struct.error, OverflowError):
        return


def _first(entry: _Entry | None, *, default: int) -> int:
    return entry.values[0] if entry is not None and entry.values else default


def _bare_tiff(data: bytes) -> bytes | None:
    """Return a TIFF of the first page alone, whose directory names its pixels and what is used."""
    layout = _tiff_layout(data)
    entries = list(_tiff_entries(data))
    kept = [entry.raw for entry in entries if entry.tag in _TIFF_PIXELS | _TIFF_USED]
    if layout is None or len(kept) == len(entries):
        return None
    order, big = layout
    place, head = ("Q", "Q") if big else ("I", "H")
    data += bytes(len(data) % 2)
    directory = struct.pack(order + head, len(kept)) + b"".join(kept) + struct.pack(order + place, 0)
    at = 8 if big else 4
    start = struct.pack(order + place, len(data))
    return data[:at] + start + data[at + len(start) :] + directory
