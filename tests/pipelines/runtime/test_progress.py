"""Progress is a bar on a terminal and a few lines elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from pipelines.runtime import progress_bar
from pipelines.runtime.progress_bar import ProgressBar
from tests.support.repository import REPOSITORY


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress_bar, "time", found)
    return found


def test_elsewhere_than_on_a_terminal_a_line_is_printed_at_most_every_five_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("fit t02", 100, "images") as bar:
        for done in range(1, 101):
            clock.now += 0.125
            bar.update(done, step=f"{done}/100", loss=0.12345)
    assert capsys.readouterr().err.splitlines() == [
        "fit t02: 40/100 images  step 40/100  loss 0.1235  8 images/s  7.5 s left",
        "fit t02: 80/100 images  step 80/100  loss 0.1235  8 images/s  2.5 s left",
        "fit t02: 100/100 images in 12.5 s",
    ]


def test_work_that_was_resumed_does_not_count_what_was_done_before(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar("fit", 1000, "steps") as bar:
        bar.update(900)
        clock.now += 6
        bar.update(906)
    assert "906/1000 steps  1 steps/s  1:34 left" in capsys.readouterr().err


def test_work_that_fails_is_not_said_to_be_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with ProgressBar("fit", 10, "steps") as bar:
            bar.update(1)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_with_facts_and_time_left() -> None:
    program = """
import time
from pipelines.runtime.progress_bar import ProgressBar
with ProgressBar("fit t02", 4, "images") as bar:
    for done in range(1, 5):
        bar.update(done, epoch="1/2", loss=0.5)
        time.sleep(0.05)
"""
    terminal, end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", program], env=environment, stderr=end, check=True, timeout=60)
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    for text in ("fit t02", "100%", "epoch 1/2", "loss 0.5", "images/s", "left"):
        assert text in shown
