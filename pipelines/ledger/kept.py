"""Notes on results that were kept although the code of their stages has changed: `ledger/kept`, in a chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, write_json
from pipelines.project.layout import KEPT
from pipelines.project.settings import Section

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KeptStage(Section):
    """A stage whose result was kept."""

    made_by: str | None
    """the md5 of the fingerprint of the code that made it; null where dvc.lock had none"""
    now: str
    """that of the code that was installed when it was kept"""
    result: _Sha256 | None
    """the hash of the file that stands for what the stage left; null where none does"""


class _KeptNote(Section):
    """What was kept at one time."""

    at: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    """when, UTC"""
    previous: _Sha256 | None
    """the hash of the note before; null for the first"""
    stages: Mapping[str, KeptStage]
    """stage → what it was made by"""


def read_notes() -> Iterator[_KeptNote]:
    """Yield all notes in their order.

    Raises:
        InputError: a note is damaged, or is not the one that the next names.
    """
    previous = None
    for path in sorted(KEPT.glob("*.json")):
        try:
            note = _KeptNote.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise InputError(
                f"{path}: not a note of what was kept ({where}: {first['msg']}); restore it from version control"
            ) from None
        if note.previous != previous:
            raise InputError(
                f"{path}: the note before it is not the one that it names; restore {KEPT} from version control"
            )
        previous = sha256_of(path)
        yield note


def write_note(at: str, stages: Mapping[str, KeptStage]) -> Path:
    """Append a note. Return its path."""
    known = sorted(KEPT.glob("*.json"))
    path = KEPT / f"{len(list(read_notes())) + 1:04}.json"
    note = _KeptNote(at=at, previous=sha256_of(known[-1]) if known else None, stages=stages)
    write_json(path, note.model_dump(mode="json"))
    return path
