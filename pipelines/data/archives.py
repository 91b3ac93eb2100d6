"""Reading archives of strangers, member by member: nothing is unpacked to a path that the archive chooses."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pipelines.project.errors import InputError

MEMBER_BYTES = 512 * 2**20
"""No member that is read may be larger, unpacked; the largest of the known ones has 154 MB."""

_TOTAL_RATIO = 100
"""An archive may not hold more than so many times its own size: images hardly shrink, a bomb shrinks a thousandfold."""

SLACK_BYTES = 16 * 2**20
"""What an archive may hold beyond that ratio, for small ones full of text."""

_Wanted = Callable[[PurePosixPath], bool]


def is_archive(path: Path) -> bool:
    """Return whether the name is one of a kind that `archive_members` reads."""
    return path.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def archive_members(path: Path, wanted: _Wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield path and bytes of the files for which `wanted` says so, in the archive's order.

    Every member is checked, wanted or not: an absolute path, one that leads out of its folder, a link, a
    device, a member or a whole archive that unpacks to far more than it should raise an `InputError`.
    """
    if not is_archive(path):
        raise InputError(
            f"{path}: not an archive that is read; give a .zip, .tar, .tar.gz, .tar.bz2 or .tar.xz"
        )
    with _damage_named(path):
        yield from (
            _zip_members(path, wanted) if path.name.lower().endswith(".zip") else _tar_members(path, wanted)
        )


def names(path: Path) -> list[PurePosixPath]:
    """Return the paths of all files of an archive, checked like those of `archive_members`. No bytes are kept."""
    found: list[PurePosixPath] = []

    def note(name: PurePosixPath) -> bool:
        found.append(name)
        return False

    for _ in archive_members(path, note):
        pass
    return found


def gunzip(path: Path) -> bytes:
    """Return the content of a single .gz file, within the limits of a member."""
    limit = min(MEMBER_BYTES, _TOTAL_RATIO * path.stat().st_size + SLACK_BYTES)
    with _damage_named(path), gzip.open(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path}: unpacks to more than {limit:,} bytes, as no such file should; delete it")
    return data


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one line that names it."""
    try:
        yield
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        OSError,  # of gzip and bz2, for damage
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fault = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: a damaged archive ({fault}); delete it and run the same again") from None


def _tar_members(path: Path, wanted: _Wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    room = _Room(path)
    with tarfile.open(path, "r:*") as archive:  # not as a stream: one that is cut off would just end
        for member in archive:
            name = _safe_path(member.name, path)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise InputError(
                    f"{path}: {member.name!r} is a link, a device or a file with holes, which are not unpacked;"
                    " get the archive from its own address"
                )
            room.take(member.name, member.size)
            if wanted(name):
                file = archive.extractfile(member)
                assert file is not None
                data = file.read()
                if len(data) != member.size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                yield name, data
        # tarfile takes a damaged header for the end; the true one is a block of zeros, and what follows it is read
        # because the checksum of a compressed archive stands at its end.
        rest = archive.fileobj
        assert rest is not None
        rest.seek(archive.offset)
        if any(rest.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("a header in the middle cannot be read")
        while rest.read(2**20):
            pass


def _zip_members(path: Path, wanted: _Wanted) -> Iterator[tuple[PurePosixPath, bytes]]:
    room = _Room(path)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = _safe_path(member.filename, path)
            if member.is_dir():
                continue
            # The upper half holds Unix' mode where the archive was made there: 0o10 is a plain file, 0 unknown.
            if (member.external_attr >> 28) not in (0, 0o10):
                raise InputError(
                    f"{path}: {member.filename!r} is a link or a device, which are not unpacked;"
                    " get the archive from its own address"
                )
            if member.flag_bits & 1:
                raise InputError(f"{path}: {member.filename!r} is encrypted; unpack it and pack it without")
            room.take(member.filename, member.file_size)
            if wanted(name):
                with archive.open(member) as file:  # stops at the size that was checked, and checks the sum
                    yield name, file.read(member.file_size + 1)


class _Room:
    """What an archive may still unpack to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = _TOTAL_RATIO * path.stat().st_size + SLACK_BYTES

    def take(self, name: str, size: int) -> None:
        self._left -= size
        if size > MEMBER_BYTES or self._left < 0:
            raise InputError(
                f"{self._path}: {name!r} would unpack to {size:,} bytes, more than such an archive should hold;"
                " get it from its own address"
            )


def _safe_path(name: str, archive: Path) -> PurePosixPath:
    """Return a member's path, which must stay in the folder that it is unpacked to."""
    path = PurePosixPath(name)
    parts = name.replace("\\", "/").split("/")
    if path.is_absolute() or "\\" in name or ".." in parts or ":" in parts[0] or "\0" in name:
        raise InputError(
            f"{archive}: {name!r} would be written outside of its folder; get the archive from its own address"
        )
    return path
