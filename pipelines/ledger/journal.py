"""The journal: who computed a stage, when, where and at what cost. A line for each stage that was computed here.

No record holds it, because it differs from run to run. Each line names, by the SHA-256 of its bytes without the line
end, the lines that no other one named before. So the file is a graph of hashes, as commits are: nothing can be changed,
dropped or put in before a line that is known. The order of the lines in the file says nothing, so Git may merge two
journals by keeping the lines of both.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.layout import JOURNAL
from pipelines.project.settings import Section, Text
from pipelines.runtime.console import log_line
from pipelines.runtime.file_lock import held
from pipelines.runtime.stage import StageResult

RECORDS = ("step.json", "verdict.json", "fit.json", "metrics.json", "split.json")
"""The one file of a stage's output that stands for all of it."""
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _JournalLine(Section):
    """A line of the journal: a stage that was computed."""

    model_config = ConfigDict(extra="ignore")  # what a later version adds is no fault

    stage: Text
    """such as fit@t01"""
    ended: Text
    """when, in ISO 8601, UTC"""
    by: str | None
    """Git's user.name and user.email, else the login name; null where neither is known"""
    host: str
    """name of the machine"""
    machine: str
    """kind of processor"""
    device: str
    """the accelerator, or cpu"""
    seconds: float
    """how long it took"""
    images: int
    """how many images it looked at"""
    peak_memory: int
    """most memory that its process held, in bytes"""
    commit: str | None
    """Git's commit, with a + where tracked files differed from it; null outside of Git"""
    output: Mapping[str, _Sha256]
    """name → hash of the file that stands for what the stage left"""
    previous: Annotated[tuple[_Sha256, ...], Field(strict=False)]
    """hashes of the lines that no line named until then, sorted; none in the first line"""


def keep_cost(
    label: str, arguments: Mapping[str, str | Path], result: StageResult, *, seconds: float
) -> None:
    """Append a line to the journal for a stage that has just ended. A stage never fails for it.

    What came from a cache was computed elsewhere, and a stage that restored its output computed nothing: no line.
    """
    if result.restored:
        return
    out = Path(arguments["out"])
    try:
        _append(
            {
                "stage": label,
                "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "by": _person(),
                "seconds": round(seconds, 2),
                "images": sum(int(row["images"]) for row in result.rows if "images" in row),
                "host": platform.node(),
                "machine": platform.machine(),
                "commit": current_commit(),
                "output": {name: sha256_of(out / name) for name in RECORDS if (out / name).is_file()},
                **_memory(),
            }
        )
    except OSError as error:
        log_line(
            f"warning: {label} is done, but its cost could not be written to {JOURNAL} ({error.strerror})"
        )


def read_journal() -> dict[str, _JournalLine]:
    """Return all lines by their hash, in the order of the file.

    Raises:
        InputError: a line is none of a journal, or one that another line names is missing.
    """
    lines: dict[str, _JournalLine] = {}
    for number, data in enumerate(_lines_of(_content()), start=1):
        try:
            lines[_hash_of(data)] = _JournalLine.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "JSON"
            raise InputError(
                f"{JOURNAL}: line {number} is none of a journal ({where}: {first['msg']}); restore the file from "
                "version control"
            ) from None
    for line in lines.values():
        missing = [name for name in line.previous if name not in lines]
        if missing:
            raise InputError(
                f"{JOURNAL}: {line.stage} of {line.ended} names a line before it that was changed or is missing "
                f"({missing[0][:12]}); restore the file from version control"
            )
    return lines


def heads_of(lines: Mapping[str, _JournalLine]) -> list[str]:
    """Return the hashes of the lines that no other names, sorted: together they stand for the whole journal."""
    return sorted(lines.keys() - {name for line in lines.values() for name in line.previous})


def joined(first: bytes, second: bytes) -> bytes:
    """Return the journal that has the lines of both, each once: those of `first` as they stand, then the others."""
    lines = dict.fromkeys([*_lines_of(first), *_lines_of(second)])
    return b"".join(line + b"\n" for line in lines)


def _append(entry: Mapping[str, Any]) -> None:
    """Write a line in one piece, behind all that others have written. What a kill has cut off is removed."""
    with held(JOURNAL) as file:
        content = _content()
        lines = list(_lines_of(content))
        named = {name for line in lines for name in _named_by(line)}
        whole = {**entry, "previous": sorted({_hash_of(line) for line in lines} - named)}
        text = json.dumps(whole, sort_keys=True, ensure_ascii=False).encode() + b"\n"
        end = content.rfind(b"\n") + 1
        if content[end:] in lines[-1:]:  # whole but for its line end, which an editor took
            text = b"\n" + text
        else:
            file.truncate(end)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _content() -> bytes:
    """Return the file's bytes: none where there is no journal yet."""
    try:
        return JOURNAL.read_bytes()
    except FileNotFoundError:
        return b""


def _lines_of(content: bytes) -> Iterator[bytes]:
    """Yield the lines, but for one that was cut off at the end of the file."""
    *lines, last = content.split(b"\n")
    yield from (line for line in lines if line)
    if last and _parsed(last) is not None:
        yield last


def _hash_of(line: bytes) -> str:
    """Return what a line is named by."""
    return hashlib.sha256(line).hexdigest()


def _named_by(line: bytes) -> Iterable[str]:
    """Return the lines that a line names: none where it is damaged."""
    named = (_parsed(line) or {}).get("previous")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds. None where it is no JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _person() -> str | None:
    """Return who works here, as Git knows them, else by the login name. None where neither is known."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "config", "--null", "--get-regexp", r"^user\.(name|email)$"]
        done = subprocess.run(asked, capture_output=True, timeout=20)
        for entry in done.stdout.decode(errors="replace").split("\0"):
            key, _, value = entry.partition("\n")
            found[key] = value.strip()
    name, email = (found.get(f"user.{key}", "") for key in ("name", "email"))
    if name or email:
        return f"{name} <{email}>".strip() if email else name
    with contextlib.suppress(OSError, KeyError):  # a user id without a name
        return getpass.getuser()
    return None


def current_commit() -> str | None:
    """Return the commit that is checked out, with a + where tracked files differ from it. None outside of git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.stdout.strip() or None
    return None


def _memory() -> dict[str, Any]:
    """Return the device and the peak of memory so far, in bytes, of this process and of its accelerator."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, Any] = {"device": "cpu", "peak_memory": kib * (1 if sys.platform == "darwin" else 1024)}
    torch = sys.modules.get("torch")  # a stage that did not need it has used no accelerator
    if torch is not None and torch.cuda.is_available():
        found |= {
            "device": torch.cuda.get_device_name(),
            "peak_device_memory": torch.cuda.max_memory_allocated(),
        }
    return found
