"""The ledger: one record per step, each holding the hash of the one before."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from sdlora.records import (
    FileName,
    Name,
    Number,
    Rule,
    Sha256,
    TaskId,
    WholeNumber,
    read_record_file,
    regular_size,
)

RECORD = "step.json"
OWN_FILES = 2
"""The format of a record that names its step's own files, and the record before. One of format 1 (or of none) names all
files so far, which its folder holds: step t00, and every step made before there was this format."""
_FORMATS = (1, OWN_FILES)


class ClassEntry(TypedDict):
    """A class of a record. Its place among all is its label."""

    label: WholeNumber
    name: Name
    task: TaskId


Labels = Annotated[
    list[WholeNumber],
    Rule(lambda labels: labels and labels == sorted({*labels}), "labels that rise, at least one"),
]


class _StepRecord(TypedDict):
    """What of a record is read here. It says more, for those who audit it."""

    format: NotRequired[
        Annotated[
            int, Rule(_FORMATS.__contains__, "1 or 2; a newer version of this program wrote it, install that")
        ]
    ]
    step: TaskId
    after: NotRequired[TaskId]
    previous: Sha256 | None
    backbone: Sha256
    tasks: NotRequired[list[TaskId]]
    classes: list[ClassEntry]
    directions: list[TaskId]
    files: dict[FileName, Sha256]
    targets: NotRequired[list[Name]]
    magnitudes: NotRequired[dict[TaskId, Number]]
    norms: NotRequired[dict[Name, Number]]
    images: NotRequired[dict[TaskId, Sha256]]
    step_classes: NotRequired[dict[TaskId, Labels]]
    method: NotRequired[Name]
    formulation: NotRequired[Name]
    head: NotRequired[Name]


Beside = Callable[[str], Path]
"""The model folder of another step of the same chain, by its name."""

_LASTING = re.compile(r"(directions|head|statistics|drift)/.*")
"""Files that later steps stand on where they lie. The others are made anew at every step."""


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


def read_own_record(folder: Path) -> dict[str, Any]:
    """Return the record in a model folder, which says what its step has made and names the record before.

    Raises:
        FileNotFoundError: the folder or its record is missing.
        ValueError: it is no record of a step.
    """
    path = folder / RECORD
    record: dict[str, Any] = read_record_file(path, _StepRecord)
    needed = "after" if names_own_files(record) else "tasks"
    if needed not in record:
        raise ValueError(f"{path}: it lacks {needed}; restore the file")
    return record


def read_record(folder: Path, *, beside: Beside | None = None) -> dict[str, Any]:
    """Return what the record of a step and all records before it say of the chain so far.

    It is the step's own record with `tasks`, `classes`, `images`, `step_classes` and `files` of all steps so far, and
    with `owners`: the name of each file that it stands on → the step whose folder holds it.

    Args:
        beside: where the folders of earlier steps are; None where they lie beside `folder`.

    Raises:
        FileNotFoundError: the folder, its record or one before is missing.
        ValueError: one of them is no record, or not the one that its successor names.
    """
    return ChainReader(beside or folders_beside(folder)).read(folder)


class ChainReader:
    """Reads the records of steps as `read_record` does. Of steps in order each record is read once.

    Its files must stay as they are in the meantime.
    """

    def __init__(self, beside: Beside) -> None:
        """Read the folders of earlier steps where `beside` says that they are."""
        self._beside = beside
        self._chain = JoinedRecords()
        self._last: str | None = None
        """The hash of the record that was added last."""

    def read(self, folder: Path) -> dict[str, Any]:
        """Return what `read_record` says of a model folder. It raises the same errors."""
        back = list(_records_back(folder, self._beside, known=self._last))
        if self._last is None or back[-1][1].get("previous") != self._last:
            self._chain = JoinedRecords()
        self._last = None
        record: dict[str, Any] = {}
        for each, own in reversed(back):
            record = self._chain.add(each, own)
        self._last = record_hash(folder)
        return {
            name: copy(value) if isinstance(value, dict | list) else value for name, value in record.items()
        }


def _records_back(folder: Path, find: Beside, *, known: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder and the record of a step, and of each step before, as far back as the chain is needed.

    Args:
        known: the hash of a record that ends it.
    """
    own = read_own_record(folder)
    yield folder, own
    seen = {own["step"]}
    while names_own_files(own) and (known is None or own["previous"] != known):
        successor, earlier = own, find(own["after"])
        try:
            found = record_hash(earlier)
            own = read_own_record(earlier)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"{earlier / RECORD}: it is missing, and step {successor['step']} stands on it; get the model folders "
                "of all steps before too (`dvc pull artifacts/model`), or export the step"
            ) from None
        if found != successor["previous"] or own["step"] in seen:
            raise ValueError(
                f"{earlier / RECORD}: not the record that step {successor['step']} was made from (sha256 {found[:12]}, "
                f"expected {str(successor['previous'])[:12]}); restore it with `dvc checkout`"
            )
        seen.add(own["step"])
        yield earlier, own


class JoinedRecords:
    """What the records of a chain say together, step by step. Each is looked at once, however long the chain."""

    def __init__(self) -> None:
        self.record: dict[str, Any] | None = None
        """What `add` has returned last."""
        self._begin()

    def _begin(self) -> None:
        self._tasks: list[str] = []
        self._classes: list[ClassEntry] = []
        self._images: dict[str, str] = {}
        self._step_classes: dict[str, list[int]] = {}
        self._files: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        self._names: set[str] = set()
        self._directions: set[str] = set()
        self._passing: list[str] = []

    def add(self, folder: Path, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return a step's own record with what the records before it say, as `read_record` does.

        Its lists and dictionaries are those of the chain: they grow when the next record is added.

        Args:
            folder: the model folder of the step, for what is said of it.

        Raises:
            ValueError: the record cannot follow the one before.
        """
        if not names_own_files(own):
            self._begin()
        tasks = [own["step"]] if names_own_files(own) else own["tasks"]
        if fault := self._fault(own, tasks):
            raise ValueError(f"{folder / RECORD}: {fault}; restore the file")
        self._tasks += tasks
        self._classes += own["classes"]
        self._images |= own.get("images", {})
        self._step_classes |= own.get("step_classes", {})
        self._names |= {entry["name"] for entry in own["classes"]}
        self._let_go({*own["directions"]})
        self._passing = [name for name in own["files"] if not _LASTING.fullmatch(name)]
        self._files |= own["files"]
        self._owners |= dict.fromkeys(own["files"], own["step"])
        self.record = {
            **own,
            "tasks": self._tasks,
            "classes": self._classes,
            "images": self._images,
            "files": self._files,
            "owners": self._owners,
            **({"step_classes": self._step_classes} if self._step_classes else {}),
        }
        return self.record

    def _fault(self, own: Mapping[str, Any], tasks: list[str]) -> str | None:
        """Return what of a record cannot be, after those before it."""
        first, added, targets = len(self._classes), own["classes"], own.get("targets", [])
        known, directions = {*self._tasks, *tasks}, own["directions"]
        last = self.record["step"] if self.record else None
        saw = own.get("step_classes", {})
        faults = {
            f"it comes after {own.get('after')}, not after {last}": names_own_files(own)
            and own["after"] != last,
            "its last task is not its step": own["step"] != (tasks[-1] if tasks else "t00"),
            "a task stands twice": len(known) < len(self._tasks) + len(tasks),
            "a target stands twice": len({*targets}) < len(targets),
            "a direction is of no task, or stands twice": len({*directions} & known) < len(directions),
            "its labels are not 0, 1, 2, …": [e["label"] for e in added]
            != list(range(first, first + len(added))),
            "the tasks of its classes are not its tasks": list(dict.fromkeys(e["task"] for e in added))
            != ([] if saw and not added else tasks),
            "the classes that it saw are not its own and known ones": any(
                step != own["step"]
                or [label for label in labels if label >= first] != [e["label"] for e in added]
                for step, labels in saw.items()
            ),
            "a name stands for two classes": len({e["name"] for e in added} - self._names) < len(added),
        }
        return next((text for text, wrong in faults.items() if wrong), None)

    def _let_go(self, directions: set[str]) -> None:
        """Forget what a new step does not stand on: files that every step makes anew, directions that it replaced."""
        replaced = [f"directions/{task}.safetensors" for task in self._directions - directions]
        for name in {*self._passing, *replaced} & self._files.keys():
            del self._files[name], self._owners[name]
        self._directions = directions


def classes_of_step(record: Mapping[str, Any], step: str) -> list[ClassEntry]:
    """Return the classes that a step saw, in the order of their labels: those that arrived with it, and known ones.

    Args:
        record: what the records up to that step, or to a later one, say together.
    """
    saw = record.get("step_classes", {})
    if step in saw:
        return [record["classes"][label] for label in saw[step]]
    return [entry for entry in record["classes"] if entry["task"] == step]


def folders_beside(folder: Path) -> Beside:
    """Return what gives the folders that lie beside a model folder, by the names of their steps."""
    return (folder if folder.name else folder.resolve()).parent.joinpath


def names_own_files(own: Mapping[str, Any]) -> bool:
    """Return whether a record names its step's own files alone, and the record before."""
    return bool(own.get("format") == OWN_FILES)


def require_files(
    folder: Path, record: Mapping[str, Any], needed: Iterable[str], *, beside: Beside | None = None
) -> dict[str, Path]:
    """Return where files are that a record names, and hold that they are those.

    Args:
        record: as `read_record` returns it.
        needed: names of files.
        beside: where the folders of earlier steps are; None where they lie beside `folder`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is another, or not named.
    """
    find = beside or folders_beside(folder)
    places = {}
    for name in needed:
        if name not in record["files"]:
            raise ValueError(
                f"{folder / RECORD}: its files lack {name}; restore the folder with `dvc checkout`"
            )
        owner, expected = record["owners"][name], record["files"][name]
        path = (folder if owner == record["step"] else find(owner)) / name
        try:
            found = file_sha256(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(
                f"{path}: it is missing; get the whole folder (`dvc checkout`, `dvc pull` or `dvc get`)"
            ) from None
        if found != expected:
            raise ValueError(
                f"{path}: changed since the step was frozen (sha256 {found[:12]}, its record says {expected[:12]}); "
                "restore it with `dvc checkout`"
            )
        places[name] = path
    return places


def _part_of(some: list[str], known: list[str]) -> bool:
    return len(set(some)) == len(some) and set(some) <= set(known)
