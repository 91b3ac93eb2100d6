"""Regular files: nothing else is read, because pipes, sockets and devices may never end or never answer."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pipelines.project.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_bytes(path: Path, *, at_most: int) -> bytes:
    """Return the bytes of a regular file, or of the one that a link names. Nothing is waited for.

    Raises:
        ValueError: it is something else, or larger.
        OSError: it cannot be read.
    """
    _require_regular(path.stat(), at_most)
    # What replaced it meanwhile, and files of the kernel that call themselves regular, must not block.
    with open(os.open(path, _AT_ONCE), "rb") as file:
        return file.read(_require_regular(os.fstat(file.fileno()), at_most))


_AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def _require_regular(facts: os.stat_result, at_most: int) -> int:
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"it is {_kind(facts.st_mode)}, not a file")
    if facts.st_size > at_most:
        raise ValueError(f"it has {facts.st_size:,} bytes, more than {at_most:,}")
    return facts.st_size


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def require_regular_files(folder: Path) -> None:
    """Refuse a folder that holds, at any depth, what is neither file nor folder: DVC would read it without end."""
    for entry in _entries(folder):
        if entry.is_file(follow_symlinks=False):
            continue
        try:
            mode, size = (facts := entry.stat()).st_mode, facts.st_size
        except OSError:  # a link to nothing, of which the stage that reads it has more to say
            continue
        if stat.S_ISREG(mode):
            what = "" if size or not _never_ends(entry.path) else "a link to a file of the kernel"
        else:
            what = "" if stat.S_ISDIR(mode) else _kind(mode)
        if what:
            raise InputError(f"{entry.path}: {what} among the files, which is not read; remove it")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what a folder and the folders in it hold. Links to folders are not followed."""
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry


def _never_ends(path: str) -> bool:
    """Return whether a file that calls itself empty gives bytes, or would after some waiting."""
    try:
        descriptor = os.open(path, _AT_ONCE)
    except OSError:
        return False
    try:
        return bool(os.read(descriptor, 1))
    except OSError:
        return True
    finally:
        os.close(descriptor)
