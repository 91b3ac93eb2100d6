"""Image files that people have met and that no usual program writes, byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

RGB = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
"""A picture of noise."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {"L": 0, "RGB": 2}


def encoded(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """Return a chunk of a PNG, with another checksum than its own where one is given."""
    own = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", own)


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Return a PNG with chunks behind its header."""
    return png[:33] + b"".join(chunks) + png[33:]


def keyed_png(rows: np.ndarray, bits: int, key: Sequence[int]) -> bytes:
    """Return a PNG of grey or RGB values of so many bits, one of which is transparent."""
    grey = rows.ndim == 2
    if bits == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        spread = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., -bits:]
        lines = [np.packbits(row.reshape(-1)).tobytes() for row in spread]
    height, width = rows.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOUR_TYPES["L" if grey else "RGB"], 0, 0, 0)
    return b"".join(
        [
            SIGNATURE,
            chunk(b"IHDR", header),
            chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))),
            chunk(b"IEND", b""),
        ]
    )


Tags = dict[int, tuple[int, Sequence[int]]]
"""Tags of a TIFF, each with its type (3 for 16 bits, 4 for 32) and values."""
GREY_TAGS: Tags = {256: (4, [4]), 257: (4, [4]), 259: (3, [1]), 262: (3, [1]), 278: (4, [4])}
"""Those of 4×4 grey pixels without how many bits they have."""


def tiff(tags: Tags, *strips: bytes, order: str = "<") -> bytes:
    """Return a TIFF of some strips."""
    starts = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    tags = {**tags, 273: (4, starts), 279: (4, [len(strip) for strip in strips])}
    entries, behind = [], b""
    directory = 8 + sum(map(len, strips))
    after = directory + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        body = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(body) > 4:
            place = struct.pack(f"{order}I", after + len(behind))
            behind += body
        else:
            place = body.ljust(4, b"\0")
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(values)) + place)
    header = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, directory)
    count = struct.pack(f"{order}H", len(tags))
    return b"".join([header, *strips, count, *entries, bytes(4), behind])


def grey_tiff(samples: int = 1, *, bits: int = 16, sample_format: int = 1) -> bytes:
    """Return a TIFF of grey pixels, with alpha where there are two samples."""
    tags = {
        **GREY_TAGS,
        258: (3, [bits] * samples),
        277: (3, [samples]),
        339: (3, [sample_format] * samples),
    }
    if samples == 2:
        tags[338] = (3, [2])
    return tiff(tags, bytes(16 * samples * bits // 8))
