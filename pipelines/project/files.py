"""Files and folders that are whole or absent, never half-written."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.project.errors import InputError
from sdlora import records


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` on success. After any exception `out` is as it was."""
    partial = out.parent / f".{out.name}.partial"
    remove_path(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        remove_path(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one move: a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.parent / f".{path.name}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path), partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write JSON that is the same for equal values, byte for byte."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def read_json(path: Path, kind: Any = object) -> Any:  # noqa: ANN401 - a type, and a value of it
    """Read a JSON file that an earlier stage left, within the bounds of `sdlora.records.read_bounded_json`.

    An `InputError` names it when it is missing or damaged, or not of the type (`pipelines.project.schemas`).
    """
    try:
        return records.read_bounded_json(path, kind)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the file is missing; run `sdlora run`, which makes it") from None
    except ValueError as error:
        raise InputError(f"{error}; delete it and run `sdlora run`") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key under which `img2` comes before `img10`. Unequal names never compare equal."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an `OSError` that names no file (a full disk in mid-write) the name of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder with all in it. Nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
