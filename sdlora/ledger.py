"""The ledger: one record per step, each holding the hash of the one before."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from sdlora.records import (
    FileName,
    Format,
    Name,
    Number,
    Sha256,
    TaskId,
    WholeNumber,
    read_record_file,
    regular_size,
)

RECORD = "step.json"


class ClassEntry(TypedDict):
    """A class of a record. Its place among all is its label."""

    label: WholeNumber
    name: Name
    task: TaskId


class _StepRecord(TypedDict):
    """What of a record is read here. It says more, for those who audit it."""

    format: NotRequired[Format]
    step: TaskId
    previous: Sha256 | None
    backbone: Sha256
    tasks: list[TaskId]
    classes: list[ClassEntry]
    directions: list[TaskId]
    files: dict[FileName, Sha256]
    targets: NotRequired[list[Name]]
    magnitudes: NotRequired[dict[TaskId, Number]]
    norms: NotRequired[dict[Name, Number]]
    images: NotRequired[dict[TaskId, Sha256]]
    method: NotRequired[Name]
    formulation: NotRequired[Name]
    head: NotRequired[Name]


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """Return the record as it is written and hashed: JSON with sorted keys."""
    return (json.dumps(record, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def record_hash(folder: Path) -> str:
    """SHA-256 of the record in a model folder: what the next step's record holds as `previous`."""
    return file_sha256(folder / RECORD)


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal."""
    regular_size(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a model folder, which is as a record is.

    Raises:
        FileNotFoundError: the folder or its record is missing.
        ValueError: it is no record of a step.
    """
    path = folder / RECORD
    record: dict[str, Any] = read_record_file(path, _StepRecord)
    tasks, targets = record["tasks"], record.get("targets", [])
    faults = {
        "its last task is not its step": record["step"] != (tasks[-1] if tasks else "t00"),
        "a task stands twice": len(set(tasks)) < len(tasks),
        "a target stands twice": len(set(targets)) < len(targets),
        "a direction is of no task, or stands twice": not _part_of(record["directions"], tasks),
        "its labels are not 0, 1, 2, …": [entry["label"] for entry in record["classes"]]
        != list(range(len(record["classes"]))),
        "the tasks of its classes are not its tasks": list(
            dict.fromkeys(e["task"] for e in record["classes"])
        )
        != tasks,
        "a name stands for two classes": len({e["name"] for e in record["classes"]}) < len(record["classes"]),
    }
    if fault := next((text for text, wrong in faults.items() if wrong), None):
        raise ValueError(f"{path}: {fault}; restore the file")
    return record


def require_files(folder: Path, record: Mapping[str, Any], needed: Iterable[str] = ()) -> None:
    """Hold that the files of a folder are those that its record names.

    Args:
        needed: what the record must name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is another, or not named.
    """
    if unnamed := next((name for name in needed if name not in record["files"]), None):
        raise ValueError(
            f"{folder / RECORD}: its files lack {unnamed}; restore the folder with `dvc checkout`"
        )
    for name, expected in record["files"].items():
        try:
            found = file_sha256(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"{folder / name}: it is missing; get the whole folder (`dvc checkout`, `dvc pull` or `dvc get`)"
            ) from None
        if found != expected:
            raise ValueError(
                f"{folder / name}: changed since the step was frozen (sha256 {found[:12]}, its record says "
                f"{expected[:12]}); restore it with `dvc checkout`"
            )


def _part_of(some: list[str], known: list[str]) -> bool:
    return len(set(some)) == len(some) and set(some) <= set(known)
