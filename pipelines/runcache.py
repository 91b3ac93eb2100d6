"""DVC's run-cache, shared whole: what a killed process or a full disk has left in it is no entry.

DVC writes an entry under another name first. Killed in between it leaves that file, then takes the newest file of a
stage, whatever it is, finds it broken and computes what it has; and it pushes the file, so that every machine does. It
also copies all entries at each push and pull, and goes on where a copy fails.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvc.exceptions import DvcException
from dvc.fs import HTTPFileSystem, LocalFileSystem
from dvc.stage.cache import RunCacheNotSupported, StageCache
from dvc_objects.fs import generic
from dvc_objects.fs.utils import as_atomic

if TYPE_CHECKING:
    from dvc.stage import Stage

ENTRY = re.compile(r"[0-9a-f]{64}")
"""The name of an entry: the hash of what it says."""


class RunCacheError(DvcException):
    """An entry could not be copied: storage that fails, a full disk."""


def use() -> None:
    """Have DVC, in this process, share and look up whole entries only."""
    StageCache._load = load
    StageCache.transfer = transfer


def load(cache: StageCache, stage: Stage) -> dict[str, Any] | None:
    """The newest whole entry of a stage; what is broken is passed over, where DVC would take it for all there is."""
    from dvc.stage.cache import _get_stage_hash

    key = _get_stage_hash(stage)
    folder = Path(cache._get_cache_dir(key)) if key else None
    if folder is None or not folder.is_dir():
        return None
    entries = [path for path in folder.iterdir() if ENTRY.fullmatch(path.name)]
    for path in sorted(entries, key=lambda path: path.stat().st_mtime, reverse=True):
        entry: dict[str, Any] | None = cache._load_cache(key, path.name)
        if entry:
            return entry
    return None


def transfer(cache: StageCache, from_odb: Any, to_odb: Any, force: bool = True) -> list[tuple[str, str]]:  # noqa: ANN401 - DVC's own signature
    """Copy the entries that the other side does not have in this size; return the key and the name of each.

    Raises:
        RunCacheError: one could not be copied.
        RunCacheNotSupported: one of the sides is an HTTP server, which cannot be listed.
    """
    for odb in (from_odb, to_odb):
        if isinstance(odb.fs, HTTPFileSystem):
            raise RunCacheNotSupported(f"run-cache is not supported for http filesystem: {odb.path}")
    copied = []
    try:
        there = entries_of(to_odb)
        for (key, name), size in entries_of(from_odb).items():
            if size and there.get((key, name)) != size:
                if from_odb is cache.repo.cache.legacy and cache._load_cache(key, name) is None:
                    continue  # it was broken
                source, target = (
                    odb.fs.join(odb.path, "runs", key[:2], key, name) for odb in (from_odb, to_odb)
                )
                copy(from_odb.fs, source, to_odb.fs, target)
                copied.append((key, name))
    except (DvcException, AssertionError):
        raise
    except Exception as error:  # every kind of storage raises its own
        words = " ".join(str(error).split()) or type(error).__name__
        raise RunCacheError(f"the run-cache could not be copied to {to_odb.path}: {words}") from error
    return copied


def entries_of(odb: Any) -> dict[tuple[str, str], int]:  # noqa: ANN401
    """Key and name of the entries of a store → bytes."""
    runs = odb.fs.join(odb.path, "runs")
    if isinstance(odb.fs, LocalFileSystem):
        sizes = {str(path): path.stat().st_size for path in Path(runs).glob("*/*/*")}
    else:  # of the file system below DVC's, whose own `find` says no sizes
        sizes = {path: int(facts["size"]) for path, facts in odb.fs.fs.find(runs, detail=True).items()}
    parts = {tuple(path.replace(os.sep, "/").split("/")[-2:]): size for path, size in sizes.items()}
    return {
        (key, name): size
        for (key, name), size in parts.items()
        if ENTRY.fullmatch(key) and ENTRY.fullmatch(name)
    }


def copy(from_fs: Any, source: str, to_fs: Any, target: str) -> None:  # noqa: ANN401
    """Copy a file; in a folder it appears whole, as an object does in an object store."""
    if isinstance(to_fs, LocalFileSystem):
        with as_atomic(to_fs, target, create_parents=True) as partial:
            generic.copy(from_fs, source, to_fs, partial)
    else:
        generic.copy(from_fs, source, to_fs, target)
