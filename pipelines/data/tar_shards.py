"""Tar files that hold images: WebDataset's, with labels beside the images, or class folders."""

from __future__ import annotations

import json
import posixpath
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.data.source_files import EXTENSIONS, IMAGE_BYTES, WORDS, Entry, Fault, is_litter, no_image
from pipelines.project.error_text import one_line
from pipelines.project.names import is_text

_BESIDE = ("cls", "json", "txt")
"""Endings of what may stand beside an image and say its class: the first that does holds."""
_BESIDE_BYTES = 2**20
"""Size of such a file at most."""


class _Member(NamedTuple):
    """An image of a tar file."""

    path: str
    start: int
    size: int


class _Members(NamedTuple):
    """What a tar file holds."""

    images: list[_Member]
    labels: dict[str, dict[str, object]]
    """key → ending → label"""
    others: list[str]
    """files of other kinds"""


class TarShard:
    """An uncompressed tar file of images. Each image is read at its place."""

    def __init__(self, path: Path, *, name: str, shown: str) -> None:
        self.path, self.name, self.shown = path, name, shown
        self._starts: array[int] = array("q")
        self._sizes: array[int] = array("q")

    def entries(self) -> Iterator[Entry | Fault]:
        """Yield all images, in the order of the file, and what is wrong."""
        found = _Members([], {}, [])
        yield from self._scan(found)
        if any(_key_of(image.path)[0] in found.labels for image in found.images):
            yield from self._labelled(found)
        else:
            yield from self._in_folders(found)

    def hold(self, entry: Entry) -> int:
        """Note that an image may be read. Return its number."""
        self._starts.append(entry.start)
        self._sizes.append(entry.size)
        return len(self._sizes) - 1

    def where(self, file: str) -> str:
        """Return what messages call a file, by its path in the shard."""
        return f"{self.shown}: {file}"

    def image(self, number: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            ValueError: the file has become shorter.
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self._starts[number])
            data = file.read(self._sizes[number])
        if len(data) != self._sizes[number]:
            raise ValueError("it is cut off")
        return data

    def _scan(self, found: _Members) -> Iterator[Fault]:
        """Sort what the file holds. Yield what is wrong with it."""
        seen: set[str] = set()
        try:
            with tarfile.open(self.path, "r:") as archive:
                file = archive.fileobj
                assert file is not None
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else it would remember them all
                    parts = [part for part in member.name.split("/") if part not in ("", ".")]
                    if member.isdir() or any(map(is_litter, parts)):
                        continue
                    path = "/".join(parts)
                    if (fault := self._fault_of(member, path, again=path in seen)) is not None:
                        yield fault
                        continue
                    seen.add(path)
                    key, ending = _key_of(path)
                    if _is_image(path):
                        found.images.append(_Member(path, member.offset_data, member.size))
                        continue
                    found.others.append(path)
                    if ending.lower() in _BESIDE and member.size <= _BESIDE_BYTES:
                        file.seek(member.offset_data)
                        label = _label_in(file.read(member.size), ending.lower())
                        found.labels.setdefault(key, {})[ending.lower()] = label
                # What tarfile takes for the end may be a damaged header: the true one is a block of zeros.
                file.seek(archive.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it is cut off, or a header in the middle cannot be read")
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            what = f"not a whole, uncompressed tar file ({one_line(error)})"
            yield Fault(self.shown, what, "write it anew, or move it away")

    def _fault_of(self, member: tarfile.TarInfo, path: str, *, again: bool) -> Fault | None:
        """Return why a file of the shard cannot be read, if it cannot."""
        if not is_text(path):
            what = f"the name {member.name!a} has a line end or a control character"
            return Fault(self.shown, what, "rename the file")
        if not member.isreg() or member.issparse():
            what = "a link, a device or a file with holes"
            return Fault(self.where(path), what, "put the file itself there")
        if again:
            return Fault(self.where(path), "it stands in the file twice", "remove one")
        if member.size > IMAGE_BYTES:
            what = f"it has {member.size:,} bytes, more than {IMAGE_BYTES:,}"
            return Fault(self.where(path), what, "remove it")
        return None

    def _labelled(self, found: _Members) -> Iterator[Entry | Fault]:
        """Yield the images by what stands beside them."""
        keys = [_key_of(image.path) for image in found.images]
        plain = {key for key, ending in keys if "." not in ending}
        for image, (key, ending) in zip(found.images, keys, strict=True):
            if key in plain and "." in ending:  # a field beside the image, such as .seg.png
                continue
            labels = found.labels.get(key, {})
            label = next((labels[kind] for kind in _BESIDE if labels.get(kind) is not None), None)
            if label is None:
                label = self._no_label(image, f"write one into {posixpath.basename(key)}.cls")
            above = posixpath.basename(posixpath.dirname(image.path))
            yield Entry(image.path, label, WORDS.get(above.lower()), image.start, image.size)
        images = {key for key, _ in keys}
        for key, labels in found.labels.items():
            if "cls" in labels and key not in images:
                yield Fault(self.where(f"{key}.cls"), "there is no image beside it", "add it, or remove this")

    def _in_folders(self, found: _Members) -> Iterator[Entry | Fault]:
        """Yield the images by the folders that they stand in."""
        folders = set()
        for image in found.images:
            *_, above, folder, _ = ("", "", *image.path.split("/"))
            remedy = "put it into a class folder, or its label into KEY.cls beside it"
            folders.add(posixpath.dirname(image.path))
            label = folder or self._no_label(image, remedy)
            yield Entry(image.path, label, WORDS.get(above.lower()), image.start, image.size)
        for path in found.others:
            if posixpath.dirname(path) in folders - {""}:
                yield no_image(self.where(path))

    def _no_label(self, image: _Member, remedy: str) -> Fault:
        return Fault(self.where(image.path), "no label", remedy)


def _key_of(path: str) -> tuple[str, str]:
    """Return the key of a file, as WebDataset has it, up to the first dot of its name, and the ending after that."""
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return f"{folder}{slash}{stem}", ending


def _is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in EXTENSIONS


def _label_in(data: bytes, ending: str) -> object:
    """Return the label that a file beside an image says. None where it says none."""
    try:
        text = data.decode("utf-8-sig").strip()
        value = json.loads(text) if ending == "json" else text or None
    except (ValueError, RecursionError):
        return None
    if ending != "json":
        return value
    return value.get("label") if isinstance(value, Mapping) else None
