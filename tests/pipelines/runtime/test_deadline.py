"""What another program is asked ends in time, wherever it waits; work of our own takes as long as it takes."""

from __future__ import annotations

import signal
import socket
import time

import pytest

from pipelines.runtime.deadline import within


def test_a_wait_for_a_socket_a_lock_or_a_clock_ends_in_time() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for wait in (lambda: ours.recv(1), lambda: time.sleep(60)):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match=r"^no answer within 0\.1 s$"), within(0.1):
                wait()
            assert time.monotonic() - began < 10


def test_a_wait_that_catches_every_exception_and_waits_anew_ends_too() -> None:
    def stubborn() -> None:
        for _ in range(2):
            try:
                time.sleep(60)
            finally:
                time.sleep(60)

    with pytest.raises(TimeoutError), within(0.1):
        stubborn()


def test_what_is_done_while_the_time_stands_still_is_not_bounded() -> None:
    with within(0.2) as deadline:
        with deadline.paused():
            time.sleep(0.5)
        time.sleep(0.01)


def test_afterwards_all_is_as_before() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with within(5):
        with pytest.raises(TimeoutError), within(0.1):
            time.sleep(60)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 5
    assert signal.getsignal(signal.SIGALRM) == handler
