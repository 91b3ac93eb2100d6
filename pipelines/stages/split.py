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
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pipelines.data.class_folders import litter_of
from pipelines.data.decoding import picture_hash
from pipelines.data.duplicates import (
    LEAVE_OUT,
    Print,
    near_across_parts,
    near_line,
    perceptual_hash,
    read_pictures,
    refuse_unreadable,
    same_pictures,
)
from pipelines.data.packed import (
    PACKED,
    TRAINING,
    ImageRow,
    SampleRow,
    read_samples,
    samples_digest,
    write_images,
    write_samples,
)
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
from pipelines.project.settings import Data, Task
from pipelines.runtime.console import log_line
from pipelines.runtime.earlier_outputs import outputs_beside
from pipelines.runtime.stage import StageResult, stage
from sdlora.ledger import ClassEntry

if TYPE_CHECKING:
    from PIL.Image import Image

_T = TypeVar("_T")


class _Picture(NamedTuple):
    """An image of this task."""

    found: Found
    row: ImageRow
    perceptual: str

    @property
    def part(self) -> str:
        """train, validation or test."""
        assert self.found.part is not None
        return self.found.part

    def sample(self) -> SampleRow:
        """Return the picture without its bytes."""
        row = self.row
        return SampleRow(row.id, self.part, row.label, row.sha256, row.pixels, self.perceptual)

    def print(self) -> Print:
        """Return what the picture is compared by. Messages show where it stands."""
        return _print_of(self.sample(), shown=self.found.shown)


@stage
def split(task: str, *, source: Path, before: Path, out: Path, images: Path) -> StageResult:
    """Pack a task's images. Name the classes so far.

    The images of each class are divided into train, test and, if asked for, validation. Refused, with the files named:
    a class of an earlier task, what is wrong with the source, a file that cannot be decoded.

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
        previous, known = sha256_of(found(before.name) / SPLIT), list(_earlier_prints(earlier))
    _refuse_known_classes(task, names, earlier.classes)
    listed = task_images(source, names, manifest=tasks[task].manifest, data=data)
    if tasks[task].manifest is None:
        _tell_litter(task, source, names)
    labels = {name: label for label, name in enumerate(names, start=len(earlier.classes))}
    read = _read_task(task, listed, labels=labels, max_pixels=data.max_pixels)
    pictures, left_out, near = _compared(task, names, read, known, data)

    parts = PARTS if data.validation is not None else ("train", "test")
    counts = {name: dict.fromkeys(parts, 0) for name in names}
    for picture in pictures:
        counts[picture.found.name][picture.part] += 1
    with whole_folder(images) as packed, whole_folder(out) as folder:
        _write_pictures(pictures, task, folder, packed, validation=data.validation is not None)
        classes = [{"label": labels[name], "name": name, "task": task} for name in names]
        write_json(
            folder / "classes.json",
            {"classes": [*earlier.classes, *classes], "tasks": [*earlier.tasks, task]},
        )
        samples = [picture.sample() for picture in pictures]
        write_json(
            folder / SPLIT,
            {
                "format": 2,
                "task": task,
                "after": tasks[task].after,
                "previous": previous,
                "files": own_files(folder),
                "counts": counts,
                "digest": samples_digest(samples),
                "duplicates": len(samples) - len({(s.split, s.pixels) for s in samples}),
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
    task: str, names: Sequence[str], pictures: Sequence[_Picture], known: Sequence[Print], data: Data
) -> tuple[Sequence[_Picture], int, int]:
    """Compare the pictures of a task with each other and with those of earlier tasks.

    Returns:
        The pictures that stay, how many are left out, and how many are nearly the same as one in another split.

    Raises:
        InputError: the same picture stands where `data.duplicates` does not let it.
    """
    left_out: list[int] = []
    if data.duplicates in LEAVE_OUT:
        place, find = LEAVE_OUT[data.duplicates]
        labels = list({picture.found.name: picture.row.label for picture in pictures}.values())
        left_out = find([picture.print() for picture in pictures], known, sorted(labels))
        pictures = _without(pictures, left_out)
        _refuse_emptied(task, names, pictures, left_out, place)
    prints = [picture.print() for picture in pictures]
    refuse(list(same_pictures(prints, known, tolerated=data.duplicates != "refuse")))
    near = near_across_parts(prints, known)
    if near:
        log_line(f"split {task}: warning: {near_line(near)}; `sdlora doctor` lists them")
    return pictures, len(left_out), len(near)


def _write_pictures(
    pictures: Sequence[_Picture], task: str, folder: Path, packed: Path, *, validation: bool
) -> None:
    """Write the training images to `packed`, what describes them, the other images and all samples to `folder`."""
    rows = {part: [picture.row for picture in pictures if picture.part == part] for part in PARTS}
    write_images(packed / PACKED, rows["train"])
    write_images(folder / part_file(TEST, task), rows["test"])
    if validation:
        write_images(folder / part_file(VALIDATION, task), rows["validation"])
    write_samples(folder / part_file(SAMPLES, task), [picture.sample() for picture in pictures])
    trained = [picture for picture in pictures if picture.part == "train"]
    write_json(
        folder / TRAINING,
        {
            "task": task,
            "images": sha256_of(packed / PACKED),
            "counts": Counter(picture.found.name for picture in trained),
            "digest": samples_digest(picture.sample() for picture in trained),
        },
    )


def _follow(before: Path, folder: Path) -> None:
    """Have a split that is given back name the split before as it is by now."""
    record = read_json(folder / SPLIT)
    if "previous" in record:
        write_json(folder / SPLIT, {**record, "previous": sha256_of(before / SPLIT)})


def _without(rows: Sequence[_T], positions: Iterable[int]) -> list[_T]:
    """Return the rows but for those at some positions."""
    out = set(positions)
    return [row for index, row in enumerate(rows) if index not in out]


def _refuse_emptied(
    task: str, names: Sequence[str], pictures: Iterable[_Picture], left_out: Sequence[int], place: str
) -> None:
    """Say what was left out. Refuse a class of which nothing to train on, or to test, is left."""
    held = {(picture.found.name, picture.part) for picture in pictures}
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


def _refuse_known_classes(task: str, names: Iterable[str], known: Iterable[ClassEntry]) -> None:
    """Refuse a class that an earlier task has brought: a class has one label."""
    owner = {entry["name"]: entry["task"] for entry in known}
    for name in names:
        if name in owner:
            raise InputError(
                f"{task}: class {name!r} was already learned in {owner[name]};"
                f" remove it from tasks.{task}.classes in params.yaml"
            )


def _read_task(
    task: str, images: Sequence[Found], *, labels: dict[str, int], max_pixels: int
) -> list[_Picture]:
    """Read and fully decode every file. All that cannot be read are refused in one error."""
    pictures: dict[int, _Picture] = {}

    def keep(index: int, data: bytes, picture: Image) -> None:
        found = images[index]
        row = ImageRow(
            id=f"{task}/{found.part}/{found.name}/{found.file}",
            label=labels[found.name],
            image=data,
            sha256=hashlib.sha256(data).hexdigest(),
            pixels=picture_hash(picture),
        )
        pictures[index] = _Picture(found, row, perceptual_hash(picture))

    faults = read_pictures(f"split {task}", images, keep, max_pixels=max_pixels)
    refuse_unreadable(task, images, faults)
    return [pictures[index] for index in range(len(images))]


def _earlier_prints(splits: Splits) -> Iterator[Print]:
    """Yield what the pictures of the tasks before are compared by."""
    for task in splits.tasks:
        for row in read_samples(splits.needed(SAMPLES, task)):
            yield _print_of(row, shown=f"{row.id} of an earlier task")


def _print_of(sample: SampleRow, *, shown: str) -> Print:
    """Return what a sample's picture is compared by."""
    return Print(shown, sample.split, sample.label, sample.pixels, sample.perceptual)
