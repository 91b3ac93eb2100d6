"""DVC's run-cache, shared whole: what a killed process or a full disk has left in it is no entry.

DVC writes an entry under another name first. Killed in between it leaves that file, then takes the newest file of a
stage, whatever it is, finds it broken and computes what it has; and it pushes the file, so that every machine does. It
also copies all entries at each push and pull, and goes on where a copy fails.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dvc.exceptions import DvcException
from dvc.fs import HTTPFileSystem, LocalFileSystem
from dvc.stage.cache import RunCacheNotSupported, StageCache, _get_cache_hash, _get_stage_hash
from dvc.utils.serialize import ParseError, load_yaml
from dvc_objects.fs import generic
from dvc_objects.fs.utils import as_atomic

from pipelines.versioning.patches.errors import RunCacheError

if TYPE_CHECKING:
    from dvc.stage import Stage

_ENTRY = re.compile(r"[0-9a-f]{64}")
"""The name of an entry: the hash of what it says."""


def use() -> None:
    """Have DVC, in this process, share and look up whole entries only."""
    StageCache._load_cache = _load_entry
    StageCache._load = _load
    StageCache.transfer = _transfer


def is_whole(content: Any, name: str) -> bool:  # noqa: ANN401 - whatever YAML can hold
    """Return whether an entry says what its name is the hash of."""
    try:
        return bool(_get_cache_hash(content) == name)
    except Exception:  # what is cut off may have any form
        return False


def _read_whole(path: Path, name: str) -> dict[str, Any] | None:
    """Return what an entry says. None if it is broken."""
    try:
        content = load_yaml(path)
    except ParseError:  # no YAML, or no text
        return None
    return dict(content) if is_whole(content, name) else None


def _load_entry(cache: StageCache, key: str, name: str) -> dict[str, Any] | None:
    """Return an entry. None if there is none, and what is broken is deleted."""
    path = Path(cache._get_cache_path(key, name))
    try:
        entry = _read_whole(path, name)
    except FileNotFoundError:
        return None
    if entry is None:
        path.unlink(missing_ok=True)
    return entry


def _load(cache: StageCache, stage: Stage) -> dict[str, Any] | None:
    """Return the newest whole entry of a stage. What is broken is passed over, where DVC would take it for all there
    is.
    """
    key = _get_stage_hash(stage)
    folder = Path(cache._get_cache_dir(key)) if key else None
    if folder is None or not folder.is_dir():
        return None
    found = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if _ENTRY.fullmatch(path.name):
                found[path.name] = path.stat().st_mtime
    entries = (
        _load_entry(cache, key, name) for name in sorted(found, key=lambda name: found[name], reverse=True)
    )
    return next((entry for entry in entries if entry), None)


def _transfer(cache: StageCache, from_odb: Any, to_odb: Any, force: bool = True) -> list[tuple[str, str]]:  # noqa: ANN401 - DVC's own signature
    """Copy the entries that the other side does not have in this size. Return the key and the name of each.

    Raises:
        RunCacheError: one could not be copied.
        RunCacheNotSupported: one of the sides is an HTTP server, which cannot be listed.
    """
    for odb in (from_odb, to_odb):
        if isinstance(odb.fs, HTTPFileSystem):
            raise RunCacheNotSupported(f"run-cache is not supported for http filesystem: {odb.path}")
    copied = []
    try:
        there = _entries_of(to_odb)
        for (key, name), size in _entries_of(from_odb).items():
            if size and there.get((key, name)) != size:
                source, target = (
                    odb.fs.join(odb.path, "runs", key[:2], key, name) for odb in (from_odb, to_odb)
                )
                if _copy(from_odb.fs, source, to_odb.fs, target, name):
                    copied.append((key, name))
    except (DvcException, AssertionError):
        raise
    except Exception as error:  # every kind of storage raises its own
        words = " ".join(str(error).split()) or type(error).__name__
        raise RunCacheError(f"the run-cache could not be copied to {to_odb.path}: {words}") from error
    return copied


def _entries_of(odb: Any) -> dict[tuple[str, str], int]:  # noqa: ANN401
    """Key and name of the entries of a store → bytes."""
    runs = odb.fs.join(odb.path, "runs")
    found = {}
    if isinstance(odb.fs, LocalFileSystem):
        for path in Path(runs).glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):
                if named := _entry_of(str(path)):
                    found[named] = path.stat().st_size
    else:  # of the file system below DVC's, whose own `find` says no sizes
        for name, facts in odb.fs.fs.find(runs, detail=True).items():
            if named := _entry_of(name):
                found[named] = int(facts["size"])
    return found


def _entry_of(path: str) -> tuple[str, str] | None:
    """Key and name of the entry that a path leads to, if it is one's."""
    *_, key, name = path.replace(os.sep, "/").split("/")
    return (key, name) if _ENTRY.fullmatch(key) and _ENTRY.fullmatch(name) else None


def _copy(from_fs: Any, source: str, to_fs: Any, target: str, name: str) -> bool:  # noqa: ANN401
    """Copy an entry, if it is whole. It appears at once, or not at all. Return whether it was."""
    with TemporaryDirectory(prefix="sdlora-") as folder:
        held = str(Path(folder) / name)
        generic.copy(from_fs, source, LocalFileSystem(), held)
        if _read_whole(Path(held), name) is None:
            return False
        if isinstance(to_fs, LocalFileSystem):
            with as_atomic(to_fs, target, create_parents=True) as partial:
                generic.copy(LocalFileSystem(), held, to_fs, partial)
        else:
            generic.copy(LocalFileSystem(), held, to_fs, target)
    return True
