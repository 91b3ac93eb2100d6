"""One `sdlora run` at a time in a project, and a file of DVC's locks that can be read."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.project.errors import InputError
from pipelines.project.layout import RUN_LOCK, RWLOCK
from pipelines.runtime.console import log_line
from pipelines.runtime.file_lock import held
from pipelines.runtime.processes import wake_the_ending


@contextlib.contextmanager
def only_run(*, wait: bool = False) -> Iterator[None]:
    """Refuse to work, or wait, while another `sdlora run` works in the same folder."""
    wake_the_ending(RUN_LOCK)
    busy = f"another sdlora run is at work in {Path.cwd()}, or an audit reads it; wait for it or stop it"
    with held(RUN_LOCK, busy=None if wait else busy):
        _mend_rwlock()
        yield


@contextlib.contextmanager
def no_run() -> Iterator[bool]:
    """Keep runs away while files are read. What is given is False while one is at work.

    Where the lock cannot be had, in a checkout that is not this user's to write to, nobody is kept away.
    """
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(held(RUN_LOCK, busy="a run is at work", shared=True))
        except InputError:
            yield False
            return
        except OSError:
            pass
        yield True


def _mend_rwlock() -> None:
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
