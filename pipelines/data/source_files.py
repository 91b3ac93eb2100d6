"""Image files of a source, each with its split and class, and faults that the user has to mend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipelines.project.display import as_line
from pipelines.project.errors import InputError
from pipelines.project.regular_files import regular_bytes

SHARDS = (".parquet", ".tar")
"""Endings of files that may hold images."""
EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PARTS = ("train", "validation", "test")
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What people call the parts: the words that the Hugging Face hub knows."""


_LITTER = {
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle", "$recycle.bin"),
    *("system volume information", "lost+found", "folder.htt", "picasa.ini", "zbthumbnail.info"),
}
"""What systems and stores leave beside images, by its name in lower case. All that begins with a dot is of its kind."""
IMAGE_BYTES = 512 * 2**20
"""Size of an image file at most."""


class Fault(NamedTuple):
    """Something that the user has to mend."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return as_line(f"{self.where}: {self.what}; {self.remedy}")


class Entry(NamedTuple):
    """An image as its shard has it."""

    file: str
    """what tells it from others of the shard"""
    label: Any
    part: Any
    """the word of the shard for its part; None where it has none"""
    start: int
    """where it begins: a byte of the shard, or a row"""
    size: int
    """its bytes; 0 where that is not known yet"""


class Shard(Protocol):
    """A file that holds many images."""

    path: Path
    name: str
    """its path in the source, which no two shards share"""
    shown: str
    """what messages call it"""

    def entries(self) -> Iterator[Entry | Fault]:
        """Yield all images, in an order that depends on the bytes of the shard alone, and what is wrong."""

    def hold(self, entry: Entry) -> int:
        """Note that an image may be read. Return its number."""

    def where(self, file: str) -> str:
        """Return what messages call an image, by what tells it from others of the shard."""

    def image(self, number: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            ValueError: the text says why there are none.
            OSError: the shard cannot be read.
        """


class Found(NamedTuple):
    """An image of a source."""

    path: Path
    """its file, or that of its shard"""
    part: str | None
    """train, validation or test; None where the source does not say"""
    name: str
    """its class"""
    file: str
    """what tells it from others of its class: the file's name, its path as the manifest has it, or its shard and its
    place there"""
    shard: Shard | None = None
    """what holds it, where it is no file of its own"""
    number: int = 0
    """its number there"""

    @property
    def shown(self) -> str:
        """What messages call it."""
        if self.shard is None:
            return str(self.path)
        return self.shard.where(self.file.removeprefix(f"{self.shard.name}/"))

    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            ValueError: there are none, or more than `IMAGE_BYTES`.
            OSError: they cannot be read.
        """
        return image_bytes(self.path) if self.shard is None else self.shard.image(self.number)

    def is_of(self, sha256: str) -> bool:
        """Return whether the image file has this hash. One that cannot be read has none."""
        try:
            return hashlib.sha256(self.read()).hexdigest() == sha256
        except (OSError, ValueError):
            return False


class Source(NamedTuple):
    """The images of some classes of a source, and what is wrong with it."""

    images: list[Found]
    faults: list[Fault]


def refuse(faults: Sequence[Fault]) -> None:
    """Refuse what has faults: the first in full, the number of the others."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{faults[0]}{more}")


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is no part of a source: hidden, or what other programs leave."""
    return name.startswith(".") or name.lower() in _LITTER


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds, hidden files and litter aside. Nothing where there is no folder."""
    return [path for path in folder.iterdir() if not is_litter(path.name)] if folder.is_dir() else []


def holds_folders(folder: Path) -> bool:
    """Return whether a folder holds a visible folder."""
    return any(entry.is_dir() for entry in visible(folder))


def image_bytes(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ValueError: it is no regular file, or larger than `IMAGE_BYTES`.
        OSError: it cannot be read.
    """
    return regular_bytes(path, at_most=IMAGE_BYTES)


def linked_folder(folder: Path) -> Fault:
    # DVC does not walk into it, so a changed image would not be noticed.
    what = "a link to a folder, in which DVC would not notice a changed image"
    return Fault(str(folder), what, "link the source folder as a whole, or copy the images")


def no_image(where: str) -> Fault:
    return Fault(where, "not an image by its name", f"remove it (known are {' '.join(EXTENSIONS)})")
