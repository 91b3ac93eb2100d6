"""dvc.lock read and written one stage at a time: DVC reads and writes all of it for each stage that ends.

Of 1000 stages that is 17 seconds each, most of it YAML that did not change. The text is the one that DVC would write,
byte for byte; a file of any other form (an edited one, one with data sets) is left to DVC. What the text of an entry
says is kept on disk by the text's hash, for the next process: YAML of 200 tasks takes 2.5 seconds to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dvc import __version__ as VERSION
from dvc import dvcfile
from dvc.stage import serialize
from dvc.utils.serialize import dumps_yaml, parse_yaml

from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.layout import LOCK_MEMORY
from pipelines.versioning.lock_text import entry_texts, lock_text

MANY_ENTRIES = 20
"""Entries that are new to a process, from which on it looks there, and leaves there what it has read."""

_entries: dict[str, tuple[str, Any]] = {}
"""Text of a stage's entry → name and content, of the lock that was read last."""


class Lockfile(dvcfile.Lockfile):
    """A dvc.lock that knows what it has read before."""

    def _load_yaml(self, **kwargs: Any) -> tuple[Any, str]:  # noqa: ANN401 - DVC's own signature
        entries = None if kwargs.get("round_trip") else read_entries(Path(self.path))
        if entries is None:
            return tuple(super()._load_yaml(**kwargs))
        stages = dict(entries.values())
        return {"schema": "2.0", **({"stages": stages} if stages else {})}, lock_text(entries)

    def dump_stages(self, stages: list[Any], **kwargs: Any) -> None:  # noqa: ANN401
        """Put what stages have become in the place of what they were, or at the end."""
        place = Path(os.path.realpath(self.path))
        entries = read_entries(place)
        if entries is None:
            super().dump_stages(stages, **kwargs)
            return
        texts = {name: text for text, (name, _) in entries.items()}
        for stage in stages:
            content = serialize.to_lockfile(stage, **kwargs)
            texts[stage.name] = dumps_yaml(OrderedDict(stages=content)).removeprefix("stages:\n")
        text = lock_text(texts.values())
        if text != lock_text(entries):
            dvcfile.logger.info("Updating lock file '%s'", self.relpath)
            self.repo.scm_context.track_file(self.relpath)
            write_whole(place, text.encode())


def use() -> None:
    """Have DVC, in this process, read and write dvc.lock in this way."""
    dvcfile.Lockfile = Lockfile


def read_entries(path: Path) -> dict[str, tuple[str, Any]] | None:
    """Text of each entry → name and content, in order. None where the file is none that DVC has written.

    Only what was not there the last time is parsed.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
    texts = entry_texts(text)
    if texts is None:
        return None
    unknown = [part for part in texts if part not in _entries]
    memory = path.parent / LOCK_MEMORY
    if len(unknown) >= MANY_ENTRIES:
        _entries.update(_recalled(memory, unknown))
        unknown = [part for part in unknown if part not in _entries]
    if unknown:
        try:
            parsed = parse_yaml(lock_text(unknown), path)
            dvcfile.Lockfile.SCHEMA(parsed)
        except Exception:  # DVC, which will read it again, says what is wrong in its own words
            return None
        if list(parsed) != ["schema", "stages"] or len(parsed["stages"]) != len(unknown):
            return None
        _entries.update(zip(unknown, parsed["stages"].items(), strict=True))
    found = {part: _entries[part] for part in texts}
    if len({name for name, _ in found.values()}) != len(texts):  # a stage that stands there twice
        return None
    _entries.clear()
    _entries.update(found)
    if len(unknown) >= MANY_ENTRIES:
        keep_entries(memory, found)
    return found


def keep_entries(memory: Path, entries: Mapping[str, tuple[str, Any]]) -> None:
    """Leave entries for the next process, where JSON says what YAML said."""
    known = {"dvc": VERSION, **{_digest(text): list(entry) for text, entry in entries.items()}}
    try:
        data = json.dumps(known)
    except (TypeError, ValueError):
        return
    if memory.parent.is_dir() and json.loads(data) == known:
        with contextlib.suppress(OSError, InputError):
            write_whole(memory, data.encode())


def _recalled(memory: Path, texts: Iterable[str]) -> dict[str, tuple[str, Any]]:
    """Return what an earlier process, of the same DVC, has read in these texts. Nothing where there is no telling."""
    found = {}
    try:
        known = json.loads(memory.read_bytes())
        if known["dvc"] != VERSION:
            return {}
        for text in texts:
            if (key := _digest(text)) in known:
                name, content = known[key]
                if isinstance(content, dict) and text.startswith(f"  {name}:\n"):
                    found[text] = (name, content)
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return found


def _digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
