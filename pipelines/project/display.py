"""Values, keys and lines as messages show them: on one line, and short however long they are."""

from __future__ import annotations

import json
from collections.abc import Iterable

MESSAGE = 300
"""Characters that a message has at most."""
_VALUE = 60
"""Characters that a value or a key has at most in a message."""


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters: of a longer one its beginning and its end."""
    if len(text) <= most:
        return text
    end = (most - 3) // 3
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def as_line(text: str) -> str:
    """Return a text on one line, as a terminal shows it, of at most `MESSAGE` characters."""
    line = " ".join(text.split())
    return shortened(line if line.isprintable() else "".join(map(_printable, line)), MESSAGE)


def _printable(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def show_key(key: str) -> str:
    """Return a key, or a name, as one reads it in a line."""
    return shortened(key if key[:_VALUE].isprintable() else json.dumps(key[:_VALUE]), _VALUE)


def show_value(value: object) -> str:
    """Return a value as one reads it in YAML."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, str):
        value = value[: 2 * _VALUE]
        text = json.dumps(value, ensure_ascii=not value.isprintable())
        return text if len(text) <= _VALUE else f"{text[: _VALUE - 3]}..."
    if isinstance(value, bool | int | float):
        return shortened(json.dumps(value), _VALUE)
    return {"dict": "a block of keys", "list": "a list"}.get(type(value).__name__, str(value))


def show_names(names: Iterable[str]) -> str:
    """Return names in a row: of many the first ten, and how many more there are."""
    shown = [show_key(name) for name in names]
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
