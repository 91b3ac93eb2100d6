"""A bound on the whole of what another program is asked: one that answers a byte a second keeps to every other."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_AGAIN_SECONDS = 1.0
"""After the first time the signal comes so often: a library may have caught what it raised, and wait anew."""


class _TimeIsUpError(BaseException):
    """Raised by the signal, past all that handles exceptions of the network."""


class Deadline:
    """The time that a block may take. It stands still in a block of work that is nobody's answer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._running = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Work here as long as it takes. Afterwards the time begins anew."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        self._running = True
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, self.seconds, _AGAIN_SECONDS)

    def _stop(self) -> None:
        self._running = False  # first: a signal that is on its way raises nothing
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._running:
            raise _TimeIsUpError


@contextlib.contextmanager
def within(seconds: float) -> Iterator[Deadline]:
    """Bound what a block takes on the whole. A `TimeoutError` where it takes longer, wherever it waits.

    Outside of the main thread, where Python takes no signals, nothing is bounded.
    """
    deadline = Deadline(seconds)
    if threading.current_thread() is not threading.main_thread():
        yield deadline
        return
    began = time.monotonic()
    outer = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, deadline._ring)
    try:
        try:
            deadline._start()
            yield deadline
        finally:
            deadline._stop()
    except _TimeIsUpError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    finally:
        deadline._stop()
        signal.signal(signal.SIGALRM, before)
        if outer[0]:
            signal.setitimer(signal.ITIMER_REAL, max(outer[0] - (time.monotonic() - began), 0.001), outer[1])


_given_up = False


def give_up() -> None:
    """Note that something waits in the background for an answer that this process goes on without."""
    global _given_up
    _given_up = True


def end_if_given_up(status: int) -> None:
    """End the process at once if something was given up: libraries wait for it when Python ends by itself."""
    if not _given_up:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
