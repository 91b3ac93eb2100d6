"""The splits of a chain: each holds the files of its own task, and its record names the split before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.project.schemas import ClassMap, SplitRecord
from pipelines.runtime.earlier_outputs import Find
from sdlora.ledger import ClassEntry

SPLIT = "split.json"
"""The record of a split."""
_CLASSES = "classes.json"
SAMPLES, TEST, VALIDATION = "samples", "test", "validation"
"""Parts of a split. Each is a folder with a file of the task's own."""


def part_file(part: str, task: str) -> str:
    """Return the name that the file of a part has in the split of its task."""
    return f"{part}/{task}.arrow"


def own_files(folder: Path, sha256: Callable[[Path], str] = sha256_of) -> dict[str, str]:
    """Return the files of a split but for its record, with their hashes, as the record names them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SPLIT)
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


@dataclass(frozen=True)
class Splits:
    """The splits of all tasks up to one."""

    classes: list[ClassEntry]
    """All classes so far, in the order of their labels."""
    tasks: list[str]
    """All tasks so far, in order of arrival."""
    step_classes: dict[str, list[int]]
    """The labels that each task of the kind `more` has images of."""
    _folders: Mapping[str, Path]
    _files: Mapping[str, Mapping[str, str] | None]
    """Task → the files that its record names. None where it names none."""
    _compared: set[Path] = field(default_factory=set)

    def file(self, part: str, task: str) -> Path | None:
        """Return the file of a part. None where the task has none of it.

        Raises:
            InputError: the file is missing, or not the one that the record names.
        """
        name = part_file(part, task)
        path, known = self._folders[task] / name, self._files[task]
        if known is None:  # a split of before records: whole in itself, and held by DVC alone
            return path if path.is_file() else None
        if name not in known:
            return None
        if path not in self._compared:
            if not path.is_file():
                raise InputError(f"{path}: it is missing; restore it with `dvc checkout` or `dvc pull`")
            if sha256_of(path) != known[name]:
                raise InputError(
                    f"{path}: not the file that {self._folders[task] / SPLIT} names; restore it with `dvc checkout`"
                )
            self._compared.add(path)
        return path

    def needed(self, part: str, task: str) -> Path:
        """Return the file of a part that every task has."""
        path = self.file(part, task)
        if path is None:
            raise InputError(
                f"{self._folders[task] / part_file(part, task)}: it is missing; restore it with `dvc checkout` or "
                "`dvc pull`"
            )
        return path


def read_splits(folder: Path, find: Find) -> Splits:
    """Return the splits of a chain up to that in `folder`. Each record is compared with what the next one names.

    Args:
        folder: The split of a step.
        find: Returns where the split of an earlier step is.

    Raises:
        InputError: a record is missing or damaged, or not the one that the next one names.
    """
    seen = read_json(folder / _CLASSES, ClassMap)
    named = read_json(folder / SPLIT, SplitRecord).get("files", {})
    if named and named.get(_CLASSES) != sha256_of(folder / _CLASSES):
        raise InputError(
            f"{folder / _CLASSES}: not the file that {SPLIT} names; restore it with `dvc checkout`"
        )
    folders: dict[str, Path] = {}
    files: dict[str, Mapping[str, str] | None] = {}
    expected: str | None = None
    for task in reversed(seen["tasks"]):
        place = folder if not folders else find(task)
        record: dict[str, Any] = read_json(place / SPLIT, SplitRecord)
        if expected is not None and sha256_of(place / SPLIT) != expected:
            raise InputError(
                f"{place / SPLIT}: not the record that the split after it was made from; run `sdlora run`, or restore "
                "both with `dvc checkout`"
            )
        folders[task], files[task], expected = place, record.get("files"), record.get("previous")
    return Splits(seen["classes"], seen["tasks"], seen.get("step_classes", {}), folders, files)
