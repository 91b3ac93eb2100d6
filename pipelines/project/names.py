"""The names and paths that params.yaml may hold: for each kind why a text is none, in words that follow the text."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Iterator

from pipelines.project.layout import ARTIFACTS, DVC, LEDGER, PREFECT, RETIRED, SCRATCH

_LONGEST = 4096
"""Bytes of a path, as Linux has them."""
_LONGEST_PART = 255
_OUR_OWN = {str(path) for path in (ARTIFACTS, DVC, LEDGER, PREFECT, SCRATCH)} | {".git"}
"""Folders in which this program, DVC and Git keep what is theirs."""


def is_text(name: str) -> bool:
    """Return whether a name is one line of text: without line ends, control characters and halves of characters.

    Other characters that show nothing, such as joiners and narrow blanks, are part of names in many scripts.
    """
    if name.isascii():  # most are, and this is ten times as fast
        return name.isprintable()
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def line_fault(text: str) -> str | None:
    """Why a text is no line that can be written and read everywhere."""
    return _with_remedy(next(_line_faults(text, _LONGEST), None))


def text_fault(text: str) -> str | None:
    """Why a text is none of lines that can be written and read everywhere."""
    return line_fault(text.replace("\n", " "))


def name_fault(text: str) -> str | None:
    """Why a text is no name."""
    return _with_remedy(next(_line_faults(text, _LONGEST_PART), None))


def path_fault(text: str) -> str | None:
    """Why a text is no path of a file or folder, on whatever machine, or no URL."""
    return _with_remedy(next(_path_faults(text), None))


def source_fault(text: str) -> str | None:
    """Why a text is no folder of images inside the project."""
    return path_fault(text) or next(_source_faults(text), None)


def manifest_fault(text: str) -> str | None:
    """Why a text is no name of a file that lists or holds images, nor a pattern of such names."""
    if fault := name_fault(text):
        return fault
    if not re.fullmatch(r"[^./\\][^/\\]*\.(csv|jsonl|parquet|tar)", text):
        return (
            "is not the name of a .csv, .jsonl, .parquet or .tar file in the source folder; name that file, its "
            "folder being the source"
        )
    return None


def model_fault(text: str) -> str | None:
    """Why a text is no name of a timm model."""
    if fault := name_fault(text):
        return fault
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        return "is no model's name; write glyph_vit, or the name of a timm model with its tag, NAME.TAG"
    return None


def project_fault(text: str) -> str | None:
    """Why a text is no name of a project on a Prefect server."""
    if fault := name_fault(text):
        return fault
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text):
        return "is no name of a project; use lower-case letters, digits and single dashes"
    return None


def branch_fault(text: str) -> str | None:
    """Why a text is no name of a Git branch, or of a remote."""
    if fault := path_fault(text):
        return fault
    parts = text.split("/")
    if (
        not re.fullmatch(r"[A-Za-z0-9_][\w./+-]*", text)
        or ".." in text
        or any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
    ):
        return "is no name as Git has them; use letters, digits and . _ - + /"
    return None


def class_name_fault(name: str) -> str | None:
    """Why a class cannot have this name, which is also its folder's. What to do about it is the caller's to say."""
    if not name.strip() or name != name.strip():
        return "is empty or has blanks at an end"
    if "/" in name or "\\" in name:
        return "has a path separator"
    if name.startswith("."):
        return "starts with a dot, as hidden folders do"
    return next(_line_faults(name, _LONGEST_PART), None)


def _with_remedy(fault: str | None) -> str | None:
    return fault and f"{fault}; write another"


def _line_faults(text: str, longest: int) -> Iterator[str]:
    """Yield what no name may have. Letters of any script may, with the joiners that some need."""
    if not text.strip():
        yield "is empty"
    if not is_text(text):
        yield "has a line break or another control character"
    if "\ufeff" in text:
        yield "has a byte order mark"
    if "${" in text:
        yield "has ${, which DVC would replace by a value"
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > longest:
        yield f"has {size:,} bytes, and at most {longest:,} are allowed"


def _path_faults(text: str) -> Iterator[str]:
    yield from _line_faults(text, _LONGEST)
    if any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_PART for part in text.split("/")):
        yield f"has a part of more than {_LONGEST_PART} bytes, which no file system takes"


def _source_faults(text: str) -> Iterator[str]:
    if posixpath.isabs(text):
        yield "is absolute, which no other machine shares; give a path inside the project (a link will do)"
    clean = posixpath.normpath(text)
    first = clean.split("/")[0]
    if first in ("..", "."):
        yield "is not a folder inside the project; copy or link the images into data/raw"
    if first in _OUR_OWN and not clean.startswith(f"{RETIRED}/"):
        yield f"is in {first}, where no images belong; put them into data/raw"
    if not re.fullmatch(r"[\w./+@%=-]+", text) or text.startswith("-"):
        yield "has characters that a command line would not leave alone; use letters, digits and . _ - + @ % ="
