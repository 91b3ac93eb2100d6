"""Sources of a task: class folders, divided or not, or a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.data.class_folders import is_divided, of_folders
from pipelines.data.division import divide
from pipelines.data.manifests import class_of, manifests, of_manifests, read_manifest
from pipelines.data.source_files import Fault, Found, Source, holds_folders, refuse, visible
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.param_checks import missing_source
from pipelines.project.settings import Data


def task_images(folder: Path, names: Sequence[str], *, manifest: str | None, data: Data) -> list[Found]:
    """Return the images of a task's classes, each with its part. An `InputError` names the first fault, counts the
    others.

    They are in the order of parts, of `names`, and of natural file names.
    """
    source = read_source(folder, names, manifest=manifest)
    divided = divide(source.images, data) if not source.faults else source
    refuse(divided.faults)
    return divided.images


def class_names(folder: Path, *, manifest: str | None, shown: str) -> list[str]:
    """Return all classes of a source, in natural order. An `InputError` calls the folder `shown`."""
    if not folder.is_dir():
        raise InputError(f"{shown}: the folder is missing; {missing_source(shown)}")
    tables = manifests(folder, manifest)
    if tables:
        labels = (class_of(row) for path, _ in tables for row in read_manifest(path))
        names = {label for label in labels if isinstance(label, str)}
        if not names:
            raise InputError(f"{tables[0][0]}: no row has a label; write one line for each image")
    elif is_divided(folder):
        names = {entry.name for entry in visible(folder / "train") if entry.is_dir()}
        if not (folder / "train").is_dir():
            raise InputError(f"{shown}/train: the folder is missing beside test; put training images there")
        if not names:
            raise InputError(
                f"{shown}/train: no class folders there; make one for each class and put its images there"
            )
    else:
        names = {entry.name for entry in visible(folder) if entry.is_dir()}
        if not names:
            raise InputError(
                f"{shown}: no class folders there; make one for each class and put its images there"
            )
        for name in sorted(names, key=natural_key):
            if holds_folders(folder / name):
                raise InputError(
                    f"{shown}/{name}: a folder of folders, so {shown} holds neither classes nor train and test;"
                    " give the folder that does"
                )
    return sorted(names, key=natural_key)


def read_source(folder: Path, names: Sequence[str], *, manifest: str | None) -> Source:
    """List the images of the classes `names`, and collect whatever is wrong with them. Other classes are left alone."""
    if not folder.is_dir():
        return Source([], [Fault(str(folder), "the folder is missing", missing_source(folder))])
    tables = manifests(folder, manifest)
    return of_manifests(folder, names, tables) if tables else of_folders(folder, names)
