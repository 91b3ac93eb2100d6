"""DVC's look at stages: params.yaml is read, and a path hashed, once, and not once for each stage.

DVC alone parses params.yaml for every stage, eight times for one that runs, and walks all of it for every key. At a
look at all stages it hashes what five stages read five times, and rewrites a file of locks for each stage. Of 200 tasks
this is most of what a look costs. What is found is what DVC finds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage


def use() -> None:
    """Have DVC, in this process, parse a file of parameters once while it is as it was, and go to a key."""
    from dvc.dependency import param

    def get(content: Any, key: str, separator: str) -> Any:  # noqa: ANN401 - dpath's own signature
        value = content
        for part in key.split(separator):
            if not isinstance(value, dict) or part not in value:
                return dpath.get(content, key, separator=separator)
            value = value[part]
        return value

    def load_once(path: Any, fs: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401 - DVC's own signature
        if getattr(fs, "protocol", "local") != "local" or not os.path.isfile(path):
            return load(path, fs, **kwargs)
        facts = os.stat(path)
        state = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        if read.get(path, (None,))[0] != state:
            read[path] = (state, load(path, fs, **kwargs))
        return read[path][1]

    dpath, load = param.dpath, param.load_path
    read: dict[Any, tuple[Any, Any]] = {}
    param.dpath = SimpleNamespace(get=get, search=dpath.search)
    param.load_path = load_once


def changes_of(repo: Repo, stages: list[DvcStage]) -> dict[str, list[Any]]:
    """Return what `dvc status` finds changed about each stage."""
    with _each_once(), _locked_for_reading(repo, stages):
        return {s.addressing: type(s).status.__wrapped__(s).get(s.addressing, []) for s in stages}


@contextlib.contextmanager
def _each_once() -> Iterator[None]:
    """While stages are looked at, remember every hash."""
    from dvc.output import Output

    from pipelines.versioning.patches.hashing import Hashes

    get_hash, hashes = Output.get_hash, Hashes()

    def hash_once(self: Output) -> Any:  # noqa: ANN401
        return hashes.of(self)[2].hash_info

    Output.get_hash = hash_once
    try:
        yield
    finally:
        Output.get_hash = get_hash


@contextlib.contextmanager
def _locked_for_reading(repo: Repo, stages: list[DvcStage]) -> Iterator[None]:
    """Keep others from writing what the stages read and leave, by one entry in DVC's file of locks."""
    from dvc.rwlock import rwlock

    paths = dict.fromkeys(part.fs_path for stage in stages for part in (*stage.deps, *stage.outs))
    hardlink = repo.config["core"].get("hardlink_lock", False)
    with rwlock(repo.tmp_dir, repo.fs, "sdlora", list(paths), [], hardlink):
        yield
