"""A project for one chain of a sweep, made from the project that sweeps: same code, same images, same caches."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, whole_folder, write_json, write_whole
from pipelines.project.layout import (
    DECODED,
    DOWNLOADS,
    DVC,
    DVC_YAML,
    PARAMS,
    PINNED,
    SCRATCH,
    SWEEPS,
    TURNS,
    StageName,
)
from pipelines.project.params import Params
from pipelines.runtime.file_lock import held
from pipelines.sweeps.grid import checked_name
from pipelines.versioning.stores import DeclaredStage, configure_project, read_dvc_project

_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.partial")


@dataclass(frozen=True)
class Project:
    """What all chains of a sweep share."""

    root: Path
    code: str
    """Hash of the code that the stages name, and of dvc.yaml."""
    paths: list[Path]
    """Where in the project that is."""
    snapshot: Path
    """A copy of that code: a chain goes on with it whatever is edited meanwhile."""
    cache: Path
    """DVC's cache, which holds the run-cache too."""
    remotes: Mapping[str, str]
    """Name and address of every DVC remote."""


@dataclass(frozen=True)
class Workspace:
    """Where a chain is computed."""

    folder: Path
    fits: str
    """The same for chains of which every fit is the same."""


def read_project() -> Project:
    """Take a snapshot of the project in this folder."""
    root = Path.cwd()
    project = read_dvc_project(root)
    paths = _code_of(project.stages, Params.load())
    code = _hash_of_files(paths)
    snapshot = root / SWEEPS / ".code" / code[:16]
    with held(root / SWEEPS / ".lock"):
        if not snapshot.is_dir():
            with whole_folder(snapshot) as folder:
                for path in paths:
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    if path.is_dir():
                        shutil.copytree(path, folder / path, ignore=_LEFT_OUT)
                    else:
                        shutil.copy(path, folder / path)
    return Project(root, code, paths, snapshot, project.cache, project.remotes)


def _code_of(stages: Iterable[DeclaredStage], params: Params) -> list[Path]:
    """Return what stages read that no stage makes and that is no images: dvc.yaml, modules as whole packages, other
    files.
    """
    outs = [PurePath(out) for stage in stages for out in stage.outs]
    sources = [PurePath(task.source) for task in params.tasks.values()]
    found = {DVC_YAML}
    for dep in (dep for stage in stages for dep in stage.deps):
        path = Path(dep)
        if path == PARAMS or any(path.is_relative_to(place) for place in (*outs, *sources)):
            continue
        if any(place.is_relative_to(path) for place in outs):  # a folder of what other stages make
            continue
        found.add(Path(path.parts[0]) if Path(path.parts[0], "__init__.py").is_file() else path)
    return sorted(found)


def _hash_of_files(paths: list[Path]) -> str:
    """SHA-256 over the names and bytes of files, and of all files of folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".partial":
                digest.update(f"{file.as_posix()}\n{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def make_workspace(project: Project, sweep: str, chain: str, text: str) -> Workspace:
    """Make the workspace of a chain, or bring it to what it should be. What it has computed stays.

    Args:
        project: What the chains of the sweep share.
        sweep: Name of the sweep.
        chain: Name of the chain.
        text: Its params.yaml.

    Returns:
        The workspace in `.sdlora/sweeps/SWEEP/CHAIN`: a DVC project without Git.
    """
    folder = project.root / SWEEPS / checked_name(sweep) / checked_name(chain)
    params = Params.parse(text, origin=str(PARAMS))
    given = _read_from_project(params)
    (folder / DVC).mkdir(parents=True, exist_ok=True)
    (folder / SCRATCH).mkdir(exist_ok=True)
    for code in project.paths:
        if code != DVC_YAML:
            _link(folder / code, project.snapshot / code)
    write_whole(folder / DVC_YAML, (project.snapshot / DVC_YAML).read_bytes())
    write_whole(folder / PARAMS, text.encode())
    write_whole(folder / ".dvcignore", _bytes(project.root / ".dvcignore"))
    _configure(folder, project)
    stages = read_dvc_project(folder).stages
    made = [PurePath(out) for stage in stages for out in stage.outs]
    keys = _stage_keys(stages)
    for out in made:
        if (folder / out).is_symlink():  # to images that no stage made before
            (folder / out).unlink()
    for path in sorted(given):
        inside = any((folder / place).is_symlink() for place in path.parents)
        if not inside and not any(path.is_relative_to(out) for out in made):
            _link(folder / path, project.root / path)
    for shared in (DOWNLOADS, PINNED, DECODED):
        (project.root / shared).mkdir(parents=True, exist_ok=True)
        _link(folder / shared, project.root / shared)
    write_json(folder / TURNS, {"folder": str(project.root / SWEEPS / ".turns"), "stages": keys})
    return Workspace(folder, fits=keys.get(str(StageName("fit", list(params.tasks)[-1])), chain))


def with_code(project: Project) -> dict[str, str]:
    """Environment variables with which a process runs the code of the snapshot."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(project.snapshot), *([before] if before else [])])}


def _stage_keys(stages: Iterable[DeclaredStage]) -> dict[str, str]:
    """For each stage a hash that equal stages of two chains of the same code share: command, parameters, what it reads.

    Of what it reads, that is the hashes of the stages that make it, so nothing needs to have been computed.
    """
    declared = {stage.name: stage for stage in stages}
    keys: dict[str, str] = {}

    def key(name: str) -> str:
        if name not in keys:
            stage = declared[name]
            parts = [name, stage.command, stage.params, sorted(map(key, stage.needs))]
            text = json.dumps(parts, sort_keys=True)
            keys[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return keys[name]

    return {name: key(name) for name in declared}


def _read_from_project(params: Params) -> set[PurePath]:
    """Return the paths inside the project that params.yaml names: images, weights, archives."""
    named = {task.source for task in params.tasks.values()} | {params.backbone.weights or ""}
    named |= {getattr(params.fetch.entry(name), "archive", None) or "" for name in params.fetch.names()}
    found = {PurePath(path) for path in named if path and not os.path.isabs(path)}
    for path in found:
        if ".." in path.parts:
            raise InputError(
                f"sweep: {path} leads out of the project; put a link to it inside, and name that"
            )
    return found


def _configure(folder: Path, project: Project) -> None:
    """Give a workspace the project's own settings of DVC, its cache and its remotes, without Git."""
    for name in ("config", "config.local"):
        write_whole(folder / DVC / name, _bytes(project.root / DVC / name))
    # A path in the project's own config is relative to that, so the addresses are given anew.
    configure_project(folder, cache=project.cache, remotes=project.remotes)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _link(place: Path, target: Path) -> None:
    """Leave a link at a place, whatever it led to before."""
    if place.is_symlink():
        if place.readlink() == target:
            return
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
