"""DVC's hashes of files and folders, found once where DVC finds the same several times over.

A stage that runs has each of its deps hashed six times, and a folder of folders is walked again for each of those
within. The report reads the steps of all tasks, all files of the chain: 23 a task.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from dvc import stage as dvc_stage
from dvc.output import Output
from dvc.stage import Stage
from dvc.stage import run as dvc_run
from dvc.ui import ui
from dvc_data.fsutils import _localfs_info
from dvc_data.hashfile.build import _build_files, _get_staging
from dvc_data.hashfile.meta import Meta
from dvc_data.hashfile.tree import Tree

_Built = tuple[Any, Any, Any]
"""What DVC builds of a path: where its objects are, what is known of it, and the object, a file or a tree."""
_Files = dict[tuple[str, ...], tuple[Any, Any]]
"""The files below a folder: the parts of the path → what is known of it, and its hash."""


class Hashes:
    """What was hashed in a time in which nothing that is hashed changes."""

    def __init__(self) -> None:
        self._built: dict[tuple[str, str], _Built] = {}
        self._folders: dict[str, _Files] = {}

    def of(self, part: Output) -> _Built:
        """Hash what a dep or an out is now. Nothing goes into the cache."""
        key = (part.fs_path, part.hash_name)
        if key not in self._built:
            self._built[key] = self._tree(part) or _build(
                part,
                part.cache if part.use_cache else part.local_cache,
                part.fs_path,
                part.fs,
                part.hash_name,
                ignore=part.dvcignore,
                dry_run=True,
            )
        return self._built[key]

    def _tree(self, part: Output) -> _Built | None:
        """Build the tree of a folder from those of its folders.

        None for what is none, or none that DVC takes without a word.
        """
        local = part.fs.protocol == "local" and part.hash_name == "md5" and part.dvcignore
        if not local or not os.path.isdir(part.fs_path):
            return None
        staging = _get_staging(part.cache if part.use_cache else part.local_cache)
        with ui.progress(unit="file", desc=f"Collecting files and computing hashes in {part}") as bar:
            files = self._files(part, part.fs_path.rstrip(os.sep), staging, bar.as_callback())
        if not files or any(key[-1] == ".dvcignore" for key in files):
            return None
        tree = Tree()
        for key, (meta, found) in files.items():
            tree.add(key, meta, found)
        tree.digest()
        size = sum(meta.size or 0 for meta, _ in files.values())
        return staging, Meta(size=size, nfiles=len(tree), isdir=True), tree

    def _files(self, part: Output, folder: str, staging: Any, callback: Any) -> _Files:  # noqa: ANN401 - DVC has no types
        if folder not in self._folders:
            _, folders, names = next(part.fs.walk(folder), (folder, [], []))
            folders, names = part.dvcignore(folder, folders, names, ignore_subrepos=True)
            infos = {name: _localfs_info(f"{folder}{os.sep}{name}") for name in names}
            callback.set_size((callback.size or 0) + len(infos))
            own = _build_files(
                folder,
                infos,
                part.fs,
                part.hash_name,
                odb=staging,
                callback=callback,
                dry_run=True,
                jobs=part.fs.hash_jobs,
            )
            files: _Files = {(name,): value for name, value in own.items()}
            for name in folders:
                below = f"{folder}{os.sep}{name}"
                if not os.path.islink(below):  # which DVC does not follow
                    within = self._files(part, below, staging, callback)
                    files |= {(name, *key): value for key, value in within.items()}
            self._folders[folder] = files
        return self._folders[folder]


_build, _run_stage, _save = Output._build, dvc_run.run_stage, Stage.save
_looks: list[Hashes] = []
"""The last is of the stage that DVC is about to run, or has run; after the command comes another."""


def use() -> None:
    """Have DVC, in this process, hash each dep once before a stage's command and once after it."""
    Output._build = _build_once
    dvc_stage.run_stage = _in_one_look(_run_stage)
    Stage.save = _in_one_look(_save)


def _build_once(self: Output, *args: Any, **kwargs: Any) -> _Built:  # noqa: ANN401 - DVC's own signature
    if _looks and self.IS_DEPENDENCY and kwargs.get("dry_run"):
        return _looks[-1].of(self)
    return _build(self, *args, **kwargs)


def _in_one_look(work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def within(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        _looks.append(Hashes())
        try:
            return work(*args, **kwargs)
        finally:
            _looks.pop()

    return within
