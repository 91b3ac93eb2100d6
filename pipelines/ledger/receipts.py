"""Receipts of deleted images: what a retired task was, in `ledger/retired/TASK`, and its outputs given back."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, whole_folder, write_json
from pipelines.project.layout import PARAMS, RETIRED
from pipelines.project.params import read_params
from pipelines.project.settings import Section, Task, Text
from pipelines.project.yaml_text import read_text, read_yaml, value_at
from pipelines.runtime.console import log_line
from pipelines.runtime.stage import StageResult
from pipelines.versioning.artifacts import ObjectStore
from pipelines.versioning.file_hashes import md5_of

_RECEIPT = "receipt.json"
IN_PLACE = "retired.json"
"""What is left in place of deleted training images, so that DVC finds an output there."""
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Listing = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.dir$")]


def _inside(path: str) -> str:
    """Return the path, where it is one inside a folder. A ValueError where it leads out of it."""
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is no path inside a folder")
    return path


_Part = Annotated[str, AfterValidator(_inside)]
"""A path inside a folder."""


class Picture(Section):
    """A training image that was deleted."""

    id: Text
    """`t01/train/<class>/<file>`"""
    sha256: _Sha256
    """of the file's bytes"""


class RawFile(Section):
    """A file of the task's source that was deleted."""

    path: _Part
    """inside the project"""
    sha256: _Sha256
    """of its bytes, or of those that the link led to"""
    link: bool
    """a link: it was removed, and what it led to was left alone"""


class Packed(Section):
    """The packed training images."""

    path: _Part
    """inside the project"""
    sha256: _Sha256
    """as the ledger names them"""
    md5: _Md5
    """as DVC does"""


class Kept(Section):
    """An output of a stage of the task, as it was: DVC's cache holds it."""

    out: _Part
    """its folder"""
    md5: _Listing
    """DVC's hash of the folder when the task was retired"""
    files: Mapping[_Part, _Md5]
    """what can be given back, by name"""
    parameters: Mapping[str, Any]
    """what dvc.lock says that the stage read of params.yaml; empty where it does not matter any more"""
    inputs: Mapping[_Part, _Sha256]
    """files that stand for all that the stage read of other stages"""


class Receipt(Section):
    """What was deleted of a task, when, by whom, and what its stages gave."""

    task: Text
    """its key"""
    classes: Annotated[tuple[str, ...], Field(strict=False)]
    """its classes"""
    by: Text
    """who had it deleted"""
    why: Text
    """the reason"""
    at: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    """when, UTC"""
    previous: _Sha256 | None
    """the hash of the receipt before; null for the first"""
    record: _Sha256
    """the hash of the step's record"""
    head: _Sha256
    """the hash of the last verdict of the chain at that time"""
    source: Text
    """where the images were"""
    manifest: str | None
    """the file there which listed them"""
    train: Packed
    """what the packed images were"""
    images: Annotated[tuple[Picture, ...], Field(strict=False)]
    """all training images"""
    elsewhere: Annotated[tuple[str, ...], Field(strict=False)]
    """images of other tasks that show the same, and stay"""
    raw: Annotated[tuple[RawFile, ...], Field(strict=False)]
    """files that were deleted"""
    objects: Annotated[tuple[str, ...], Field(strict=False)]
    """objects that were deleted from DVC's cache and remotes, by name"""
    stages: Mapping[str, Kept]
    """split, fit and freeze"""


def receipt_of(task: str) -> Path:
    """Return where the receipt of a task is."""
    return Path(RETIRED) / task / _RECEIPT


def read_receipt(path: Path) -> Receipt:
    """Read a receipt. An `InputError` names one that is missing or none."""
    try:
        return Receipt.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the receipt is missing; restore it from version control") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: not a receipt ({where or 'JSON'}: {first['msg']}); restore it from version control"
        ) from None


def read_receipts() -> dict[str, Receipt]:
    """Return all receipts by task, in the order in which they were written. An `InputError` where their chain is
    broken.
    """
    paths = {receipt_of(path.name): path.name for path in Path(RETIRED).glob("*") if path.is_dir()}
    after: dict[str | None, Path] = {}
    receipts = {path: read_receipt(path) for path in sorted(paths)}
    for path, receipt in receipts.items():
        if receipt.task != paths[path]:
            raise InputError(f"{path}: it is the receipt of {receipt.task}; restore it from version control")
        if receipt.previous in after:
            raise InputError(
                f"{path}: it follows the same receipt as {after[receipt.previous]}; restore both from version control"
            )
        after[receipt.previous] = path
    order: dict[str, Receipt] = {}
    last: str | None = None
    while last in after:
        path = after.pop(last)
        order[paths[path]] = receipts[path]
        last = sha256_of(path)
    if after:
        broken = min(after.values())
        raise InputError(
            f"{broken}: the receipt before it is not the one that it names; restore {RETIRED} from version control"
        )
    return order


def restore_retired_output(
    stage: str,
    task: str,
    out: Path,
    *,
    images: Path | None = None,
    then: Callable[[Path], None] | None = None,
) -> StageResult | None:
    """Restore in `out` what a stage of a retired task left when it had its images. None where the task has them.

    Where the training images were, in `images`, their hash is left. `then` brings up to date
    what in it names other tasks. The stage's code may have changed since. Its parameters and its input model may not.

    Raises:
        InputError: a parameter or an input differs, or a file is nowhere to be found.
    """
    entry = read_params("tasks", dict[str, Task]).get(task)
    if entry is None or not entry.retired:
        return None
    path = receipt_of(task)
    receipt = read_receipt(path)
    kept = receipt.stages[stage]
    _refuse_others(stage, task, receipt, entry.classes)
    with contextlib.ExitStack() as stack:
        if images is not None:
            write_json(stack.enter_context(whole_folder(images)) / IN_PLACE, in_place_of(receipt))
        folder = stack.enter_context(whole_folder(out))
        _give_back(kept, folder)
        if then is not None:
            then(folder)
    log_line(
        f"{stage} {task}: its images were deleted {receipt.at[:10]}; what it left is given back, nothing is computed"
    )
    return StageResult(
        [{"task": task, "files given back": len(kept.files), "retired": receipt.at}], restored=True
    )


def in_place_of(receipt: Receipt) -> dict[str, str]:
    """Return what is left where the training images of a retired task were."""
    return {"task": receipt.task, "images": receipt.train.sha256}


def _refuse_others(stage: str, task: str, receipt: Receipt, classes: tuple[str, ...]) -> None:
    """Refuse to give back what would be another result, had the task its images."""
    gone = f"{stage} {task}: its images were deleted ({receipt_of(task)}), so it cannot be made again, but"
    if classes != receipt.classes:
        raise InputError(f"{gone} params.yaml: tasks.{task}.classes changed; put them back")
    kept = receipt.stages[stage]
    raw = read_yaml(read_text(PARAMS), origin=str(PARAMS))
    for key, was in kept.parameters.items():
        now = value_at(raw, tuple(key.split(".")))
        if now != was:
            found, expected = (json.dumps(value, ensure_ascii=False) for value in (now, was))
            raise InputError(f"{gone} params.yaml: {key} is {found}, and was {expected}; put it back")
    for name, sha256 in kept.inputs.items():
        if not Path(name).is_file() or sha256_of(Path(name)) != sha256:
            raise InputError(
                f"{gone} {name} is not what it was made with; restore params.yaml, code and dvc.lock of then from "
                "version control, and `dvc checkout`"
            )


def _give_back(kept: Kept, folder: Path) -> None:
    """Copy what was kept of an output from DVC's cache or remote to a folder. An `InputError` says what is missing."""
    with TemporaryDirectory(prefix="sdlora-retired-") as scratch:
        objects = ObjectStore(Path(scratch))
        for name, md5 in kept.files.items():
            source = objects.find(md5)
            if source is None or md5_of(source) != md5:
                fault = (
                    "is neither in DVC's cache nor in its remote"
                    if source is None
                    else f"is another in {source}"
                )
                raise InputError(
                    f"{kept.out}/{name}: its images are gone and it {fault}; bring back the file of md5 {md5} "
                    "(`dvc fetch`, or another machine's cache), then run the same again"
                )
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
