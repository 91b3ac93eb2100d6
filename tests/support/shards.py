"""Shards that a test writes: Parquet files as `datasets` writes them, and tar files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(seed: int, side: int = 8) -> bytes:
    """A small picture of its own, as a PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def write_parquet(
    path: Path,
    rows: Iterable[tuple[bytes | None, object]],
    *,
    names: Sequence[str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
    row_group_size: int = 100,
) -> None:
    """Write images and labels as `datasets` does. Labels are numbers of `names`, where some are given."""
    image, label = columns
    cells = [
        (data and {"bytes": data, "path": f"{index}.png"}, value) for index, (data, value) in enumerate(rows)
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table(
        {image: pa.array([cell for cell, _ in cells], kind), label: [value for _, value in cells]}
    )
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        noted = json.dumps({"info": {"features": features}}).encode()
        table = table.replace_schema_metadata({b"huggingface": noted})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Write files as a tar file, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
