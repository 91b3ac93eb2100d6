"""The stage `split`: a task's images, checked against all that is known of the tasks before, and packed.

The same picture (by decoded pixels, in whatever encoding) may never stand in two parts, be it of this task or of
another; with `data.duplicates: leave_out` it is left out where it would, and counted. In two tasks or under two classes
it is refused too, unless `data.duplicates` is `allow` or `leave_out`: then train may repeat train, and test may repeat
test. With `keep_first` the class that came first keeps it, and the others lose it, counted too. Copies within one class
of one part are harmless; all copies that stay are counted in `split.json`, and so are pictures of train that are
nearly, by a perceptual hash, pictures of validation or test.

Of a task whose images were deleted (`sdlora retire`) the stage gives back what it left, and in place of the training
images their hash.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.class_folders import litter_of
from pipelines.data.decoding import picture_hash
from pipelines.data.duplicates import (
    LEAVE_OUT,
    Prints,
    near_across_parts,
    near_line,
    perceptual_hash,
    read_pictures,
    refuse_unreadable,
    same_pictures,
    sample_prints,
)
from pipelines.data.packed import (
    PACKED,
    TRAINING,
    SampleRow,
    samples_digest,
    write_samples,
    write_stored_images,
)
from pipelines.data.scratch_files import ByteStore
from pipelines.data.source_files import PARTS, Found, refuse
from pipelines.data.sources import task_images
from pipelines.data.split_chain import (
    SAMPLES,
    SPLIT,
    TEST,
    VALIDATION,
    Splits,
    own_files,
    part_file,
    read_splits,
)
from pipelines.ledger.receipts import restore_retired_output
from pipelines.project.display import as_line
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of, whole_folder, write_json
from pipelines.project.params import read_params
from pipelines.project.schemas import ClassMap
from pipelines.project.settings import Data, Task
from pipelines.runtime.console import log_line
from pipelines.runtime.earlier_outputs import outputs_beside
from pipelines.runtime.stage import StageResult, stage
from sdlora.ledger import ClassEntry

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


_READ = (("label", "i4"), ("sha256", "S64"), ("pixels", "S64"), ("perceptual", "S64"))


@dataclass(frozen=True)
class _Pictures:
    """Images of a task, in columns: a million of them are no million objects, and their bytes are on the disk."""

    task: str
    found: Sequence[Found]
    read: np.ndarray
    """(n,) what was read of each, `_READ`"""
    bytes: ByteStore
    kept: np.ndarray
    """the places of those that stay"""

    @property
    def parts(self) -> np.ndarray:
        """(n,) the places of their parts in `PARTS`."""
        import numpy as np

        number = {part: place for place, part in enumerate(PARTS)}
        return np.array([number[found.part or ""] for found in self.found], np.uint8)

    def prints(self) -> Prints:
        """Return what those that stay are compared by. Messages show where they stand."""
        read = self.read
        whole = Prints(
            lambda place: self.found[place].shown,
            self.parts,
            read["label"],
            read["pixels"],
            read["perceptual"],
        )
        return whole.take(self.kept)

    def without(self, places: Iterable[int]) -> _Pictures:
        """Leave out some of those that stay, by their places among them."""
        import numpy as np

        return replace(self, kept=np.delete(self.kept, list(places)))

    def files(self) -> Iterator[Found]:
        """Yield those that stay."""
        return (self.found[place] for place in self.kept.tolist())

    def samples(self) -> Iterator[SampleRow]:
        """Yield those that stay without their bytes."""
        for place, found in zip(self.kept.tolist(), self.files(), strict=True):
            label, *hashes = self.read[place].item()
            yield SampleRow(self._id(found), found.part or "", label, *(text.decode() for text in hashes))

    def write(self, path: Path, part: str) -> None:
        """Write the images of a part."""
        images = self.bytes.column(self.kept[self.parts[self.kept] == PARTS.index(part)])
        write_stored_images(path, (row for row in self.samples() if row.split == part), images)

    def _id(self, found: Found) -> str:
        return f"{self.task}/{found.part}/{found.name}/{found.file}"


@stage
def split(task: str, *, source: Path, before: Path, out: Path, images: Path) -> StageResult:
    """Pack a task's images. Name the classes so far.

    The images of each class are divided into train, test and, if asked for, validation. Refused, with the files named:
    a class of an earlier task, if the task's kind is not `more`; what is wrong with the source; a file that cannot be
    decoded.

    Args:
        task: Task of params.yaml, such as t01.
        source: Folder of the task's images.
        before: The folder that the step before left.
        out: Folder to leave, with all but the training images; an existing one is replaced as a whole.
        images: Folder to leave with the training images.
    """
    tasks = read_params("tasks", dict[str, Task])
    if task not in tasks:
        raise InputError(f"params.yaml: tasks: there is no {task}; known are {', '.join(tasks)}")
    restored = restore_retired_output("split", task, out, images=images, then=partial(_follow, before))
    if restored is not None:
        return restored
    names, data = tasks[task].classes, read_params("data", Data)
    with outputs_beside(before, SPLIT) as found:
        earlier = read_splits(found(before.name), found)
        previous, known = sha256_of(found(before.name) / SPLIT), _earlier_prints(earlier)
    labels = _labels_of(task, tasks[task], earlier.classes)
    listed = task_images(source, names, manifest=tasks[task].manifest, data=data)
    if tasks[task].manifest is None:
        _tell_litter(task, source, names)
    with ByteStore() as store:
        read = _read_task(task, listed, store, labels=labels, max_pixels=data.max_pixels)
        pictures, left_out, near = _compared(read, names, known, data)

        parts = PARTS if data.validation is not None else ("train", "test")
        counts = {name: dict.fromkeys(parts, 0) for name in names}
        for image in pictures.files():
            counts[image.name][image.part or ""] += 1
        with whole_folder(images) as packed, whole_folder(out) as folder:
            _write_pictures(pictures, folder, packed, validation=data.validation is not None)
            write_json(folder / "classes.json", _class_map(task, tasks[task], labels, earlier))
            write_json(
                folder / SPLIT,
                {
                    "format": 2,
                    "task": task,
                    "after": tasks[task].after,
                    "previous": previous,
                    "files": own_files(folder),
                    "counts": counts,
                    "digest": samples_digest(pictures.samples()),
                    "duplicates": _copies(pictures.prints()),
                    "near_duplicates": near,
                    "left_out": left_out,
                },
            )
    return StageResult([{"class": name, **counts[name]} for name in names])


def _tell_litter(task: str, source: Path, names: Sequence[str]) -> None:
    """Say which files of other programs are left out, if there are any."""
    if litter := litter_of(source, names):
        some = as_line(", ".join(sorted(litter)[:3]))
        log_line(f"split {task}: {litter.total()} of other programs left out, such as {some}")


def _compared(
    pictures: _Pictures, names: Sequence[str], known: Prints, data: Data
) -> tuple[_Pictures, int, int]:
    """Compare the pictures of a task with each other and with those of earlier tasks.

    Returns:
        The pictures that stay, how many are left out, and how many are nearly the same as one in another split.

    Raises:
        InputError: the same picture stands where `data.duplicates` does not let it.
    """
    task = pictures.task
    prints = pictures.prints()
    left_out: list[int] = []
    if data.duplicates in LEAVE_OUT:
        place, find = LEAVE_OUT[data.duplicates]
        left_out = find(prints, known, sorted(set(prints.labels.tolist())))
        pictures = pictures.without(left_out)
        _refuse_emptied(task, names, pictures.files(), left_out, place)
        prints = pictures.prints()
    refuse(list(same_pictures(prints, known, tolerated=data.duplicates != "refuse")))
    near = near_across_parts(prints, known)
    if near:
        log_line(f"split {task}: warning: {near_line(near)}; `sdlora doctor` lists them")
    return pictures, len(left_out), len(near)


def _write_pictures(pictures: _Pictures, folder: Path, packed: Path, *, validation: bool) -> None:
    """Write the training images to `packed`, what describes them, the other images and all samples to `folder`."""
    task = pictures.task
    pictures.write(packed / PACKED, "train")
    pictures.write(folder / part_file(TEST, task), "test")
    if validation:
        pictures.write(folder / part_file(VALIDATION, task), "validation")
    write_samples(folder / part_file(SAMPLES, task), pictures.samples())
    write_json(
        folder / TRAINING,
        {
            "task": task,
            "images": sha256_of(packed / PACKED),
            "counts": Counter(image.name for image in pictures.files() if image.part == "train"),
            "digest": samples_digest(row for row in pictures.samples() if row.split == "train"),
        },
    )


def _copies(prints: Prints) -> int:
    """Return how many pictures stand in the part of an equal one before them."""
    import numpy as np

    parts = (prints.pixels[prints.parts == part] for part in range(len(PARTS)))
    return sum(len(pixels) - len(np.unique(pixels)) for pixels in parts)


def _follow(before: Path, folder: Path) -> None:
    """Have a split that is given back name the split before as it is by now."""
    record = read_json(folder / SPLIT)
    if "previous" in record:
        write_json(folder / SPLIT, {**record, "previous": sha256_of(before / SPLIT)})


def _refuse_emptied(
    task: str, names: Sequence[str], images: Iterable[Found], left_out: Sequence[int], place: str
) -> None:
    """Say what was left out. Refuse a class of which nothing to train on, or to test, is left."""
    held = {(image.name, image.part) for image in images}
    for name in names:
        for part in ("train", "test"):
            if (name, part) not in held:
                raise InputError(
                    f"{task}: class {name!r}: every {part} image stands {place} too, and would be left out; "
                    "give it images of its own"
                )
    if left_out:
        count = "1 picture stands" if len(left_out) == 1 else f"{len(left_out)} pictures stand"
        log_line(f"split {task}: {count} {place} too and left out, as data.duplicates says")


def _labels_of(task: str, entry: Task, known: Sequence[ClassEntry]) -> dict[str, int]:
    """Return the labels of a task's classes: one that an earlier task has brought keeps its own, new ones follow on.

    Raises:
        InputError: a class is known, and the task is of another kind than `more`.
    """
    held = {one["name"]: one for one in known}
    if entry.kind != "more":
        for name in entry.classes:
            if name in held:
                raise InputError(
                    f"{task}: class {name!r} was already learned in {held[name]['task']}; remove it from "
                    f"tasks.{task}.classes in params.yaml, or write kind: more there if these are more images of it"
                )
    new = (name for name in entry.classes if name not in held)
    follow = {name: label for label, name in enumerate(new, start=len(known))}
    return {name: held[name]["label"] if name in held else follow[name] for name in entry.classes}


def _class_map(task: str, entry: Task, labels: Mapping[str, int], earlier: Splits) -> ClassMap:
    """Return all classes so far and all tasks, with what a task of the kind `more` has images of."""
    new: list[ClassEntry] = [
        {"label": label, "name": name, "task": task}
        for name, label in labels.items()
        if label >= len(earlier.classes)
    ]
    found: ClassMap = {"classes": [*earlier.classes, *new], "tasks": [*earlier.tasks, task]}
    own = {task: sorted(labels.values())} if entry.kind == "more" else {}
    if earlier.step_classes or own:
        found["step_classes"] = {**earlier.step_classes, **own}
    return found


def _read_task(
    task: str, images: Sequence[Found], store: ByteStore, *, labels: dict[str, int], max_pixels: int
) -> _Pictures:
    """Read and fully decode every file, and store its bytes. All that cannot be read are refused in one error."""
    import numpy as np

    read = np.zeros(len(images), list(_READ))

    def look(index: int, data: bytes, picture: Image) -> bytes:
        label = labels[images[index].name]
        hashes = hashlib.sha256(data).hexdigest(), picture_hash(picture), perceptual_hash(picture)
        read[index] = (label, *hashes)
        return data

    faults = read_pictures(
        f"split {task}", images, look, max_pixels=max_pixels, keep=lambda index, data: store.append(data)
    )
    refuse_unreadable(task, images, faults)
    return _Pictures(task, images, read, store, np.arange(len(images)))


def _earlier_prints(splits: Splits) -> Prints:
    """Return what the pictures of the tasks before are compared by."""
    return Prints.joined(
        [sample_prints(splits.needed(SAMPLES, task), "an earlier task") for task in splits.tasks]
    )
