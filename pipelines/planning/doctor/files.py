"""Findings about the image files of a task: what cannot be read, what is left out, few or uneven images."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.class_folders import is_divided, litter_of
from pipelines.data.decoding import picture_hash
from pipelines.data.division import divide
from pipelines.data.duplicates import Prints, perceptual_hash, read_pictures, sample_prints
from pipelines.data.manifests import manifests
from pipelines.data.shards import shards_of
from pipelines.data.source_files import EXTENSIONS, PARTS, WORDS, Found, visible
from pipelines.data.sources import read_source, unread_tables
from pipelines.data.split_chain import SAMPLES, part_file
from pipelines.planning.doctor.findings import Finding, counted
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.layout import RAW, SPLITS
from pipelines.project.settings import Data, Task

if TYPE_CHECKING:
    from PIL.Image import Image


_FEW = 5
"""Images of a class in a part below which it is named."""
_UNEVEN = 10
"""Largest class ÷ smallest, in training images, from which a task is called uneven."""


@dataclass
class Seen:
    """What was found in the files of one task."""

    images: list[Found] = field(default_factory=list)
    """those that can be read"""
    prints: Prints = field(default_factory=lambda: Prints.joined([]))
    sides: Sequence[int] = ()
    """the shorter side of each, in pixels"""


def look_at(
    key: str, task: Task, data: Data, findings: list[Finding], *, fetched: frozenset[str] = frozenset()
) -> Seen:
    """Read every image of a task. What is wrong with the files joins the findings.

    A source that `sdlora run` would fetch, by its name among `fetched`, may be missing.
    """
    import numpy as np

    folder = Path(task.source)
    if not folder.is_dir() and folder.parent == RAW and folder.name in fetched:
        remedy = f"run `sdlora fetch {folder.name}`"
        findings.append(Finding("warning", "source", key, f"{folder} is not fetched yet", [], remedy))
        return Seen()
    try:
        source = read_source(folder, task.classes, manifest=task.manifest)
        divided = divide(source.images, data)
    except InputError as error:
        findings.append(Finding("error", "source", key, str(error), [], ""))
        return Seen()
    faults = (
        source.faults or divided.faults
    )  # how a class is divided says nothing where its files are not all there
    if faults:
        what = f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'} of the source"
        findings.append(Finding("error", "source", key, what, [str(fault) for fault in faults], "mend each"))
    unread = list(_left_out(folder)) if task.manifest is None and folder.is_dir() else []
    if unread:
        what = f"{len(unread)} things are not read"
        findings.append(Finding("warning", "source", key, what, unread, "move them into a class, or away"))
    litter = litter_of(folder, task.classes) if task.manifest is None and folder.is_dir() else Counter()
    if litter:
        what = f"{litter.total()} {'thing' if litter.total() == 1 else 'things'} of other programs, left out"
        where = [_printable(f"{name}: {number}") for name, number in sorted(litter.items())]
        findings.append(Finding("ok", "source", key, what, where, ""))

    # Its class's name is a picture's label: numbers are given by `split`.
    fields = [("part", "u1"), ("label", "O"), ("pixels", "S64"), ("perceptual", "S64"), ("side", "i4")]
    looks = np.zeros(len(divided.images), fields)

    def look(index: int, data: bytes, picture: Image) -> None:
        found = divided.images[index]
        hashes = picture_hash(picture), perceptual_hash(picture)
        looks[index] = (PARTS.index(found.part or ""), found.name, *hashes, min(picture.size))

    unreadable = read_pictures(f"read {key}", divided.images, look, max_pixels=data.max_pixels)
    if unreadable:
        where = [f"{divided.images[index].shown} ({fault})" for index, fault in unreadable.items()]
        what = f"{counted(where, 'image')} cannot be read"
        findings.append(Finding("error", "unreadable", key, what, where, "replace or remove each"))
    looks = np.delete(looks, list(unreadable))
    images = [image for index, image in enumerate(divided.images) if index not in unreadable]
    columns = (looks[name] for name in ("part", "label", "pixels", "perceptual"))
    seen = Seen(images, Prints(lambda place: images[place].shown, *columns), looks["side"].tolist())
    findings += _balance_findings(key, seen.images)
    return seen


def _left_out(folder: Path) -> Iterator[str]:
    """Images, tables and folders where no class folder is, and classes that are in test/ and not in train/."""
    if not manifests(folder, None) and not shards_of(folder, None):
        yield from (_printable(f"{path}, a table") for path in unread_tables(folder))
    divided = is_divided(folder)
    learned = {path.name for path in visible(folder / "train")}
    for place in [folder, *(folder / word for word in WORDS)] if divided else [folder]:
        for path in sorted(visible(place)):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                yield _printable(str(path))
            elif divided and path.is_dir() and path.name not in (WORDS if place == folder else learned):
                yield _printable(f"{path}/")


def _printable(text: str) -> str:
    """Return the text, or its escape sequences where a terminal could not show it."""
    return text if text.isprintable() else ascii(text)


def _balance_findings(key: str, images: Iterable[Found]) -> Iterator[Finding]:
    """Classes with few images, and tasks in which one class has many times what another has."""
    counts: dict[str, Counter[str]] = {part: Counter() for part in ("train", "validation", "test")}
    for found in images:
        assert found.part is not None
        counts[found.part][found.name] += 1
    for part, reason in (("train", "to learn from"), ("test", "for an accuracy that means something")):
        few = {name: number for name, number in counts[part].items() if number < _FEW}
        if few:
            what = f"{counted(few, 'class')} with fewer than {_FEW} {part} images {reason}"
            where = [f"{name}: {number}" for name, number in sorted(few.items(), key=lambda item: item[1])]
            yield Finding("warning", "few images", key, what, where, "add images")
    train = counts["train"]
    if train and max(train.values()) >= _UNEVEN * min(train.values()):
        (most, high), (least, low) = train.most_common()[0], train.most_common()[-1]
        what = f"uneven classes: {most} has {high} training images, {least} {low}"
        what += f" (median {statistics.median(train.values()):g})"
        remedy = "add images of small classes; accuracy over all images says little about them"
        yield Finding("warning", "imbalance", key, what, [], remedy)


def packed_names(key: str) -> dict[int, str]:
    """Label → class of what was packed for a task: its classes in params.yaml may have changed since."""
    return {entry["label"]: entry["name"] for entry in read_json(SPLITS / key / "classes.json")["classes"]}


def known_prints(key: str, task: Task, data: Data, findings: list[Finding]) -> Prints:
    """Return what the pictures of another task are compared by: from its packed images, else from its source."""
    packed = SPLITS / key / part_file(SAMPLES, key)
    if packed.is_file():
        return sample_prints(packed, key, packed_names(key))
    passed: list[Finding] = []
    seen = look_at(key, task, data, passed)
    if any(finding.level == "error" for finding in passed):
        what = f"{key} has errors of its own, so not all of its pictures were compared with"
        findings.append(Finding("warning", "source", key, what, [], "run `sdlora doctor` without a folder"))
    return seen.prints
