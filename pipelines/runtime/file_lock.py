"""One process at a time: locks of the operating system, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines.project.errors import InputError
from pipelines.runtime.console import log_line


@contextlib.contextmanager
def held(path: Path, *, busy: str | None = None) -> Iterator[IO[bytes]]:
    """Hold the lock of a file, which is made where it is not there, and give the file, opened to append.

    While another process holds it: an `InputError` of the line `busy`; without one this waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(str(busy)) from None
        yield file


RWLOCK = Path(".dvc/tmp/rwlock")
"""DVC's file of the paths that are being read and written."""


def mend_rwlock() -> None:
    """Delete DVC's file of locks where a full disk has left a part of it: DVC refuses every command until then.

    A part that DVC is just writing is whole a moment later.
    """
    for _ in range(3):
        try:
            json.loads(RWLOCK.read_bytes())
            return
        except FileNotFoundError:
            return
        except ValueError:
            time.sleep(0.5)
    log_line(f"warning: {RWLOCK} was damaged, as a full disk leaves it; deleted")
    RWLOCK.unlink(missing_ok=True)
