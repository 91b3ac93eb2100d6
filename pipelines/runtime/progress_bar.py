"""Progress that people see: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipelines.runtime.console import log_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LINE_SECONDS = 5.0
"""Without a terminal a line is printed, and in Prefect the artifact is written, at most this often."""

_WINDOW_SECONDS = 20.0
"""The rate is that of the last so many seconds."""


_Also = Callable[[str], Callable[[float, str], None]]
"""Makes of a title what is told the same as people: a share in per cent, and a line."""


class ProgressBar:
    """Shows how far work is: `update(done, loss=0.12)` as often as one likes, `done` of `total`."""

    def __init__(self, title: str, total: int, unit: str, *, also: _Also | None = None) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self._started = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()
        self._spoken = self._started
        self._bar: Bar | None = None
        self._row: TaskID | None = None
        self._also = also(title) if also else None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = self._make_bar()
            self._row = self._bar.add_task(self.title, total=self.total, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._samples:
            self._say(f"{self._samples[-1][1]}/{self.total} {self.unit} in {self._clock(self._elapsed())}")
        if kind is None and self._also is not None:
            self._also(100.0, f"{self.total} {self.unit} in {self._clock(self._elapsed())}")

    def update(self, done: int, **facts: str | int | float) -> None:
        """Say that `done` of `total` units are done, with facts to show beside (step, epoch, loss)."""
        now = time.monotonic()
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=done, facts=self._describe(facts))
        if now - self._spoken >= _LINE_SECONDS:
            self._spoken = now
            line = f"{done}/{self.total} {self.unit}  {self._describe(facts)}"
            if self._bar is None:
                self._say(line)
            if self._also is not None:
                self._also(100.0 * done / max(self.total, 1), line)

    def _describe(self, facts: dict[str, str | int | float]) -> str:
        """Put facts, rate and time left into one text. Work that was resumed counts from where it was."""
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in facts.items()
        ]
        (first, before), (last, done) = self._samples[0], self._samples[-1]
        if last > first and done > before:
            rate = (done - before) / (last - first)
            parts += [f"{rate:.3g} {self.unit}/s" if rate < 100 else f"{rate:,.0f} {self.unit}/s"]
            parts += [f"{self._clock((self.total - done) / rate)} left"]
        return "  ".join(parts)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _say(self, text: str) -> None:
        log_line(f"{self.title}: {text}")

    @staticmethod
    def _clock(seconds: float) -> str:
        if seconds < 60:
            return f"{seconds:.1f} s"
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

    @staticmethod
    def _make_bar() -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        return Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[facts]}", style="dim"),
            console=Console(stderr=True),
        )
