"""How figures are written for people, in tables, pages and lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

DASH = "\N{EN DASH}"
"""What stands where there is nothing."""


def percent(value: float | None, *, digits: int = 1, unit: str = "") -> str:
    """Return a share in per cent, with a unit such as ` %`. Nothing is a dash."""
    return DASH if value is None or math.isnan(value) else f"{100 * value:.{digits}f}{unit}"


def chance(p_value: float | None) -> str:
    """Return a p-value as a text."""
    if p_value is None:
        return DASH
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def p_equals(p_value: float) -> str:
    """Return a p-value within a sentence."""
    return "p < 0.001" if p_value < 0.001 else f"p = {chance(p_value)}"


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number as a text. Nothing is a dash."""
    return DASH if value is None or math.isnan(value) else format(value, form)


def count(things: int, word: str) -> str:
    """Return a number of things in words."""
    plural = {"class": "classes", "copy": "copies"}.get(word, f"{word}s")
    return f"{things:,} {word if things == 1 else plural}"


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def page_templates(folder: Path | str) -> Environment:
    """Return the templates of a folder, in which everything that a user could have named is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(str(folder), encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
