"""The stage `split`: a task's images, checked and packed, beside all that is known of the tasks before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import InputError
from pipelines.files import natural_key, read_json, whole_folder, write_json
from pipelines.images import (
    ImageRow,
    SampleRow,
    in_parallel,
    open_picture,
    picture_hash,
    read_images,
    strict_pictures,
    write_images,
    write_samples,
)
from pipelines.params import Params, missing_source
from pipelines.progress import Progress
from pipelines.stage import stage

PARTS = ("train", "test")
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Picture(NamedTuple):
    """An image of this task."""

    path: Path
    part: str
    row: ImageRow

    def sample(self) -> SampleRow:
        """The picture without its bytes."""
        return SampleRow(self.row.id, self.part, self.row.label, self.row.sha256, self.row.pixels)


@stage
def split(task: str, *, source: Path, before: Path, out: Path) -> list[dict[str, str | int | float]]:
    """Pack the images in `source/{train,test}/<class>/` of a task's classes, and hand on what `before` holds.

    Refused, with the files named: a class of an earlier task, a missing folder, a class without images, a
    file that is not an image or cannot be decoded, a folder inside a class. Hidden files are ignored.

    The same picture (by decoded pixels, in whatever encoding) may never stand in train and test, be it of
    this task or of another. In two tasks or under two classes it is refused too, unless `split.duplicates`
    is `allow`: then train may repeat train, and test may repeat test. Copies within one class of one part
    are harmless; all copies that stay are counted in `split.json`.
    """
    params = Params.load()
    if task not in params.tasks:
        raise InputError(f"params.yaml: tasks: there is no {task}; known are {', '.join(params.tasks)}")
    names = params.tasks[task].classes
    earlier = read_json(before / "classes.json")
    refuse_known_classes(task, names, earlier["classes"])

    first = len(earlier["classes"])
    pictures = read_pictures(task, list_files(source, names), first_label=first)
    samples = [picture.sample() for picture in pictures]
    tolerated = params.split.duplicates == "allow"
    refuse_same_pictures(pictures, earlier_samples(before, earlier["tasks"]), tolerated=tolerated)

    classes = [{"label": first + i, "name": name, "task": task} for i, name in enumerate(names)]
    counts = {
        name: {part: sum(s.label == first + i and s.split == part for s in samples) for part in PARTS}
        for i, name in enumerate(names)
    }
    with whole_folder(out) as folder:
        for kind in ("test", "samples"):
            (folder / kind).mkdir()
            for name in earlier["tasks"]:
                shutil.copyfile(before / kind / f"{name}.arrow", folder / kind / f"{name}.arrow")
        write_images(folder / "train.arrow", [p.row for p in pictures if p.part == "train"])
        write_images(folder / "test" / f"{task}.arrow", [p.row for p in pictures if p.part == "test"])
        write_samples(folder / "samples" / f"{task}.arrow", samples)
        write_json(
            folder / "classes.json",
            {"classes": earlier["classes"] + classes, "tasks": [*earlier["tasks"], task]},
        )
        write_json(
            folder / "split.json",
            {
                "task": task,
                "after": params.tasks[task].after,
                "counts": counts,
                "digest": digest_of(samples),
                "duplicates": len(samples) - len({(s.split, s.pixels) for s in samples}),
            },
        )
    return [{"class": name, **counts[name]} for name in names]


def refuse_known_classes(task: str, names: Iterable[str], known: Iterable[dict[str, str]]) -> None:
    """A class has one label, given by the first task that brings it."""
    owner = {entry["name"]: entry["task"] for entry in known}
    for name in names:
        if name in owner:
            raise InputError(
                f"{task}: class {name!r} was already learned in {owner[name]};"
                f" remove it from tasks.{task}.classes in params.yaml"
            )


def list_files(source: Path, names: Sequence[str]) -> list[tuple[Path, str, str, int]]:
    """Path, part, class and its position of every image file, by part, class and natural order of names."""
    if not source.is_dir():
        raise InputError(f"{source}: the folder is missing; {missing_source(source)}")
    found = []
    for part in PARTS:
        for position, name in enumerate(names):
            files = class_files(source / part / name)
            found += [(path, part, name, position) for path in files]
    return found


def class_files(folder: Path) -> list[Path]:
    """The image files of a class, in natural order; hidden ones are left out, anything else is an error."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: the folder is missing; make it, or correct the task's classes in params.yaml"
        )
    paths = sorted((p for p in folder.iterdir() if p.name[0] != "."), key=lambda path: natural_key(path.name))
    for path in paths:
        if not path.name.isprintable():
            raise InputError(f"{folder}: the file name {path.name!a} is not printable text; rename the file")
        if path.is_dir():
            raise InputError(
                f"{path}: a folder inside a class; move its images up or make it a class of its own"
            )
        if path.suffix.lower() not in EXTENSIONS:
            raise InputError(
                f"{path}: not an image by its name; remove it (known are {' '.join(EXTENSIONS)})"
            )
    if not paths:
        raise InputError(f"{folder}: the class is empty; put at least one image there or remove the class")
    return paths


def read_pictures(
    task: str, files: Sequence[tuple[Path, str, str, int]], *, first_label: int
) -> list[Picture]:
    """Read and fully decode every file; all that cannot be read are refused in one error."""
    pictures: list[Picture | None] = [None] * len(files)
    faults: dict[int, str] = {}

    def read(index: int) -> None:
        path, part, name, position = files[index]
        try:
            data = path.read_bytes()
            pixels = picture_hash(open_picture(data))
        except OSError as error:
            faults[index] = f"{path} ({error.strerror})"
        except ValueError as error:
            faults[index] = f"{path} ({error})"
        else:
            sha256 = hashlib.sha256(data).hexdigest()
            row = ImageRow(f"{task}/{part}/{name}/{path.name}", first_label + position, data, sha256, pixels)
            pictures[index] = Picture(path, part, row)

    with strict_pictures(), Progress(f"split {task}", total=len(files), unit="images") as bar:
        for done in in_parallel(read, range(len(files))):
            bar.update(done)
    if faults:
        shown = ", ".join(faults[index] for index in sorted(faults)[:3])
        rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"cannot read {shown}{rest}; replace or remove what is broken")
    return [picture for picture in pictures if picture is not None]


def earlier_samples(before: Path, tasks: Iterable[str]) -> Iterator[SampleRow]:
    """Every image of the tasks before, without its bytes."""
    for task in tasks:
        table = read_images(before / "samples" / f"{task}.arrow")
        for row in table.to_pylist():
            yield SampleRow(**row)


def refuse_same_pictures(
    pictures: Iterable[Picture], earlier: Iterable[SampleRow], *, tolerated: bool
) -> None:
    """Refuse a picture in train and test; and, unless tolerated, one in two tasks or under two classes."""
    owners: dict[str, list[tuple[str, str, int]]] = {}
    for sample in earlier:
        owners.setdefault(sample.pixels, []).append(
            (f"{sample.id} of an earlier task", sample.split, sample.label)
        )
    faults = []
    for path, part, row in pictures:
        known = owners.setdefault(row.pixels, [])
        leaks = [name for name, other_part, _ in known if other_part != part]
        others = [name for name, _, label in known if label != row.label]
        if leaks:
            faults.append(f"{path} is the same picture as {leaks[0]}, in train and test; remove one")
        elif others and not tolerated:
            hint = "remove one, or set split.duplicates: allow in params.yaml"
            faults.append(f"{path} is the same picture as {others[0]}, of another class; {hint}")
        known.append((str(path), part, row.label))
    if faults:
        more = f" (and {len(faults) - 1} more such)" if len(faults) > 1 else ""
        raise InputError(faults[0] + more)


def digest_of(samples: Iterable[SampleRow]) -> str:
    """One hash for all samples in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
