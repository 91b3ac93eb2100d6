"""Sources of a task: class folders, divided or not, a manifest, or shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines.data.archives import is_archive
from pipelines.data.class_folders import is_divided, missing_part, nested_folder, of_folders
from pipelines.data.division import divide
from pipelines.data.manifests import class_of, manifests, of_manifests, read_manifest
from pipelines.data.shards import of_shards, shard_classes, shards_of
from pipelines.data.source_files import WORDS, Fault, Found, Source, refuse, visible
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.project.param_checks import missing_source
from pipelines.project.settings import Data

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".xls", ".xlsx", ".ods")


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
        raise InputError(str(_no_folder(folder, shown)))
    shards = shards_of(folder, manifest)
    tables = manifests(folder, manifest)
    if shards:
        found = shard_classes(shards)
        if isinstance(found, Fault):
            raise InputError(str(found))
        names = found
    elif tables:
        labels = [class_of(row.where, row.label) for path, _ in tables for row in read_manifest(path)]
        names = {label for label in labels if isinstance(label, str)}
        if not names:
            refuse([label for label in labels if isinstance(label, Fault)])
            raise InputError(f"{tables[0][0]}: no row has a label; write one line for each image")
    elif is_divided(folder):
        missing = missing_part(folder)
        if missing is not None and not (folder / "train").is_dir():
            raise InputError(str(missing))
        names = {entry.name for entry in visible(folder / "train") if entry.is_dir()}
        if not names:
            raise InputError(
                f"{shown}/train: no class folders there; make one for each class and put its images there"
            )
    else:
        names = _undivided_classes(folder, shown)
    return sorted(names, key=natural_key)


def _undivided_classes(folder: Path, shown: str) -> set[str]:
    names = {entry.name for entry in visible(folder) if entry.is_dir()}
    tables = unread_tables(folder)
    if tables and (len(names) <= 1 or names <= set(WORDS)):
        beside = "the folder " + ", ".join(sorted(names)) if names else "no class folder"
        raise InputError(
            f"{shown}/{tables[0].name}: a table that nobody reads, beside {beside}; give the table itself if it "
            "lists the images, else move it away"
        )
    if len(names) > 1 and names <= set(WORDS):
        raise InputError(
            f"{shown}: images in {' and '.join(sorted(names))} without class folders; make one for each class in both"
        )
    if not names:
        raise InputError(f"{shown}: no class folders there; make one for each class and put its images there")
    for name in sorted(names, key=natural_key):
        inside = visible(folder / name)
        nested = [entry for entry in inside if entry.is_dir()]
        if nested and len(nested) < len(inside):
            refuse([nested_folder(Path(shown, name, nested[0].name))])
        if nested:
            what = f"a folder of folders, so {shown} holds neither classes nor train and test"
            refuse([Fault(f"{shown}/{name}", what, "give the folder that does")])
    return names


def unread_tables(folder: Path) -> list[Path]:
    """Return the tables at the top of a source of class folders, which may have been meant to say the classes."""
    return sorted(path for path in visible(folder) if path.suffix.lower() in _TABLES and path.is_file())


def _no_folder(folder: Path, shown: str) -> Fault:
    if not folder.is_file():
        return Fault(shown, "the folder is missing", missing_source(shown))
    if is_archive(folder):
        return Fault(shown, "an archive, which is not read", "unpack it and give the folder")
    return Fault(shown, "a file, not a folder", "give the folder of the images")


def read_source(folder: Path, names: Sequence[str], *, manifest: str | None) -> Source:
    """List the images of the classes `names`, and collect whatever is wrong with them. Other classes are left alone."""
    if not folder.is_dir():
        return Source([], [_no_folder(folder, str(folder))])
    if shards := shards_of(folder, manifest):
        return of_shards(names, shards)
    tables = manifests(folder, manifest)
    return of_manifests(folder, names, tables) if tables else of_folders(folder, names)
