"""Sources of shards: Parquet and tar files that hold the images themselves, here or pinned elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from pipelines.data.manifests import METADATA, class_of, part_of
from pipelines.data.parquet_shards import ParquetShard, Unpacked, holds_images
from pipelines.data.pins import PIN, pinned_shards
from pipelines.data.source_files import PARTS, SHARDS, WORDS, Entry, Fault, Found, Shard, Source, visible
from pipelines.data.tar_shards import TarShard
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.runtime.progress import progress

_PLACES = (*WORDS, "data")
"""Folders of a source in which shards may stand: of a part, or `data` as on the Hugging Face hub."""


def shards_of(folder: Path, manifest: str | None) -> list[Shard]:
    """Return the shards of a source, in natural order. Nothing where its images are files.

    Args:
        folder: The source.
        manifest: A file in it, or a pattern of names of files; None for all shards that are there.
    """
    if manifest is None and (folder / PIN).is_file():
        found = [(path, name, shown) for name, (path, shown) in pinned_shards(folder / PIN).items()]
    else:
        paths = _named(folder, manifest) if manifest is not None else _standing(folder)
        found = [(path, path.relative_to(folder).as_posix(), str(path)) for path in paths]
        if not any(path.suffix == ".tar" or holds_images(path) for path, _, _ in found):
            return []
    unpacked = Unpacked()
    return [
        ParquetShard(path, name=name, shown=shown, unpacked=unpacked)
        if name.endswith(".parquet")
        else TarShard(path, name=name, shown=shown)
        for path, name, shown in sorted(found, key=lambda its: natural_key(its[1]))
    ]


def _named(folder: Path, manifest: str) -> list[Path]:
    """Return the shards that a manifest's name, or pattern, means."""
    if (folder / manifest).exists() or not set("*?[") & set(manifest):
        paths = [folder / manifest]
    else:
        paths = [path for path in visible(folder) if fnmatchcase(path.name, manifest)]
        if not paths:
            raise InputError(
                f"{folder}/{manifest}: no file has such a name; correct it, or put the files there"
            )
    return [path for path in paths if path.suffix in SHARDS and path.is_file()]


def _standing(folder: Path) -> list[Path]:
    """Return the shards in a folder and its places for them. Nothing where other folders are there, or a manifest."""
    entries = visible(folder)
    found = [
        path for path in entries if path.suffix in SHARDS and path.is_file() and path.name not in METADATA
    ]
    for place in (entry for entry in entries if entry.is_dir()):
        inside = [path for path in visible(place) if path.suffix in SHARDS and path.is_file()]
        if place.name not in _PLACES or place.is_symlink() or not inside:
            return []
        found += inside
    return [] if any((folder / name).is_file() for name in METADATA) else found


def shard_classes(shards: Sequence[Shard]) -> set[str] | Fault:
    """Return the classes of all images. The first fault where no image has a class."""
    names, first = set(), None
    for found in _classified(shards):
        if isinstance(found, Fault):
            first = first or found
        else:
            names.add(found[2])
    return names or first or Fault(shards[0].shown, "there is no image in it", "add some")


def of_shards(names: Sequence[str], shards: Sequence[Shard]) -> Source:
    """Return the images of the classes `names`, and all that is wrong with the shards."""
    images: list[Found] = []
    faults: list[Fault] = []
    position = {name: index for index, name in enumerate(names)}
    places = _parts_of([shard.name for shard in shards])
    seen = set()
    for found in _classified(shards):
        if isinstance(found, Fault):
            faults.append(found)
            continue
        shard, entry, name = found
        seen.add(name)
        part = part_of(shard.where(entry.file), entry.part, given=places[shard.name])
        if name not in position:
            continue
        if isinstance(part, Fault):
            faults.append(part)
            continue
        file = f"{shard.name}/{entry.file}"
        images.append(Found(shard.path, part, name, file, shard, shard.hold(entry)))
    if any(image.part is not None for image in images):
        without = [image for image in images if image.part is None]
        remedy = "give all of them a part: train, validation or test"
        faults += [Fault(image.shown, "no part, which other images have", remedy) for image in without]
    for name in names:
        if name not in seen:
            remedy = "add its images, or correct the task's classes in params.yaml"
            faults.append(Fault(shards[0].shown, f"no image has the label {name!r}, in no shard", remedy))
    images.sort(
        key=lambda image: (PARTS.index(image.part or "train"), position[image.name], natural_key(image.file))
    )
    return Source(images, faults)


def _classified(shards: Sequence[Shard]) -> Iterator[tuple[Shard, Entry, str] | Fault]:
    """Yield the images of all shards, each with its class, and what is wrong."""
    known: dict[object, str] = {}
    with progress("list shards", total=len(shards), unit="shards") as bar:
        for number, shard in enumerate(shards, start=1):
            for entry in shard.entries():
                if isinstance(entry, Fault):
                    yield entry
                    continue
                label = entry.label
                if type(label) in (str, int) and label in known:
                    yield shard, entry, known[label]
                    continue
                name = label if isinstance(label, Fault) else class_of(shard.where(entry.file), label)
                if isinstance(name, Fault):
                    yield name
                else:
                    known[label] = name
                    yield shard, entry, name
            bar.update(number)


def _parts_of(names: Sequence[str]) -> dict[str, str | None]:
    """Return the part of each shard by its folder or the words of its name. None where all are of train or of none."""
    found = {name: _part_of(PurePosixPath(name)) for name in names}
    # On the hub an undivided data set is called train as a whole.
    return found if set(found.values()) - {"train", None} else dict.fromkeys(names)


def _part_of(path: PurePosixPath) -> str | None:
    if len(path.parts) > 1 and path.parts[0] in WORDS:
        return WORDS[path.parts[0]]
    said = {WORDS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in WORDS}
    return said.pop() if len(said) == 1 else None
