"""One process at a time: locks of the operating system, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines.project.errors import InputError


@contextlib.contextmanager
def held(path: Path, *, busy: str | None = None, shared: bool = False) -> Iterator[IO[bytes]]:
    """Hold the lock of a file, which is made where it is not there, and give the file, opened to append.

    While another process holds it: an `InputError` of the line `busy`; without one this waits. Several processes may
    hold a lock that is `shared` with each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(str(busy)) from None
        yield file
