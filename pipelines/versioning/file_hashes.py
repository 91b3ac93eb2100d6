"""The two hashes of files, taken by other threads before they are asked for."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from types import TracebackType
from typing import NamedTuple, Self

from pipelines.project.files import sha256_of

_GROUPS_AHEAD, _FILES_AHEAD = 100, 100_000
"""How far to go ahead. What is beyond is hashed when it is asked for."""
_CHUNK = 2**20
"""Bytes that are read at once."""


class _Hashes(NamedTuple):
    md5: str
    sha256: str


class FileHashes:
    """The MD5 and SHA-256 of files, which are those of the time when they were taken.

    Within its context they are taken ahead, both from one reading, group after group. What was not is hashed when it is
    asked for.
    """

    def __init__(self, groups: Iterable[Iterable[Path]] = ()) -> None:
        """Name the files, and the folders with all files in them, in the order in which they will be needed."""
        self._groups = iter(groups)
        self._coming: deque[list[Future[dict[str, _Hashes]]]] = deque()
        self._known: dict[str, _Hashes] = {}
        self._room = Semaphore(_FILES_AHEAD)

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        for _ in range(_GROUPS_AHEAD):
            self._submit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        group = next(self._groups, None)
        if group is not None:
            self._coming.append([self._pool.submit(self._take, os.fspath(place)) for place in group])

    def advance(self) -> None:
        """Hold the hashes of the next group, and forget those of the one before."""
        self._room.release(len(self._known) or 1)
        self._known = {}
        for taken in self._coming.popleft():
            self._known |= taken.result()
        self._submit()

    def _take(self, place: str) -> dict[str, _Hashes]:
        """Return the hashes of files at a path, as many as there is room for. Whoever asks for others learns why."""
        found = {}
        for path in _files_at(place):
            if not self._room.acquire(blocking=False):
                break
            try:
                found[path] = _both(path)
            except OSError:
                self._room.release()
        return found

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


def _files_at(place: str) -> Iterator[str]:
    """Yield a path if it is a regular file, and the regular files below it. Links to folders are not followed."""
    if os.path.isfile(place):
        yield place
    for folder, _, names in os.walk(place):
        yield from (path for name in names if os.path.isfile(path := f"{folder}/{name}"))


def _both(path: str) -> _Hashes:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
            sha256.update(chunk)
    return _Hashes(md5.hexdigest(), sha256.hexdigest())
