"""What makes a plain function a stage: its name, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, str | int | float]]
"""A table to show, row by row."""


@dataclass(frozen=True)
class StageResult:
    """What a stage has to tell when it has left its files."""

    rows: Rows
    """what it did, in a few words"""
    documents: Callable[[], Mapping[str, str]] = dict
    """makes Markdown texts by their keys; called only where somebody will see them"""
    restored: bool = False
    """it computed nothing: its output was restored"""


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: called, it is its plain function."""

    name: str
    fn: Callable[..., StageResult]

    def __call__(self, *args: Any, **kwargs: Any) -> StageResult:  # noqa: ANN401 - the function's own arguments
        return self.fn(*args, **kwargs)


def stage(fn: Callable[..., StageResult]) -> Stage:
    """Make a stage of a function. Its module's name is the stage's name."""
    return Stage(fn.__name__, fn)
