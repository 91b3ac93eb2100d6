"""Sources of class folders, under train/ and test/ or undivided."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.data.source_files import (
    EXTENSIONS,
    WORDS,
    Fault,
    Found,
    Source,
    holds_folders,
    linked_folder,
    no_image,
    visible,
)
from pipelines.project.files import natural_key


def of_folders(folder: Path, names: Sequence[str]) -> Source:
    """Return the images of class folders, under train/ and test/ (and validation/) or without parts."""
    if not is_divided(folder):
        return _joined(_class_files(folder / name, part=None, name=name) for name in names)
    linked = [folder / word for word in WORDS if (folder / word).is_symlink()]
    if linked:
        return Source([], [linked_folder(part) for part in linked])
    listed = [_joined(_class_files(folder / "train" / name, part="train", name=name) for name in names)]
    for word in (word for word, part in WORDS.items() if part == "validation"):
        listed += [
            _class_files(folder / word / name, part="validation", name=name)
            for name in names
            if (folder / word / name).is_dir()
        ]
    listed += [_joined(_class_files(folder / "test" / name, part="test", name=name) for name in names)]
    return _joined(listed)


def is_divided(folder: Path) -> bool:
    """Return whether train/ and test/ are parts: folders of folders (or empty), not classes of such a name."""
    return any(
        (folder / part).is_dir() and (holds_folders(folder / part) or not visible(folder / part))
        for part in ("train", "test")
    )


def _class_files(folder: Path, *, part: str | None, name: str) -> Source:
    """Return the image files of a class, in natural order. Hidden ones are left out, anything else is a fault."""
    if not folder.is_dir():
        return Source([], [_missing_class(folder)])
    if folder.is_symlink():
        return Source([], [linked_folder(folder)])
    images, faults = [], []
    paths = sorted(visible(folder), key=lambda path: natural_key(path.name))
    for path in paths:
        if not path.name.isprintable():
            what = f"the file name {path.name!a} is not printable text"
            faults.append(Fault(str(folder), what, "rename the file"))
        elif path.suffix.lower() in EXTENSIONS:
            images.append(Found(path, part, name, path.name))
        elif path.is_dir():
            remedy = "move its images up or make it a class of its own"
            faults.append(Fault(str(path), "a folder inside a class", remedy))
        else:
            faults.append(no_image(str(path)))
    if not paths:
        remedy = "put at least one image there or remove the class"
        faults.append(Fault(str(folder), "the class is empty", remedy))
    return Source(images, faults)


def _missing_class(folder: Path) -> Fault:
    remedy = "make it, or correct the task's classes in params.yaml"
    if folder.parent.is_dir():
        same = unicodedata.normalize("NFC", folder.name)
        for other in folder.parent.iterdir():
            if unicodedata.normalize("NFC", other.name) == same:
                what = "the folder is missing; one whose name looks the same has its accents in another form"
                return Fault(
                    str(folder), what, "rename it to the name in params.yaml, or run `sdlora add-task`"
                )
    return Fault(str(folder), "the folder is missing", remedy)


def _joined(sources: Iterable[Source]) -> Source:
    images: list[Found] = []
    faults: list[Fault] = []
    for source in sources:
        images += source.images
        faults += source.faults
    return Source(images, faults)
