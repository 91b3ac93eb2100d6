"""All of DVC that the patches replace or rely on, by name and parameters, as it is in the versions tested with."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

_OLDEST, _NEWEST = (3, 66), (3, 67)
"""The versions of DVC that the patches were tested with, whatever their last number."""

_HASHING = (
    # Replaced.
    "dvc.output:Output._build(self, *args, no_progress_bar, **kwargs)",
    "dvc.stage:run_stage(stage, dry, force, run_env, **kwargs)",
    "dvc.stage.run:run_stage(stage, dry, force, run_env, **kwargs)",
    "dvc.stage:Stage.save(self, allow_missing, run_cache)",
    # Relied on.
    "dvc.output:Output.IS_DEPENDENCY",
    "dvc.output:Output.cache",
    "dvc.output:Output.__init__.hash_name",
    "dvc.output:Output.__init__.use_cache",
    "dvc.output:Output.dvcignore",
    "dvc.output:Output.local_cache",
    "dvc_objects.fs.base:FileSystem.__init__.hash_jobs",
    "dvc.ui:ui.progress(*args, **kwargs)",
    "dvc_data.fsutils:_localfs_info(path)",
    "dvc_data.hashfile.build:_build_files(root, file_infos, fs, name, odb, callback, upload_odb, dry_run, jobs, "
    "large_file_threshold)",
    "dvc_data.hashfile.build:_get_staging(odb)",
    "dvc_data.hashfile.tree:Tree.add(self, key, meta, oid)",
    "dvc_data.hashfile.tree:Tree.digest(self, with_meta, name)",
)
_LOCKFILE = (
    # Replaced.
    "dvc.dvcfile:Lockfile(repo, path, verify, **kwargs)",
    "dvc.dvcfile:Lockfile._load_yaml(self, **kwargs)",
    "dvc.dvcfile:Lockfile.dump_stages(self, stages, **kwargs)",
    # Relied on.
    "dvc.dvcfile:Lockfile.SCHEMA",
    "dvc.dvcfile:Lockfile.__init__.path",
    "dvc.dvcfile:Lockfile.__init__.repo",
    "dvc.dvcfile:Lockfile.relpath",
    "dvc.dvcfile:logger",
    "dvc.stage.serialize:to_lockfile(stage, **kwargs)",
    "dvc.utils.serialize:dumps_yaml(d)",
    "dvc.utils.serialize:parse_yaml(text, path, typ)",
)
_RUNCACHE = (
    # Replaced.
    "dvc.stage.cache:StageCache._load_cache(self, key, value)",
    "dvc.stage.cache:StageCache._load(self, stage)",
    "dvc.stage.cache:StageCache.transfer(self, from_odb, to_odb, force)",
    # Relied on.
    "dvc.stage.cache:RunCacheNotSupported",
    "dvc.stage.cache:StageCache._get_cache_dir(self, key)",
    "dvc.stage.cache:StageCache._get_cache_path(self, key, value)",
    "dvc.stage.cache:_get_cache_hash(cache, key)",
    "dvc.stage.cache:_get_stage_hash(stage)",
    "dvc_objects.fs.generic:copy(from_fs, from_path, to_fs, to_path, callback, batch_size, on_error)",
    "dvc_objects.fs.base:FileSystem.fs",
    "dvc_objects.fs.utils:as_atomic(fs, to_info, create_parents)",
)
_LOOKUP = (
    *_HASHING,  # its look at all stages hashes as that patch does
    # Replaced.
    "dvc.dependency.param:dpath.get(obj, glob, separator, default)",
    "dvc.dependency.param:dpath.search(obj, glob, yielded, separator, afilter, dirs)",
    "dvc.dependency.param:load_path(fs_path, fs, **kwargs)",
    "dvc.output:Output.get_hash(self)",
    # Relied on.
    "dvc.repo:Repo.tmp_dir",
    "dvc.rwlock:rwlock(tmp_dir, fs, cmd, read, write, hardlink)",
    "dvc.stage:Stage.status.__wrapped__(self, check_updates, filter_info)",
)
PATCHES = {"hashing": _HASHING, "lockfile": _LOCKFILE, "runcache": _RUNCACHE, "lookup": _LOOKUP}
"""Patch, a module beside this one → what it needs of DVC.

Written as `module:name(parameters)`, `module:name` where parameters do not matter, and `module:Class.__init__.name`
for an attribute that is set there.
"""


def unknown_version() -> str | None:
    """Return the version of DVC, if the patches were not tested with it."""
    from dvc import __version__ as version

    number = re.match(r"(\d+)\.(\d+)(?:\.|$)", version)
    return None if number and _OLDEST <= (int(number[1]), int(number[2])) <= _NEWEST else version


def unknown_of(names: Iterable[str]) -> list[str]:
    """Return those of some names, written as in `PATCHES`, that are not there or take other parameters."""
    return [_shown(name) for name in names if not _is_known(name)]


def _is_known(name: str) -> bool:
    path, parenthesis, _ = name.partition("(")
    module, _, parts = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in parts.split("."):
            found = _attribute(found, part)
    except (ImportError, AttributeError):
        return False
    if not parenthesis:
        return True
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return False
    return name == f"{path}({', '.join(map(_written, parameters))})"


def _attribute(owner: Any, name: str) -> Any:  # noqa: ANN401 - any object of DVC's
    """Return an attribute. Of a constructor, whether it sets one is all that can be seen."""
    if inspect.isfunction(owner) and name in owner.__code__.co_names:
        return name
    return getattr(owner, name)


def _written(parameter: inspect.Parameter) -> str:
    stars = "*" * (parameter.kind == parameter.VAR_POSITIONAL) + "**" * (
        parameter.kind == parameter.VAR_KEYWORD
    )
    return stars + parameter.name


def _shown(name: str) -> str:
    path, _, _ = name.partition("(")
    return path.replace(":", ".")
