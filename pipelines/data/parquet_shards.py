"""Parquet files that hold images and labels, as the data sets of the Hugging Face hub do."""

from __future__ import annotations

import json
import os
import threading
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pipelines.data.source_files import IMAGE_BYTES, Entry, Fault
from pipelines.project.display import shortened, show_names
from pipelines.project.error_text import one_line
from pipelines.project.layout import SCRATCH

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

PATH_COLUMNS = ("path", "file_name")
"""What a column of paths is called, where a table lists files."""
_ROWS, _LABELS = 16, 65_536
"""Rows that are in memory at a time: with images, and of labels alone."""
_PAGES = 2**20
"""Bytes of a column that are read at a time: a row group may be as large as the file."""
_SHOWN = 60
"""Characters that are shown of what Arrow says."""


class Unpacked:
    """A nameless file for images whose shards are compressed. It goes with the object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._end = 0

    def append(self, data: bytes) -> int:
        """Write bytes. Return where they begin."""
        with self._lock:
            if self._file is None:
                SCRATCH.mkdir(exist_ok=True)
                self._file = TemporaryFile(dir=SCRATCH)  # noqa: SIM115 - it lives as long as this object
                weakref.finalize(self, self._file.close)
            start, self._end = self._end, self._end + len(data)
        left = memoryview(data)
        while left:
            left = left[os.pwrite(self._file.fileno(), left, start + len(data) - len(left)) :]
        return start

    def read(self, start: int, size: int) -> bytes:
        """Return bytes that were written."""
        assert self._file is not None
        return os.pread(self._file.fileno(), size, start)


class _Columns(NamedTuple):
    """Where a Parquet file has what is needed of it."""

    image: str
    """the column of the bytes, or that field of the column"""
    label: str
    names: list[str] | None
    """what the numbers of the labels mean, where the file says so"""
    part: str | None


class ParquetShard:
    """A Parquet file of images: rows of bytes, or of bytes and path, and a label.

    Compressed pages cannot be read image by image. So the images that are held are unpacked, a few rows at a time,
    before the first of them is read.
    """

    def __init__(self, path: Path, *, name: str, shown: str, unpacked: Unpacked) -> None:
        self.path, self.name, self.shown = path, name, shown
        self._unpacked = unpacked
        self._lock = threading.Lock()
        self._rows: array[int] = array("q")
        self._starts: array[int] | None = None
        self._sizes: array[int] = array("q")
        self._fault = ""

    def entries(self) -> Iterator[Entry | Fault]:
        """Yield all images, by row, and what is wrong."""
        try:
            with _opened(self.path) as file:
                columns = _columns_of(self.shown, file.schema_arrow)
                if isinstance(columns, Fault):
                    yield columns
                    return
                read = [name for name in (columns.label, columns.part) if name is not None]
                row = 0
                for batch in file.iter_batches(batch_size=_LABELS, columns=read):
                    values = [batch.column(name).to_pylist() for name in read]
                    for label, *part in zip(*values, strict=True):
                        file = str(row + 1)
                        if columns.names is not None:
                            label = _name_of(self.where(file), label, columns.names)
                        # A row without a word in the column of parts has a word of its own, which is none of the known.
                        word = None if not part else part[0] if part[0] is not None else ""
                        yield Entry(file, label, word, row, 0)
                        row += 1
        except Exception as error:  # Arrow raises a dozen types on broken bytes
            what = f"not a Parquet file ({shortened(one_line(error), _SHOWN)})"
            yield Fault(self.shown, what, "write it anew, or move it away")

    def hold(self, entry: Entry) -> int:
        """Note that an image may be read. Return its number. Rows are given in their order."""
        self._rows.append(entry.start)
        return len(self._rows) - 1

    def where(self, file: str) -> str:
        """Return what messages call an image, by its row."""
        return f"{self.shown}: row {file}"

    def image(self, number: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            ValueError: the row has none, too many, or cannot be read.
        """
        with self._lock:
            if self._starts is None:
                self._starts = self._unpack()
        if number >= len(self._starts):
            raise ValueError(f"the file cannot be read up to here ({self._fault})")
        size = self._sizes[number]
        if size < 0:
            raise ValueError("the row has no bytes of an image; write them into the file, not their path")
        if size > IMAGE_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {IMAGE_BYTES:,}")
        return self._unpacked.read(self._starts[number], size)

    def _unpack(self) -> array[int]:
        """Write the images that are held to `_unpacked`. Return where each begins: as many as could be read."""
        import pyarrow as pa

        starts: array[int] = array("q")
        first = 0
        try:
            with _opened(self.path) as file:
                columns = _columns_of(self.shown, file.schema_arrow)
                assert isinstance(columns, _Columns)
                for batch in file.iter_batches(batch_size=_ROWS, columns=[columns.image]):
                    column = batch.column(0)
                    cells = column.field("bytes") if pa.types.is_struct(column.type) else column
                    while len(starts) < len(self._rows) and self._rows[len(starts)] < first + len(batch):
                        row = self._rows[len(starts)] - first
                        data = cells[row].as_py() if column[row].is_valid else None
                        self._sizes.append(-1 if data is None else len(data))
                        starts.append(self._unpacked.append(data or b""))
                    first += len(batch)
        except Exception as error:  # a full disk, or one of a dozen types that Arrow raises on broken bytes
            self._fault = shortened(one_line(error), _SHOWN)
        return starts


def holds_images(path: Path) -> bool:
    """Return whether a file is a Parquet file with images in it. One that lists files is none."""
    try:
        with _opened(path) as file:
            columns = [field.name for field in file.schema_arrow if _holds_bytes(field.type)]
            return "image" in columns or (bool(columns) and not _lists_files(file.schema_arrow, columns))
    except Exception:  # Arrow raises a dozen types on what is no Parquet file
        return False


def _opened(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, buffer_size=_PAGES, pre_buffer=False)


def _image_column(schema: pa.Schema) -> str | None:
    """Return the column of images: `image`, or the only one with bytes in a table that has no column of paths."""
    found = [field.name for field in schema if _holds_bytes(field.type)]
    if "image" in found:
        return "image"
    return found[0] if len(found) == 1 and not _lists_files(schema, found) else None


def _lists_files(schema: pa.Schema, images: Sequence[str]) -> bool:
    """Return whether a table has a column of paths beside those of images."""
    return any(name in PATH_COLUMNS and name not in images for name in schema.names)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a column has an image in each cell: its bytes, or bytes and path as the Hugging Face hub has."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _columns_of(shown: str, schema: pa.Schema) -> _Columns | Fault:
    """Return the columns of image, label and part among those of a file."""
    import pyarrow as pa

    found = show_names(schema.names) or "none"
    image = _image_column(schema)
    if image is None:
        return Fault(shown, f"no column image with bytes among {found}", "name that of the images so")
    known = _class_labels(schema)
    label = "label" if "label" in schema.names else next(iter(known)) if len(known) == 1 else None
    if label is None:
        return Fault(shown, f"no column label among {found}", "name that of the classes so")
    for name in (image, label, "split"):
        if schema.names.count(name) > 1:
            return Fault(shown, f"two columns {name}", "remove one")
    whole = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
    return _Columns(whole, label, known.get(label), "split" if "split" in schema.names else None)


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the columns of numbers that stand for classes, with the names of these, as `datasets` notes them."""
    try:
        noted: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
        found = {name: its["names"] for name, its in features.items() if its.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in found.items() if name in schema.names and isinstance(names, list)}


def _name_of(where: str, label: object, names: list[str]) -> object:
    """Return the name that a number stands for. A `Fault` where it stands for none."""
    if type(label) is not int:
        return label
    if not 0 <= label < len(names):
        what = f"the label is {label}, and the file names those from 0 to {len(names) - 1}"
        return Fault(where, what, "correct it, or leave the row out")
    return names[label]
