"""The text of dvc.lock as DVC writes it: a head, and an entry for each stage."""

from __future__ import annotations

import re
from collections.abc import Iterable

_HEAD = "schema: '2.0'\nstages:\n"
"""How the text begins; stages follow, each a key indented by two spaces with its entry below it."""


def entry_texts(text: str) -> list[str] | None:
    """Return the texts of the entries, in order. None where the text is none that DVC has written."""
    if not text.startswith(_HEAD):
        return None
    return [part for part in re.split(r"^(?=  [^ ])", text.removeprefix(_HEAD), flags=re.MULTILINE) if part]


def lock_text(entries: Iterable[str]) -> str:
    """Return the text that has these entries."""
    return _HEAD + "".join(entries)


def named_entries(text: str) -> dict[str, str] | None:
    """Return the texts of the entries by the stage's name. None where the text is none that DVC has written."""
    texts = entry_texts(text)
    if texts is None:
        return None
    found = {text.partition("\n")[0].strip().removesuffix(":"): text for text in texts}
    return found if len(found) == len(texts) else None
