"""Image files of a source, each with its split and class, and faults that the user has to mend."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.regular_files import regular_bytes

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
_IMAGE_BYTES = 512 * 2**20
"""Size of an image file at most."""


LINE = 300
"""Characters of a line that a person reads, at most."""


def as_line(text: str) -> str:
    """Return a text as a terminal shows it, and not longer than a line: of a longer one the beginning and the end."""
    if not text.isprintable():
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
        )
    return text if len(text) <= LINE else f"{text[: LINE - 120]} … {text[-117:]}"


class Fault(NamedTuple):
    """Something that the user has to mend."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return as_line(f"{self.where}: {self.what}; {self.remedy}")


class Found(NamedTuple):
    """An image file of a source."""

    path: Path
    part: str | None
    """train, validation or test; None where the source does not say"""
    name: str
    """its class"""
    file: str
    """what tells it from others of its class: the file's name, or its path as the manifest has it"""


class Source(NamedTuple):
    """The image files of some classes of a source, and what is wrong with it."""

    images: list[Found]
    faults: list[Fault]


def refuse(faults: Sequence[Fault]) -> None:
    """Refuse what has faults: the first in full, the number of the others."""
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(as_line(f"{faults[0]}{more}"))


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is no part of a source: hidden, or what other programs leave."""
    return name.startswith(".") or name.lower() in _LITTER


def visible(folder: Path) -> list[Path]:
    """Return what a folder holds, hidden files and litter aside. Nothing where there is no folder."""
    return [path for path in folder.iterdir() if not is_litter(path.name)] if folder.is_dir() else []


def holds_folders(folder: Path) -> bool:
    """Return whether a folder holds a visible folder."""
    return any(entry.is_dir() for entry in visible(folder))


def is_text(name: str) -> bool:
    """Return whether a name is one line of text: without line ends, control characters and halves of characters.

    Other characters that show nothing, such as joiners and narrow blanks, are part of names in many scripts.
    """
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def image_bytes(path: Path) -> bytes:
    """Return the bytes of an image file.

    Raises:
        ValueError: it is no regular file, or larger than `_IMAGE_BYTES`.
        OSError: it cannot be read.
    """
    return regular_bytes(path, at_most=_IMAGE_BYTES)


def linked_folder(folder: Path) -> Fault:
    # DVC does not walk into it, so a changed image would not be noticed.
    what = "a link to a folder, in which DVC would not notice a changed image"
    return Fault(str(folder), what, "link the source folder as a whole, or copy the images")


def no_image(where: str) -> Fault:
    return Fault(where, "not an image by its name", f"remove it (known are {' '.join(EXTENSIONS)})")
