"""Sources of class folders, under train/ and test/ or undivided."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelines.data.source_files import (
    EXTENSIONS,
    WORDS,
    Fault,
    Found,
    Source,
    holds_folders,
    is_litter,
    linked_folder,
    no_image,
    visible,
)
from pipelines.project.files import natural_key
from pipelines.project.names import is_text


def of_folders(folder: Path, names: Sequence[str]) -> Source:
    """Return the images of class folders, under train/ and test/ (and validation/) or without parts."""
    if not is_divided(folder):
        return _joined(_class_files(folder / name, part=None, name=name) for name in names)
    missing = missing_part(folder)
    if missing is not None:
        return Source([], [missing])
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


def litter_of(folder: Path, names: Sequence[str]) -> Counter[str]:
    """Count what other programs have left among the class folders of a source, by its name."""
    parts = [folder / word for word in WORDS] if is_divided(folder) else [folder]
    places = dict.fromkeys([folder, *parts, *(part / name for part in parts for name in names)])
    return Counter(
        entry.name for place in places if place.is_dir() for entry in place.iterdir() if is_litter(entry.name)
    )


def missing_part(folder: Path) -> Fault | None:
    """Return what to do where one of train/ and test/ is there without the other."""
    for part, other in (("train", "test"), ("test", "train")):
        if not (folder / part).is_dir() and not (folder / part).is_symlink():
            what = f"the folder is missing beside {other}"
            validation = next(
                (word for word, its in WORDS.items() if its == "validation" and (folder / word).is_dir()),
                None,
            )
            if part == "test" and validation is not None:
                return Fault(
                    f"{folder}/test",
                    f"{what} and {validation}",
                    f"rename {validation} to test to test on its images, or make test",
                )
            whole = f"move the classes of {other} up, and {part} images are drawn from theirs"
            return Fault(f"{folder}/{part}", what, f"put {part} images there, or {whole}")
    return None


def _class_files(folder: Path, *, part: str | None, name: str) -> Source:
    """Return the image files of a class, in natural order. Litter is left out, anything else is a fault."""
    if not folder.is_dir():
        return Source([], [_missing_class(folder)])
    if folder.is_symlink():
        return Source([], [linked_folder(folder)])
    images, faults = [], []
    paths = sorted(visible(folder), key=lambda path: natural_key(path.name))
    for path in paths:
        if not is_text(path.name):
            what = f"the file name {path.name!a} has a line end or a control character"
            faults.append(Fault(str(folder), what, "rename the file"))
        elif path.suffix.lower() in EXTENSIONS:
            images.append(Found(path, part, name, path.name))
        elif path.is_dir():
            faults.append(nested_folder(path))
        else:
            faults.append(no_image(str(path)))
    if not paths:
        remedy = "put at least one image there or remove the class"
        faults.append(Fault(str(folder), "the class is empty", remedy))
    return Source(images, faults)


def nested_folder(path: Path) -> Fault:
    """Return the fault of a folder that stands among the images of a class."""
    return Fault(str(path), "a folder inside a class", "move its images up or make it a class of its own")


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
