"""`sdlora audit verify --cache`: what DVC's cache and its remotes hold of the chain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipelines.project.error_text import one_line
from pipelines.project.errors import FaultError, InputError
from pipelines.project.layout import LOCK, METRICS
from pipelines.project.params import Params
from pipelines.versioning.artifacts import read_lock
from pipelines.versioning.file_hashes import md5_of
from pipelines.versioning.stores import Stores, open_stores


def check_stored() -> Iterator[tuple[str, int, int]]:
    """Read every object of the chain in DVC's cache, and ask each remote which it has.

    Yields the store, how many objects it has, and how many there are. A store need not have any.

    Raises:
        FaultError: a cached object is not the file that its name is the hash of.
        InputError: a remote does not answer.
    """
    with open_stores() as held:
        needed = sorted(_objects_of(held))
        yield "the cache", sum(_is_read(held.object_path(md5)) for md5 in needed), len(needed)
        for name, remote in held.remotes.items():
            try:
                there = remote.held(needed)
            except Exception as trouble:  # every kind of storage raises its own
                raise InputError(f"DVC's remote {name} does not answer ({one_line(trouble)})") from trouble
            yield f"remote {name}", len(there), len(needed)


def _objects_of(held: Stores) -> set[str]:
    """Return the objects of all outputs in dvc.lock: files, listings of folders, and what these list."""
    outs = {path: md5 for path, md5 in read_lock(Params.load()).outs.items() if path != str(METRICS)}
    found = set(outs.values())
    for path, md5 in outs.items():
        listing = held.object_path(md5)
        if md5.endswith(".dir") and _is_read(listing):
            try:
                found |= {str(entry["md5"]) for entry in json.loads(listing.read_bytes())}
            except (ValueError, LookupError, TypeError):
                raise FaultError(f"{listing}: not a listing of {path}, which {LOCK} names") from None
    return found


def _is_read(path: Path) -> bool:
    """Return whether the cache has an object. A `FaultError` where its bytes are others than its name says."""
    if not path.is_file():
        return False
    if md5_of(path) != (path.parent.name + path.name).removesuffix(".dir"):
        raise FaultError(
            f"{path}: its bytes are not those of its name; delete it, and `dvc fetch` or `dvc commit`"
        )
    return True
