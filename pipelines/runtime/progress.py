"""The progress of long work, and who shows it: work says how far it is, and knows nothing of terminals or servers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol


class Bar(Protocol):
    """What shows how far work is."""

    def update(self, done: int, **facts: str | int | float) -> None:
        """Show that `done` units are done, with facts beside (step, epoch, loss)."""


class _Hidden:
    def update(self, done: int, **facts: str | int | float) -> None:
        """Show nothing."""


_Shown = Callable[[str, int, str], AbstractContextManager[Bar]]
"""Makes a bar of a title, the number of units and what they are called."""

_shown: ContextVar[_Shown | None] = ContextVar("shown", default=None)


def progress(title: str, *, total: int, unit: str = "steps") -> AbstractContextManager[Bar]:
    """Return what to tell of the progress of work of `total` units.

    It is shown as `show_progress` has arranged it, and nowhere where nobody has.
    """
    shown = _shown.get()
    return nullcontext(_Hidden()) if shown is None else shown(title, total, unit)


def show_progress(shown: _Shown) -> None:
    """Have all work in this context, and in what is called from it, show its progress in this way."""
    _shown.set(shown)
