"""The two hashes of files, taken by other threads before they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from pipelines.project.files import sha256_of

_CHUNK = 2**20
"""Bytes that are read at once."""


class _Hashes(NamedTuple):
    md5: str
    sha256: str


class FileHashes:
    """The MD5 and SHA-256 of files, which are those of the time when they were taken.

    Both come from one reading where they are taken ahead, and from one each where they are not.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._known: dict[str, _Hashes] = {}
        self._coming: list[Future[dict[str, _Hashes]]] = []

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)

    def advance(self, coming: Iterable[Path]) -> None:
        """Hold the hashes of what was coming until now, forget those before, and have what is coming read meanwhile.

        Args:
            coming: Files, and folders with all files in them. What is not there is left out.
        """
        assert self._pool is not None
        self._known = {path: hashes for each in self._coming for path, hashes in each.result().items()}
        self._coming = [self._pool.submit(_hashes_below, os.fspath(place)) for place in coming]

    def md5(self, path: Path) -> str:
        """Return the MD5 of a file's bytes, which is what DVC names files by."""
        known = self._known.get(os.fspath(path))
        return known.md5 if known else md5_of(path)

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file's bytes, in hexadecimal."""
        known = self._known.get(os.fspath(path))
        return known.sha256 if known else sha256_of(path)


def md5_of(path: Path) -> str:
    """Return the MD5 of a file's bytes, which is what DVC names files by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _hashes_below(place: str) -> dict[str, _Hashes]:
    """Return the hashes of a file, or of all files in a folder, by path. Whoever asks for another learns why."""
    found = {}
    for path in _files_below(place):
        try:
            found[path] = _both(path)
        except OSError:
            continue
    return found


def _files_below(place: str) -> Iterator[str]:
    """Yield the regular files at a path. Links to folders are not followed."""
    if os.path.isfile(place):
        yield place
    for folder, _, names in os.walk(place):
        paths = (f"{folder}/{name}" for name in names)
        yield from (path for path in paths if os.path.isfile(path))


def _both(path: str) -> _Hashes:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
            sha256.update(chunk)
    return _Hashes(md5.hexdigest(), sha256.hexdigest())
