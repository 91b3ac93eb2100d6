"""Sources of a task: class folders, divided or not, or a manifest; each becomes files with their part and class."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.param_checks import class_name_fault, missing_source
from pipelines.project.settings import Data

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PARTS = ("train", "validation", "test")
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What people call the parts: the words that the Hugging Face hub knows."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Manifests that are found by themselves, at the top of a source or in its train/ and test/."""
PATH_COLUMNS = ("path", "file_name")


class Fault(NamedTuple):
    """Something that the user has to mend."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


class Found(NamedTuple):
    """An image file of a source."""

    path: Path
    part: str | None
    """train, validation or test; None where the source does not say"""
    name: str
    """its class"""
    file: str
    """what tells it from others of its class: the file's name, or its path as the manifest has it"""


class Source(NamedTuple):
    """The image files of some classes of a source, and what is wrong with it."""

    images: list[Found]
    faults: list[Fault]


class Row(NamedTuple):
    """One line of a manifest."""

    where: str
    """the manifest and the line or row"""
    file: Any
    label: Any
    part: Any


def task_images(folder: Path, names: Sequence[str], *, manifest: str | None, data: Data) -> list[Found]:
    """The images of a task's classes, each with its part; an `InputError` names the first fault, counts the others.

    They are in the order of parts, of `names`, and of natural file names.
    """
    source = read_source(folder, names, manifest=manifest)
    divided = divide(source.images, data) if not source.faults else source
    refuse(divided.faults)
    return divided.images


def refuse(faults: Sequence[Fault]) -> None:
    """Refuse what has faults: the first in full, the number of the others."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0]}{more}")


def class_names(folder: Path, *, manifest: str | None, shown: str) -> list[str]:
    """All classes of a source, in natural order; an `InputError` calls the folder `shown`."""
    if not folder.is_dir():
        raise InputError(f"{shown}: the folder is missing; {missing_source(shown)}")
    tables = manifests(folder, manifest)
    if tables:
        labels = (class_of(row) for path, _ in tables for row in read_manifest(path))
        names = {label for label in labels if isinstance(label, str)}
        if not names:
            raise InputError(f"{tables[0][0]}: no row has a label; write one line for each image")
    elif is_divided(folder):
        names = {entry.name for entry in visible(folder / "train") if entry.is_dir()}
        if not (folder / "train").is_dir():
            raise InputError(f"{shown}/train: the folder is missing beside test; put training images there")
        if not names:
            raise InputError(
                f"{shown}/train: no class folders there; make one for each class and put its images there"
            )
    else:
        names = {entry.name for entry in visible(folder) if entry.is_dir()}
        if not names:
            raise InputError(
                f"{shown}: no class folders there; make one for each class and put its images there"
            )
        for name in sorted(names, key=natural_key):
            if holds_folders(folder / name):
                raise InputError(
                    f"{shown}/{name}: a folder of folders, so {shown} holds neither classes nor train and test;"
                    " give the folder that does"
                )
    return sorted(names, key=natural_key)


def read_source(folder: Path, names: Sequence[str], *, manifest: str | None) -> Source:
    """List the images of the classes `names`, and collect whatever is wrong with them; other classes are left alone."""
    if not folder.is_dir():
        return Source([], [Fault(str(folder), "the folder is missing", missing_source(folder))])
    tables = manifests(folder, manifest)
    return of_manifests(folder, names, tables) if tables else of_folders(folder, names)


# ---- folders


def of_folders(folder: Path, names: Sequence[str]) -> Source:
    """The images of class folders, under train/ and test/ (and validation/) or without parts."""
    if not is_divided(folder):
        return _joined(class_files(folder / name, part=None, name=name) for name in names)
    linked = [folder / word for word in WORDS if (folder / word).is_symlink()]
    if linked:
        return Source([], [_linked(part) for part in linked])
    listed = [_joined(class_files(folder / "train" / name, part="train", name=name) for name in names)]
    for word in (word for word, part in WORDS.items() if part == "validation"):
        listed += [
            class_files(folder / word / name, part="validation", name=name)
            for name in names
            if (folder / word / name).is_dir()
        ]
    listed += [_joined(class_files(folder / "test" / name, part="test", name=name) for name in names)]
    return _joined(listed)


def is_divided(folder: Path) -> bool:
    """Whether train/ and test/ are parts: folders of folders (or empty), not classes of such a name."""
    return any(
        (folder / part).is_dir() and (holds_folders(folder / part) or not visible(folder / part))
        for part in ("train", "test")
    )


def class_files(folder: Path, *, part: str | None, name: str) -> Source:
    """The image files of a class, in natural order; hidden ones are left out, anything else is a fault."""
    if not folder.is_dir():
        return Source([], [_missing_class(folder)])
    if folder.is_symlink():
        return Source([], [_linked(folder)])
    images, faults = [], []
    paths = sorted(visible(folder), key=lambda path: natural_key(path.name))
    for path in paths:
        if not path.name.isprintable():
            what = f"the file name {path.name!a} is not printable text"
            faults.append(Fault(str(folder), what, "rename the file"))
        elif path.suffix.lower() in EXTENSIONS:
            images.append(Found(path, part, name, path.name))
        elif path.is_dir():
            remedy = "move its images up or make it a class of its own"
            faults.append(Fault(str(path), "a folder inside a class", remedy))
        else:
            faults.append(_no_image(str(path)))
    if not paths:
        remedy = "put at least one image there or remove the class"
        faults.append(Fault(str(folder), "the class is empty", remedy))
    return Source(images, faults)


def visible(folder: Path) -> list[Path]:
    """What a folder holds, hidden files aside; nothing where there is no folder."""
    return [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []


def holds_folders(folder: Path) -> bool:
    """Whether a folder holds a visible folder."""
    return any(entry.name[0] != "." and entry.is_dir() for entry in folder.iterdir())


def _missing_class(folder: Path) -> Fault:
    remedy = "make it, or correct the task's classes in params.yaml"
    if folder.parent.is_dir():
        same = unicodedata.normalize("NFC", folder.name)
        for other in folder.parent.iterdir():
            if unicodedata.normalize("NFC", other.name) == same:
                what = "the folder is missing; one whose name looks the same has its accents in another form"
                return Fault(
                    str(folder), what, "rename it to the name in params.yaml, or run `sdlora add-task`"
                )
    return Fault(str(folder), "the folder is missing", remedy)


def _linked(folder: Path) -> Fault:
    # DVC does not walk into it, so a changed image would not be noticed.
    what = "a link to a folder, in which DVC would not notice a changed image"
    return Fault(str(folder), what, "link the source folder as a whole, or copy the images")


def _no_image(where: str) -> Fault:
    return Fault(where, "not an image by its name", f"remove it (known are {' '.join(EXTENSIONS)})")


def _joined(sources: Iterable[Source]) -> Source:
    images: list[Found] = []
    faults: list[Fault] = []
    for source in sources:
        images += source.images
        faults += source.faults
    return Source(images, faults)


# ---- manifests


def manifests(folder: Path, manifest: str | None) -> list[tuple[Path, str | None]]:
    """The manifests of a source, each with the part that its place says; none where classes are folders."""
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
    """The images that manifests list for the classes `names`."""
    rows: list[tuple[Found, Row]] = []
    faults = []
    wanted = set(names)
    for path, part in tables:
        for row in read_manifest(path):
            label = class_of(row)
            if isinstance(label, Fault):
                faults.append(label)
                continue
            file = file_of(row, path.parent, check=label in wanted)
            its = part_of(row, given=part)
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
    present = {found.name for found in listed}
    for name in names:
        if name not in present:
            remedy = "add its images, or correct the task's classes in params.yaml"
            faults.append(Fault(str(tables[0][0]), f"no row has the label {name!r}", remedy))
    position = {name: index for index, name in enumerate(names)}
    listed.sort(
        key=lambda found: (PARTS.index(found.part or "train"), position[found.name], natural_key(found.file))
    )
    return Source(listed, faults)


def _by_place(rows: list[tuple[Found, Row]]) -> Iterator[tuple[Found, Row]]:
    """Where no row says its part and every path begins with a folder of a part's name, that is the part."""
    heads = {found.file.split("/")[0] if "/" in found.file else "" for found, _ in rows}
    by_place = heads and all(found.part is None for found, _ in rows) and heads <= set(WORDS)
    for found, row in rows:
        yield (found._replace(part=WORDS[found.file.split("/")[0]]) if by_place else found), row


def _listed_twice(rows: Sequence[tuple[Found, Row]], wanted: set[str]) -> Iterator[Fault]:
    first: dict[str, tuple[Found, Row]] = {}
    for found, row in rows:
        known, its_row = first.setdefault(found.file, (found, row))
        if its_row is row or not {found.name, known.name} & wanted:
            continue
        what = f"{found.file} stands in {its_row.where} already"
        if known.name != found.name:
            what += f", with another label ({known.name!r}, here {found.name!r})"
        elif known.part != found.part:
            what += f", in another part ({known.part}, here {found.part})"
        yield Fault(row.where, what, "remove one of the two lines")


def _in_linked_folders(folder: Path, listed: Iterable[Found]) -> Iterator[Fault]:
    places = {place for found in listed for place in list(Path(found.file).parents)[:-1]}
    for place in sorted(places):
        if (folder / place).is_symlink():
            yield _linked(folder / place)


def class_of(row: Row) -> str | Fault:
    """The class of a row: text as it is, a whole number as its decimal digits."""
    label = str(row.label) if type(row.label) is int else row.label
    if not isinstance(label, str):
        what = "the label is empty" if label is None else f"the label is {label!r}"
        return Fault(row.where, what, "write text or a whole number")
    fault = class_name_fault(label)
    return Fault(row.where, f"the label {label!r} {fault}", "rename the class") if fault else label


def part_of(row: Row, *, given: str | None) -> str | Fault | None:
    """The part of a row: what its manifest's place says, else its own word."""
    if given is not None or row.part is None:
        return given
    word = str(row.part).strip().lower()
    if word not in WORDS:
        return Fault(row.where, f"the split is {row.part!r}", "write train, validation or test")
    return WORDS[word]


def file_of(row: Row, home: Path, *, check: bool) -> str | Fault:
    """The path of a row, relative to its manifest; whether there is such an image is asked only to `check`."""
    file = row.file
    if not isinstance(file, str) or not file:
        if isinstance(file, dict):
            return Fault(
                row.where, "the image is inside the manifest", "write it as a file and its path here"
            )
        return Fault(row.where, f"the path is {file!r}", "write the path of the image file")
    if not file.isprintable():
        return Fault(row.where, f"the path {file!a} is not printable text", "rename the file")
    if posixpath.isabs(file) or file[1:3] == ":\\":
        return Fault(row.where, f"the path {file!r} is absolute", "write it relative to the manifest")
    if "\\" in file:
        return Fault(row.where, f"the path {file!r} has backslashes", "write /")
    clean = posixpath.normpath(file)
    if clean.split("/")[0] == "..":
        return Fault(row.where, f"the path {file!r} leaves the folder", "put the image below the manifest")
    if check:
        path = home / clean
        if path.suffix.lower() not in EXTENSIONS:
            return _no_image(f"{row.where}: {clean}")
        if not path.is_file():
            return Fault(row.where, f"there is no file {clean}", "add it, or remove the line")
    return clean


def read_manifest(path: Path) -> Iterator[Row]:
    """The rows of a manifest; an `InputError` names a file that is none, or lacks a column."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the manifest is missing; put it there, or correct the task") from None
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix)
    if reader is None:
        raise InputError(f"{path}: not a manifest by its name; known are .csv, .jsonl and .parquet")
    return reader(path, data)


def _csv_rows(path: Path, data: bytes) -> Iterator[Row]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        columns = columns_of(path, header)
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


def _jsonl_rows(path: Path, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            fault = " ".join(str(error).split())
            raise InputError(f"{where}: not valid JSON ({fault}); mend that line") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{where}: expected an object, found {line[:40].decode(errors='replace')}; mend it"
            )
        yield _row(where, record, columns_of(where, list(record)))


def _parquet_rows(path: Path, data: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = columns_of(path, file.schema_arrow.names)
        table = file.read(columns=[name for name in columns if name is not None])
    except (pa.ArrowException, OSError) as error:
        fault = " ".join(str(error).split())
        raise InputError(f"{path}: not a Parquet file ({fault}); write it anew") from None
    for number, record in enumerate(table.to_pylist(), start=1):
        yield _row(f"{path}: row {number}", record, columns)


def columns_of(where: str | Path, names: Sequence[str]) -> tuple[str, str, str | None]:
    """The columns of path, label and split (None where there is none) among those of a manifest."""
    paths = [name for name in PATH_COLUMNS if name in names]
    found = ", ".join(map(str, names)) or "none"
    if len(paths) != 1:
        what = "both path and file_name stand" if paths else "neither path nor file_name stands"
        hint = " (a manifest is separated by commas)" if len(names) == 1 and ";" in names[0] else ""
        raise InputError(f"{where}: {what} among the columns {found}{hint}; name one of them so")
    if "label" not in names:
        raise InputError(
            f"{where}: no column label among {found}; add it, or move the file out of the source"
        )
    for name in (paths[0], "label", "split"):
        if list(names).count(name) > 1:
            raise InputError(f"{where}: two columns {name}; remove one")
    return paths[0], "label", "split" if "split" in names else None


def _row(where: str, record: Mapping[str, Any], columns: tuple[str, str, str | None]) -> Row:
    path, label, split = columns
    # A column without a word in this row is a word of its own, and not one of the known.
    part = None if split is None else record[split] if record[split] is not None else ""
    return Row(where, record[path], record[label], part)


# ---- parts


def divide(images: Sequence[Found], data: Data) -> Source:
    """Give every image its part, and check that every class has at least one in train and one in test.

    Where the source does not say, `data.test_fraction` of a class become test images, at least one and never all;
    where `data.validation` is set and the source has none for a class, that share of its training images, at least
    one of several, become validation images. Which ones depends on `data.seed`, on the name of the class and on the
    names of its files alone: a class more, or another order on the disk, changes nothing for the others.
    """
    classes: dict[str, list[Found]] = defaultdict(list)
    for found in images:
        classes[found.name].append(found)
    divided, faults = [], []
    for name, members in classes.items():
        if all(found.part is None for found in members):
            if len(members) == 1:
                what = f"class {name!r} has one image, and needs one to learn and one to test"
                faults.append(Fault(str(members[0].path), what, "add images, or leave the class out"))
                continue
            members = _drawn(members, "test", data.test_fraction, data.seed)
        given = [found for found in members if found.part == "validation"]
        if given and data.validation is None:
            what = f"class {name!r} has {len(given)} validation images, but data.validation is null"
            faults.append(Fault(str(given[0].path), what, "set it to a share in params.yaml, or remove them"))
        train = [found for found in members if found.part == "train"]
        if data.validation is not None and not given and len(train) > 1:
            others = [found for found in members if found.part != "train"]
            members = [*_drawn(train, "validation", data.validation, data.seed), *others]
        for part in ("train", "test"):
            if not any(found.part == part for found in members):
                what = f"class {name!r} has no {part} image"
                faults.append(Fault(str(members[0].path), what, f"add one to {part}, or leave the class out"))
        divided += members
    position = {name: index for index, name in enumerate(classes)}
    divided.sort(
        key=lambda found: (PARTS.index(found.part or ""), position[found.name], natural_key(found.file))
    )
    return Source(divided, faults)


def _drawn(members: Sequence[Found], part: str, share: float, seed: int) -> list[Found]:
    """The images of a class, a share of them in `part`, at least one and never all, and the others in train."""
    order = sorted(members, key=lambda found: _lot(part, seed, found))
    number = max(1, min(len(members) - 1, round(len(members) * share)))
    chosen = {found.file for found in order[:number]}
    return [found._replace(part=part if found.file in chosen else "train") for found in members]


def _lot(purpose: str, seed: int, found: Found) -> bytes:
    return hashlib.sha256("\0".join((purpose, str(seed), found.name, found.file)).encode()).digest()
