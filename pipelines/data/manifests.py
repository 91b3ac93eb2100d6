"""Sources of manifests: tables that list images with their labels."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.data.parquet_shards import PATH_COLUMNS
from pipelines.data.source_files import (
    EXTENSIONS,
    PARTS,
    WORDS,
    Fault,
    Found,
    Source,
    linked_folder,
    no_image,
)
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.names import class_name_fault, is_text
from pipelines.project.regular_files import regular_bytes

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Manifests that are found by themselves, at the top of a source or in its train/ and test/."""
_MANIFEST_BYTES = 2**30
"""Size of a manifest at most."""
_SHOWN = 60
"""Characters of a cell or column in a message."""


class _Row(NamedTuple):
    """One line of a manifest."""

    where: str
    """the manifest and the line or row"""
    file: Any
    label: Any
    part: Any


def manifests(folder: Path, manifest: str | None) -> list[tuple[Path, str | None]]:
    """Return the manifests of a source, each with the part that its place says. None where classes are folders."""
    if manifest is not None:
        return [(folder / manifest, None)]
    places = {folder: None, **{folder / word: part for word, part in WORDS.items()}}
    found = [(place / name, part) for place, part in places.items() for name in METADATA]
    found = [(path, part) for path, part in found if path.is_file()]
    for path, part in found[1:]:
        if part is None or found[0][1] is None or path.parent == found[0][0].parent:
            raise InputError(
                f"{path}: a second manifest beside {found[0][0]}; remove one, or name one as the task's manifest"
            )
    return found


def of_manifests(folder: Path, names: Sequence[str], tables: Sequence[tuple[Path, str | None]]) -> Source:
    """Return the images that manifests list for the classes `names`."""
    rows: list[tuple[Found, _Row]] = []
    faults = []
    wanted, labels = set(names), set()
    for path, part in tables:
        for row in read_manifest(path):
            label = class_of(row.where, row.label)
            if isinstance(label, Fault):
                faults.append(label)
                continue
            labels.add(label)
            file = _file_of(row, path.parent, check=label in wanted)
            its = part_of(row.where, row.part, given=part)
            if isinstance(file, Fault) or isinstance(its, Fault):
                if label in wanted:
                    faults += [fault for fault in (file, its) if isinstance(fault, Fault)]
                continue
            relative = file if path.parent == folder else f"{path.parent.name}/{file}"
            rows.append((Found(folder / relative, its, label, relative), row))
    rows = list(_by_place(rows))
    faults += _listed_twice(rows, wanted)
    if any(found.part is not None for found, _ in rows):
        faults += [
            Fault(row.where, "no split, which other lines have", "write train, validation or test")
            for found, row in rows
            if found.part is None and found.name in wanted
        ]
        rows = [(found, row) for found, row in rows if found.part is not None]
    listed = [found for found, _ in rows if found.name in wanted]
    faults += _in_linked_folders(folder, listed)
    for name in names:
        if name not in labels:
            remedy = "add its images, or correct the task's classes in params.yaml"
            faults.append(Fault(str(tables[0][0]), f"no row has the label {_shown(name)}", remedy))
    position = {name: index for index, name in enumerate(names)}
    listed.sort(
        key=lambda found: (PARTS.index(found.part or "train"), position[found.name], natural_key(found.file))
    )
    return Source(listed, faults)


def _by_place(rows: list[tuple[Found, _Row]]) -> Iterator[tuple[Found, _Row]]:
    """Yield the rows, each with the part that its path's first folder names, where no row says its part."""
    heads = {found.file.split("/")[0] if "/" in found.file else "" for found, _ in rows}
    by_place = heads and all(found.part is None for found, _ in rows) and heads <= set(WORDS)
    for found, row in rows:
        yield (found._replace(part=WORDS[found.file.split("/")[0]]) if by_place else found), row


def _listed_twice(rows: Sequence[tuple[Found, _Row]], wanted: set[str]) -> Iterator[Fault]:
    first: dict[str, tuple[Found, _Row]] = {}
    for found, row in rows:
        known, its_row = first.setdefault(found.file, (found, row))
        if its_row is row or not {found.name, known.name} & wanted:
            continue
        what = f"{_shown(found.file)[1:-1]} stands in {its_row.where} already"
        if known.name != found.name:
            what += f", with another label ({known.name!r}, here {found.name!r})"
        elif known.part != found.part:
            what += f", in another part ({known.part}, here {found.part})"
        yield Fault(row.where, what, "remove one of the two lines")


def _in_linked_folders(folder: Path, listed: Iterable[Found]) -> Iterator[Fault]:
    places = {place for found in listed for place in list(Path(found.file).parents)[:-1]}
    for place in sorted(places):
        if (folder / place).is_symlink():
            yield linked_folder(folder / place)


def class_of(where: str, label: object) -> str | Fault:
    """Return the class that a label says: text as it is, a whole number as its decimal digits."""
    label = str(label) if type(label) is int else label
    if not isinstance(label, str):
        what = "the label is empty" if label is None else f"the label is {_shown(label)}"
        return Fault(where, what, "write text or a whole number")
    fault = class_name_fault(label)
    return Fault(where, f"the label {_shown(label)} {fault}", "rename the class") if fault else label


def part_of(where: str, word: object, *, given: str | None) -> str | Fault | None:
    """Return the part of an image: what the place of its list says, else its own word."""
    if given is not None or word is None:
        return given
    clean = str(word).strip().lower()
    if clean not in WORDS:
        return Fault(where, f"the split is {_shown(word)}", "write train, validation or test")
    return WORDS[clean]


def _file_of(row: _Row, home: Path, *, check: bool) -> str | Fault:
    """Return the path of a row, relative to its manifest. Whether there is such an image is asked only to `check`."""
    file = row.file
    if not isinstance(file, str) or not file:
        return Fault(row.where, f"the path is {_shown(file)}", "write the path of the image file")
    fault = next((what for holds, *what in _path_faults(file) if holds), None)
    if fault is not None:
        what, remedy = fault
        return Fault(row.where, f"the path {_shown(file)} {what}", remedy)
    clean = posixpath.normpath(file)
    if check:
        if Path(clean).suffix.lower() not in EXTENSIONS:
            return no_image(f"{row.where}: {_shown(clean)[1:-1]}")
        if not os.path.isfile(home / clean):
            within = posixpath.relpath(clean, home.name)
            beside = not within.startswith("..") and os.path.isfile(home / within)
            remedy = (
                f"paths begin at the manifest: write {within}" if beside else "add it, or remove the line"
            )
            return Fault(row.where, f"there is no file {_shown(clean)[1:-1]}", remedy)
    return clean


def _path_faults(file: str) -> Iterator[tuple[bool, str, str]]:
    """Yield what may be wrong with a path as it is written: whether it is, what, and what to do."""
    yield not is_text(file), "has a line end or a control character", "rename the file"
    yield posixpath.isabs(file) or file[1:3] == ":\\", "is absolute", "write it relative to the manifest"
    yield "\\" in file, "has backslashes", "write /"
    longest = max(len(part.encode("utf-8", "replace")) for part in file.split("/"))
    yield longest > 255 or len(file) > 4000, "is longer than a path can be", "correct it"
    outside = posixpath.normpath(file).split("/")[0] == ".."
    yield outside, "leaves the folder", "put the image below the manifest"


def _shown(value: object) -> str:
    """Return a cell of a manifest as a message shows it: of a long one the beginning."""
    if isinstance(value, str):
        value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    text = repr(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…"


def read_manifest(path: Path) -> Iterator[_Row]:
    """Yield the rows of a manifest. An `InputError` names a file that is none, or lacks a column."""
    try:
        data = regular_bytes(path, at_most=_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the manifest is missing; put it there, or correct the task") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct the manifest, or the task") from None
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: not a manifest by its name; known are .csv, .jsonl and .parquet")
    return reader(path, data)


def _csv_rows(path: Path, data: bytes) -> Iterator[_Row]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        columns = _columns_of(path, header)
        for cells in lines:
            where = f"{path}: line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                what = f"{len(cells)} fields, the first line has {len(header)}"
                raise InputError(f"{where}: {what}; put text with a comma in double quotes")
            yield _row(where, dict(zip(header, cells, strict=True)), columns)
    except csv.Error as error:
        raise InputError(f"{path}: line {lines.line_num}: not valid CSV ({error}); mend that line") from None


def _jsonl_rows(path: Path, data: bytes) -> Iterator[_Row]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({_fault(error)}); mend that line") from None
        if not isinstance(record, dict):
            found = line[:40].decode(errors="backslashreplace")
            raise InputError(f"{where}: expected an object, found {found}; mend it")
        yield _row(where, record, _columns_of(where, list(record)))


def _parquet_rows(path: Path, data: bytes) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = _columns_of(path, file.schema_arrow.names)
        table = file.read(columns=[name for name in columns if name is not None])
        records = table.to_pylist()
    except InputError:
        raise
    except Exception as error:  # Arrow raises a dozen types on broken bytes
        raise InputError(f"{path}: not a Parquet file ({_fault(error)}); write it anew") from None
    for number, record in enumerate(records, start=1):
        yield _row(f"{path}: row {number}", record, columns)


def _fault(error: Exception) -> str:
    """Return what a library says of a file, as part of a line."""
    return one_line(error)[:_SHOWN]


def _columns_of(where: str | Path, names: Sequence[str]) -> tuple[str, str, str | None]:
    """Return the columns of path, label and split (None where there is none) among those of a manifest."""
    paths = [name for name in PATH_COLUMNS if name in names]
    some = [*map(_shown, names[:8]), *(["…"] if len(names) > 8 else [])]
    found = ", ".join(text.strip("'") for text in some) or "none"
    if len(paths) != 1:
        what = "both path and file_name stand" if paths else "neither path nor file_name stands"
        others = len(names) == 1 and any(separator in names[0] for separator in ";\t|")
        hint = " (a manifest is separated by commas)" if others else ""
        raise InputError(f"{where}: {what} among the columns {found}{hint}; name one of them so")
    if "label" not in names:
        remedy = "add it, or move the file out of the source"
        raise InputError(f"{where}: no column label among {found}; {remedy}")
    for name in (paths[0], "label", "split"):
        if list(names).count(name) > 1:
            raise InputError(f"{where}: two columns {name}; remove one")
    return paths[0], "label", "split" if "split" in names else None


def _row(where: str, record: Mapping[str, Any], columns: tuple[str, str, str | None]) -> _Row:
    path, label, split = columns
    # A column without a word in this row is a word of its own, and not one of the known.
    part = None if split is None else record[split] if record[split] is not None else ""
    return _Row(where, record[path], record[label], part)
