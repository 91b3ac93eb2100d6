"""DVC's look at all stages at once: params.yaml is read, and a path hashed, once, and not once for each stage.

DVC alone parses params.yaml for every stage, walks all of it for every key, hashes what five stages read five times,
and rewrites a file of locks for each stage; of 200 tasks this is most of what a look costs. What is found is what DVC
finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage as DvcStage


def use() -> None:
    """Have DVC, in this process, find a key of a file of parameters by going there."""
    from dvc.dependency import param

    def get(content: Any, key: str, separator: str) -> Any:  # noqa: ANN401 - dpath's own signature
        value = content
        for part in key.split(separator):
            if not isinstance(value, dict) or part not in value:
                return dpath.get(content, key, separator=separator)
            value = value[part]
        return value

    dpath = param.dpath
    param.dpath = SimpleNamespace(get=get, search=dpath.search)


def changes_of(repo: Repo, stages: list[DvcStage]) -> dict[str, list[Any]]:
    """Return what `dvc status` finds changed about each stage."""
    with _each_once(), _locked_for_reading(repo, stages):
        return {s.addressing: type(s).status.__wrapped__(s).get(s.addressing, []) for s in stages}


@contextlib.contextmanager
def _each_once() -> Iterator[None]:
    """While stages are looked at, remember every file of parameters and every hash."""
    from dvc.dependency import param
    from dvc.output import Output

    from pipelines.versioning.patches.hashing import Hashes

    load, get_hash = param.load_path, Output.get_hash
    contents: dict[Any, Any] = {}
    hashes = Hashes()

    def load_once(path: Any, fs: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401 - DVC's own signature
        key = (path, id(fs))
        if key not in contents:
            contents[key] = load(path, fs, **kwargs)
        return contents[key]

    def hash_once(self: Output) -> Any:  # noqa: ANN401
        return hashes.of(self)[2].hash_info

    param.load_path, Output.get_hash = load_once, hash_once
    try:
        yield
    finally:
        param.load_path, Output.get_hash = load, get_hash


@contextlib.contextmanager
def _locked_for_reading(repo: Repo, stages: list[DvcStage]) -> Iterator[None]:
    """Keep others from writing what the stages read and leave, by one entry in DVC's file of locks."""
    from dvc.rwlock import rwlock

    paths = dict.fromkeys(part.fs_path for stage in stages for part in (*stage.deps, *stage.outs))
    hardlink = repo.config["core"].get("hardlink_lock", False)
    with rwlock(repo.tmp_dir, repo.fs, "sdlora", list(paths), [], hardlink):
        yield
