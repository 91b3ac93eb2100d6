"""The two hashes of files, taken by other processes before they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from pipelines.project.files import sha256_of
from pipelines.runtime.processes import die_with

_GROUPS_AHEAD, _FILES_AHEAD = 16, 50_000
"""How many groups to go ahead, and for how many files at each path. What is beyond is hashed when it is asked for."""
_CHUNK = 2**20
"""Bytes that are read at once."""


class _Hashes(NamedTuple):
    md5: str
    sha256: str


class FileHashes:
    """The MD5 and SHA-256 of files, which are those of the time when they were taken.

    Within its context they are taken ahead, both from one reading, group after group. What was not is hashed when it is
    asked for. Processes take them, because threads would wait for the interpreter at each of many small files.
    """

    def __init__(self, groups: Iterable[Iterable[Path]] = ()) -> None:
        """Name the files, and the folders with all files in them, in the order in which they will be needed."""
        self._groups = iter(groups)
        self._coming: deque[list[Future[dict[str, _Hashes]]]] = deque()
        self._known: dict[str, _Hashes] = {}

    def __enter__(self) -> Self:
        self._pool = ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            mp_context=multiprocessing.get_context("spawn"),  # a fork would share the threads' locks
            initializer=_begin,
            initargs=(os.getpid(),),
        )
        for _ in range(_GROUPS_AHEAD):
            self._submit()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        group = next(self._groups, ())
        taken: list[Future[dict[str, _Hashes]]] = []
        with contextlib.suppress(BrokenExecutor):
            taken += (self._pool.submit(_take, os.fspath(place)) for place in group)
        self._coming.append(taken)

    def advance(self) -> None:
        """Hold the hashes of the next group, and forget those of the one before."""
        self._known = {}
        for taken in self._coming.popleft():
            with contextlib.suppress(BrokenExecutor):  # its process was killed
                self._known |= taken.result()
        self._submit()

    def md5(self, path: Path) -> str:
        """Return the MD5 of a file's bytes, which is what DVC names files by."""
        known = self._known.get(os.fspath(path))
        return known.md5 if known else md5_of(path)

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of a file's bytes, in hexadecimal."""
        known = self._known.get(os.fspath(path))
        return known.sha256 if known else sha256_of(path)


def _begin(parent: int) -> None:
    """Leave an interrupt to the process that asked, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)


def _take(place: str) -> dict[str, _Hashes]:
    """Return the hashes of the files at a path, as many as there is room for. Whoever asks for others learns why."""
    found = {}
    for path in itertools.islice(_files_at(place), _FILES_AHEAD):
        with contextlib.suppress(OSError):
            found[path] = _both(path)
    return found


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
