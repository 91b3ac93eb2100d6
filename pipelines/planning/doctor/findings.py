"""What the doctor finds, as it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One thing that the doctor found."""

    level: str
    """error (training would be refused, or its numbers wrong), warning or ok"""
    check: str
    """what was looked at"""
    task: str
    """the task; empty for the machine"""
    what: str
    where: list[str]
    """files or classes"""
    remedy: str


def counted(things: Sequence[Any] | Mapping[Any, Any], word: str) -> str:
    """Return a number of things in words."""
    plural = {"class": "classes", "copy": "copies"}.get(word, f"{word}s")
    return f"{len(things)} {word if len(things) == 1 else plural}"
