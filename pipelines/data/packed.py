"""Packed images: Arrow files of encoded pictures."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.files import naming, read_json, sha256_of
from pipelines.project.schemas import TrainingImages

if TYPE_CHECKING:
    import pyarrow as pa


TRAINING = "train.json"
"""What describes the training images of a task."""
PACKED = "train.arrow"
"""The training images of a task, in a folder of their own: whoever needs the description need not fetch them."""
_ROWS = 2**16
"""Rows that are objects at a time while they become columns."""


class ImageRow(NamedTuple):
    """One row of a file of images."""

    id: str
    """`t01/train/<class>/<file>`, unique"""
    label: int
    """global class index in order of arrival"""
    image: bytes
    """the file's bytes, unchanged"""
    sha256: str
    """of these bytes"""
    pixels: str
    """`picture_hash` of what they show: the same in every encoding without loss"""


class SampleRow(NamedTuple):
    """One row of a file of samples: what later tasks are checked against."""

    id: str
    split: str
    """train, validation or test"""
    label: int
    sha256: str
    pixels: str
    perceptual: str
    """`perceptual_hash`: nearly the same for nearly the same picture"""


def write_images(path: Path, rows: Iterable[ImageRow]) -> None:
    """Write images that are in memory as an Arrow IPC file: one batch, no compression, the same bytes for the same
    rows.
    """
    write_rows(path, rows, _image_types())


def write_stored_images(path: Path, samples: Iterable[SampleRow], images: pa.LargeBinaryArray) -> None:
    """Write images whose bytes are a column already, which may be mapped from a file, in the same way."""
    types = _image_types()
    rows = ((row.id, row.label, row.sha256, row.pixels) for row in samples)
    found = _columns(rows, {name: kind for name, kind in types.items() if name != "image"})
    _write_columns(path, {name: found.get(name, images) for name in types})


def write_samples(path: Path, rows: Iterable[SampleRow]) -> None:
    """Write samples, which are images without their bytes, in the same way."""
    import pyarrow as pa

    types = {"id": pa.string(), "split": pa.string(), "label": pa.int32(), **_hashes()}
    write_rows(path, rows, {**types, "perceptual": pa.string()})


def samples_digest(samples: Iterable[SampleRow]) -> str:
    """Return one hash for all samples in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def read_images(path: Path, *needed: str) -> pa.Table:
    """Open a file of images or samples, memory-mapped. An `InputError` names a missing or damaged one.

    Args:
        path: The file.
        needed: Columns that it must have.
    """
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing; run `sdlora run`, which makes it") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fault = " ".join(str(error).split())
        raise InputError(f"{path}: not an Arrow file ({fault}); delete it and run `sdlora run`") from None
    if lacking := [name for name in needed if name not in table.column_names]:
        raise InputError(f"{path}: it has no column {lacking[0]}; delete it and run `sdlora run`")
    return table


def read_samples(path: Path) -> list[SampleRow]:
    """Return the samples of a file. An `InputError` names one that is missing, damaged or of something else."""
    try:
        return [SampleRow(**row) for row in read_images(path).to_pylist()]
    except TypeError:  # other columns
        raise InputError(f"{path}: not a file of samples; delete it and run `sdlora run`") from None


def training_images(described: Path, images: Path) -> Path:
    """Return the training images that a `train.json` describes. An `InputError` where they are missing or others.

    Stages depend on the description, which holds the hash of the images, and not on the images: so a step whose images
    were deleted afterwards is as up to date as it was, and no step can be made of other images than it says.

    Args:
        described: The `train.json` of a task.
        images: The folder that has a folder of training images for each task.
    """
    description = read_json(described, TrainingImages)
    folder = images / description["task"]
    path = folder / PACKED
    if not path.is_file():
        raise InputError(
            f"{path}: the training images of {folder.name} are missing; restore them with `dvc checkout {folder}` or "
            f"`dvc pull {folder}`"
        )
    if sha256_of(path) != description["images"]:
        raise InputError(
            f"{path}: not the images that {described} describes; restore both with "
            f"`dvc checkout {folder} {described.parent}`"
        )
    return path


def _image_types() -> dict[str, pa.DataType]:
    import pyarrow as pa

    # Offsets of 64 bits: the images of one task may exceed 2 GiB.
    return {"id": pa.string(), "label": pa.int32(), "image": pa.large_binary(), **_hashes()}


def _hashes() -> dict[str, pa.DataType]:
    import pyarrow as pa

    return {"sha256": pa.string(), "pixels": pa.string()}


def write_rows(path: Path, rows: Iterable[tuple[object, ...]], types: Mapping[str, pa.DataType]) -> None:
    """Write rows as an Arrow IPC file with columns of these names and types: one batch, no compression.

    A million rows are never a million objects at a time.
    """
    _write_columns(path, _columns(rows, types))


def _columns(rows: Iterable[tuple[object, ...]], types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    import pyarrow as pa

    parts: dict[str, list[pa.Array]] = {name: [pa.array([], kind)] for name, kind in types.items()}
    rows = iter(rows)
    while some := list(itertools.islice(rows, _ROWS)):
        for (name, kind), column in zip(types.items(), zip(*some, strict=True), strict=True):
            parts[name].append(pa.array(column, kind))
    return {name: pa.concat_arrays(arrays) for name, arrays in parts.items()}


def _write_columns(path: Path, columns: Mapping[str, pa.Array]) -> None:
    import pyarrow as pa

    schema = pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()])
    options = pa.ipc.IpcWriteOptions(compression=None, use_threads=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, schema, options=options) as file,
    ):
        file.write_batch(pa.record_batch(list(columns.values()), schema=schema))
