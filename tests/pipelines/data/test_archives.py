"""Archives of strangers: what is read, and everything that is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from pipelines.data import archives
from pipelines.data.archives import archive_members, gunzip, names
from pipelines.project.errors import InputError

FILES = {"set/b/2.jpg": b"two", "set/a/1.jpg": b"one", "set/readme.txt": b"read"}


def everything(path: PurePosixPath) -> bool:
    return True


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Pack files by the kind that the name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("set/", b"")
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
            tar.addfile(entry("set", tarfile.DIRTYPE))
            for name, data in files.items():
                tar.addfile(entry(name, size=len(data)), io.BytesIO(data))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


KINDS = ["a.tar", "a.tar.gz", "a.tgz", "a.zip"]


@pytest.mark.parametrize("kind", KINDS)
def test_members_come_in_the_order_of_the_archive_and_only_if_wanted(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / kind, FILES)

    found = list(archive_members(path, lambda name: name.suffix == ".jpg"))

    assert found == [(PurePosixPath("set/b/2.jpg"), b"two"), (PurePosixPath("set/a/1.jpg"), b"one")]
    assert names(path) == [PurePosixPath(name) for name in FILES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../out.jpg", "set/../../out.jpg", "..\\out.jpg", "set\\out.jpg", "C:/out.jpg"]
)
def test_a_path_that_leads_out_is_refused_even_if_nobody_wants_it(
    tmp_path: Path, kind: str, name: str
) -> None:
    path = pack(tmp_path / kind, {**FILES, name: b"bad"})

    with pytest.raises(InputError, match="would be written outside of its folder"):
        list(archive_members(path, lambda _: False))


@pytest.mark.parametrize(
    "info",
    [
        pytest.param(entry("set/l", tarfile.SYMTYPE, target="/etc"), id="symbolic link"),
        pytest.param(entry("set/l", tarfile.LNKTYPE, target="set/a"), id="hard link"),
        pytest.param(entry("set/l", tarfile.CHRTYPE), id="device"),
        pytest.param(entry("set/l", tarfile.FIFOTYPE), id="pipe"),
    ],
)
def test_what_is_not_a_plain_file_is_refused(tmp_path: Path, info: tarfile.TarInfo) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)

    with pytest.raises(InputError, match=r"'set/l' is a link, a device or a file with holes"):
        names(tmp_path / "a.tar")


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("set/l")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")

    with pytest.raises(InputError, match=r"'set/l' is a link or a device"):
        names(tmp_path / "a.zip")


@pytest.mark.parametrize("kind", ["a.tar.gz", "a.zip"])
def test_a_bomb_is_refused_before_it_unpacks(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "SLACK_BYTES", 1000)
    path = pack(tmp_path / kind, {"set/a/1.jpg": bytes(3_000_000)})

    with pytest.raises(InputError, match=r"'set/a/1\.jpg' would unpack to 3,000,000 bytes, more than such"):
        list(archive_members(path, everything))


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_that_is_too_large_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MEMBER_BYTES", 4)
    path = pack(tmp_path / kind, {"set/a/1.jpg": b"12345"})

    with pytest.raises(InputError, match="would unpack to 5 bytes"):
        names(path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbled(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>" * 50)


@pytest.mark.parametrize("damage", [cut_off, garbled])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_archive_is_one_line_that_names_it(
    tmp_path: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    path = pack(tmp_path / kind, {f"set/a/{i}.jpg": bytes(range(256)) * 200 for i in range(20)})
    damage(path)

    with pytest.raises(
        InputError, match=rf"{kind}: a damaged archive \(.*\); delete it and run the same again"
    ):
        list(archive_members(path, everything))


def test_a_changed_byte_in_a_zip_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/a/1.jpg", b"the image's bytes")
    path.write_bytes(path.read_bytes().replace(b"the image's", b"the imagE's"))

    with pytest.raises(InputError, match="a damaged archive"):
        list(archive_members(path, everything))


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.rar: not an archive that is read; give a \.zip, \.tar"):
        names(tmp_path / "a.rar")


def test_a_single_compressed_file_is_unpacked_within_the_same_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"content"))
    assert gunzip(tmp_path / "a.gz") == b"content"

    monkeypatch.setattr(archives, "SLACK_BYTES", 1000)
    (tmp_path / "b.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(InputError, match=r"b\.gz: unpacks to more than [\d,]+ bytes, as no such file should"):
        gunzip(tmp_path / "b.gz")

    (tmp_path / "c.gz").write_bytes(gzip.compress(bytes(1000))[:-6])
    with pytest.raises(InputError, match=r"c\.gz: a damaged archive"):
        gunzip(tmp_path / "c.gz")


@pytest.mark.parametrize("kind", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path, kind: str) -> None:
    """tarfile itself takes it for the end, and half of the images would be missing without a word."""
    plain = pack(tmp_path / "whole.tar", {f"set/{i}.jpg": bytes(700) for i in range(8)})
    data = bytearray(plain.read_bytes())
    data[data.index(b"set/5.jpg")] ^= 1
    packed = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    path = tmp_path / kind
    path.write_bytes(packed[kind.rpartition(".")[2]](bytes(data)))

    with pytest.raises(InputError, match=r"a damaged archive \(a header in the middle cannot be read\)"):
        names(path)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_damage_behind_the_last_member_of_a_compressed_archive_is_found(tmp_path: Path, kind: str) -> None:
    plain = pack(tmp_path / "whole.tar", {f"set/{i}.jpg": bytes(700) for i in range(8)})
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    data = bytearray(packed[kind](plain.read_bytes()))
    data[-6] ^= 1
    path = tmp_path / f"a.tar.{kind}"
    path.write_bytes(data)

    with pytest.raises(InputError, match="a damaged archive"):
        names(path)
