"""What is remembered of stages that are up to date, so that DVC is asked only about the others.

To resolve a stage and to compare its files takes DVC some ten milliseconds, at every look. Of a stage that it found up
to date it is not asked again while all that it would look at is as it was: what dvc.yaml, params.yaml and dvc.lock say
of the stage, and size and times of its files and of their objects in the cache. DVC too trusts these for a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.files import write_whole
from pipelines.project.fingerprints import source_hash
from pipelines.project.layout import DVC_YAML, LOCK, PARAMS, PLAN_MEMORY, StageName
from pipelines.project.yaml_text import read_text, read_yaml
from pipelines.versioning.lock_text import named_entries
from pipelines.versioning.patches import plain_dvc
from pipelines.versioning.pointers import pointer_of

_READS_MORE = re.compile(r"\bvars\b|\$\{\s*tasks\s*[.\[]")
"""What in dvc.yaml lets a stage read more of params.yaml than is compared here."""
_SETTLED = 2 * 10**9
"""Nanoseconds in which two changes of a file may leave it the same times, on the coarsest file systems."""


@dataclass(frozen=True)
class StageFacts:
    """What DVC says of a stage."""

    outs: list[str]
    deps: list[str]
    needs: list[str]
    """the stages whose outputs it reads"""
    made: bool
    """whether it has been run at some time"""
    reads_code: bool
    code: str | None
    """the md5 of the fingerprint of the code that made it"""
    objects: list[str]
    """the hashes of its outputs in the cache"""
    reads_all_params: bool
    """whether it depends on more of params.yaml than on chosen keys and the entry of its own task"""


@dataclass(frozen=True)
class Setup:
    """What DVC says of the project."""

    remote: bool
    """whether it has a remote"""
    cache: str
    """the folder of the objects in the cache"""
    config: list[str]
    """the files of settings"""
    partial_checkout: bool
    """whether what is in the remote alone is no reason to run a stage"""


@dataclass(frozen=True)
class _Project:
    """What stands in the files of the project's top level."""

    common: str
    """the digest of all that every stage depends on"""
    tasks: Mapping[str, str]
    """task → the digest of its entry, in order"""
    lock: Mapping[str, str]
    """stage → the text of its entry in dvc.lock"""


class PlanMemory:
    """The stages that an earlier look found up to date, and to which nothing has happened since."""

    def __init__(self, *, partial_checkout: bool) -> None:
        """Read what was remembered, and compare it with what is there."""
        self.setup: Setup | None = None
        self.names: list[str] = []
        """All stages at that look, in the order of dvc.yaml."""
        self.stages: dict[str, StageFacts] = {}
        self.signatures: dict[str, str] = {}
        self.is_whole = False
        """Whether these are all stages, so that there is nothing to ask DVC."""
        try:
            saved = json.loads(PLAN_MEMORY.read_bytes())
            setup = Setup(**saved["setup"])
            project = None if plain_dvc() else _read_project(setup)
            if project is None or (project.common, setup.partial_checkout) != (
                saved["common"],
                partial_checkout,
            ):
                return
            look = _Look(project, setup)
            for name, (signature, facts) in saved["stages"].items():
                known = StageFacts(**facts)
                if look.signature(name, known).text == signature:
                    self.stages[name], self.signatures[name] = known, signature
            self.setup, self.names = setup, saved["names"]
            self.is_whole = len(self.stages) == len(self.names) and saved["tasks"] == list(project.tasks)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or of another version
            self.stages, self.is_whole = {}, False


class Watch:
    """Stages while DVC looks at them: what becomes of their files meanwhile is not remembered."""

    def __init__(self, setup: Setup, asked: Mapping[str, StageFacts]) -> None:
        """Take the signatures of the stages about which DVC will be asked."""
        self._setup, self._asked = setup, asked
        self._project = None if plain_dvc() else _read_project(setup)
        look = _Look(self._project, setup) if self._project else None
        self._before = {name: look.signature(name, facts) for name, facts in asked.items()} if look else {}

    def keep(self, names: Sequence[str], current: Iterable[str], memory: PlanMemory) -> None:
        """Remember those that were found up to date, and what was known of others.

        Args:
            names: All stages, in the order of dvc.yaml.
            current: Those of the stages asked about that are up to date.
            memory: What was known before.
        """
        project = _read_project(self._setup) if self._project else None
        if project is None or project != self._project or not PLAN_MEMORY.parent.is_dir():
            return
        look, found = _Look(project, self._setup), {}
        for name in current:
            signature = look.signature(name, self._asked[name])
            if signature == self._before[name] and signature.changed < time.time_ns() - _SETTLED:
                found[name] = [signature.text, asdict(self._asked[name])]
        known = {name: [memory.signatures[name], asdict(facts)] for name, facts in memory.stages.items()}
        saved = {
            "setup": asdict(self._setup),
            "common": project.common,
            "tasks": list(project.tasks),
            "names": list(names),
            "stages": {**known, **found},
        }
        with suppress(OSError, InputError):
            write_whole(PLAN_MEMORY, json.dumps(saved).encode())


def _read_project(setup: Setup) -> _Project | None:
    """Read the files of the top level. None where something is not as this program or DVC writes it."""
    try:
        stages = read_text(DVC_YAML)
        params = read_yaml(read_text(PARAMS), origin=str(PARAMS))
        tasks = params.pop("tasks")
        lock = named_entries(LOCK.read_text(encoding="utf-8"))
        config = [Path(path).read_bytes() if Path(path).is_file() else None for path in setup.config]
    except (InputError, OSError, UnicodeDecodeError, KeyError):
        return None
    if lock is None or not isinstance(tasks, dict) or _READS_MORE.search(stages):
        return None
    settings = sorted(item for item in os.environ.items() if item[0].startswith("DVC_"))
    common = _digest([version("dvc"), source_hash(), stages, params, config, settings])
    return _Project(common, {str(task): _digest(entry) for task, entry in tasks.items()}, lock)


class _Like(NamedTuple):
    """What a file is like, or a folder with all that is in it."""

    text: str
    changed: int
    """when it changed last, in nanoseconds since 1970"""


_GONE = _Like("-", 0)


class _Look:
    """One look at the files of stages: each is looked at once."""

    def __init__(self, project: _Project, setup: Setup) -> None:
        self._project, self._cache = project, Path(setup.cache)
        self._seen: dict[str, _Like] = {}
        self._ignores: dict[str, _Like] = {}

    def signature(self, name: str, facts: StageFacts) -> _Like:
        """Return a digest of all that DVC would look at to say whether a stage is up to date."""
        project, task = self._project, StageName.parse(name).item or ""
        skipped = None if facts.reads_all_params else str(PARAMS)
        files = [self._like(path) for path in (*facts.outs, *facts.deps) if path != skipped]
        files += [self._ignored(os.path.dirname(path)) for path in (*facts.outs, *facts.deps)]
        files += [self._like(str(pointer)) for pointer in self._pointers(facts)]
        said = [
            project.tasks.get(task),
            [project.lock.get(other) for other in (name, *facts.needs)],
            [file.text for file in files],
            [self._stored(md5) for md5 in facts.objects],
        ]
        return _Like(_digest(said), max(file.changed for file in files))

    def _ignored(self, folder: str) -> _Like:
        """Look at the files that say what DVC leaves out of a folder: its own, and those of the folders around it."""
        if folder not in self._ignores:
            own = self._like(os.path.join(folder, ".dvcignore"))
            around = self._ignored(os.path.dirname(folder)) if folder not in ("", "/") else _GONE
            self._ignores[folder] = _Like(f"{around.text} {own.text}", max(around.changed, own.changed))
        return self._ignores[folder]

    def _pointers(self, facts: StageFacts) -> Iterator[Path]:
        """Yield the files by which DVC keeps what a stage has read, where that is gone."""
        for dep in facts.deps:
            if self._like(dep) == _GONE and (pointer := pointer_of(Path(dep))):
                yield pointer

    def _like(self, path: str) -> _Like:
        """Look at a path. DVC follows a link there, and none to a folder further down."""
        return self._within(os.path.realpath(path) if os.path.islink(path) else path)

    def _within(self, path: str) -> _Like:
        if path not in self._seen:
            try:
                facts = os.lstat(path)
                if stat.S_ISLNK(facts.st_mode) and not os.path.isdir(path):
                    facts = os.stat(path)
            except OSError:
                self._seen[path] = _GONE
                return _GONE
            if stat.S_ISDIR(facts.st_mode):
                files = [(name, self._within(f"{path}/{name}")) for name in sorted(os.listdir(path))]
                text = _digest([(name, file.text) for name, file in files])
                changed = max((file.changed for _, file in files), default=0)
            else:
                text = (
                    f"{facts.st_ino} {facts.st_mode} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"
                )
                changed = max(facts.st_mtime_ns, facts.st_ctime_ns)
            self._seen[path] = _Like(text, changed)
        return self._seen[path]

    def _stored(self, md5: str) -> list[str]:
        """Look at an object of the cache, and at those of the files of a folder."""
        objects = [md5]
        if md5.endswith(".dir"):
            with suppress(OSError, ValueError, LookupError, TypeError):
                files = json.loads((self._cache / md5[:2] / md5[2:]).read_bytes())
                objects += [file["md5"] for file in files]
        return [self._object(f"{self._cache}/{each[:2]}/{each[2:]}") for each in objects]

    def _object(self, path: str) -> str:
        if path not in self._seen:
            try:  # without the time of the inode, which every new link to it changes
                facts = os.stat(path)
                text = f"{facts.st_ino} {facts.st_mode} {facts.st_size} {facts.st_mtime_ns}"
                self._seen[path] = _Like(text, 0)
            except OSError:
                self._seen[path] = _GONE
        return self._seen[path].text


def _digest(value: Any) -> str:  # noqa: ANN401 - whatever YAML or JSON can hold
    """Return the SHA-256 of a value as Python writes it, which tells 1 from 1.0 and from '1'."""
    return hashlib.sha256(repr(value).encode()).hexdigest()
