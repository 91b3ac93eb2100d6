"""What a DVC project holds: its stages, its outputs, its cache and its remotes, from which objects can be deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pipelines.project.layout import DVC_YAML, PARAMS
from pipelines.project.yaml_text import read_text, read_yaml, value_at
from pipelines.versioning.dvc_failures import dvc_errors
from pipelines.versioning.patches import apply_patches
from pipelines.versioning.plan import needs_of


@dataclass(frozen=True)
class DeclaredStage:
    """A stage as dvc.yaml declares it."""

    name: str
    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: tuple[Mapping[str, Any], ...]
    """The values that it reads from params.yaml."""
    needs: frozenset[str]
    """The stages whose outputs it reads."""


@dataclass(frozen=True)
class _DvcProject:
    """What DVC knows of a project that needs no hashing."""

    stages: tuple[DeclaredStage, ...]
    cache: Path
    """The folder of the cache, the run-cache in it."""
    remotes: Mapping[str, str]
    """Name and address of every remote."""


def read_dvc_project(root: Path) -> _DvcProject:
    """Read the DVC project in a folder."""
    from dvc.repo import Repo

    apply_patches()
    # DVC names stages relative to the working directory.
    with contextlib.chdir(root), dvc_errors(), contextlib.closing(Repo()) as repo:
        stages = repo.stage.load_all(str(DVC_YAML))
        needs = needs_of(
            {stage.addressing: [out.def_path for out in stage.outs] for stage in stages},
            {stage.addressing: [dep.def_path for dep in stage.deps] for stage in stages},
        )
        chosen = read_yaml(read_text(PARAMS), origin=str(PARAMS))
        return _DvcProject(
            stages=tuple(
                DeclaredStage(
                    name=stage.addressing,
                    command=stage.cmd,
                    deps=tuple(dep.def_path for dep in stage.deps),
                    outs=tuple(out.def_path for out in stage.outs),
                    params=tuple(  # DVC itself would read the file anew for each
                        {key: value_at(chosen, tuple(key.split("."))) for key in dep.params}
                        for dep in stage.deps
                        if dep.def_path == str(PARAMS)
                    ),
                    needs=frozenset(needs[stage.addressing]),
                )
                for stage in stages
            ),
            cache=Path(repo.cache.local_cache_dir),
            remotes={name: str(remote["url"]) for name, remote in repo.config["remote"].items()},
        )


def configure_project(folder: Path, *, cache: Path, remotes: Mapping[str, str]) -> None:
    """Have the DVC project in a folder use a cache and remotes, and no Git."""
    from dvc.config import Config

    with dvc_errors(), Config(str(folder / ".dvc")).edit("local") as config:
        config["core"]["no_scm"] = True
        config["cache"]["dir"] = str(cache)
        for name, url in remotes.items():
            config["remote"].setdefault(name, {})["url"] = url


@dataclass(frozen=True)
class _TrackedOutput:
    """A file or folder that DVC keeps: an output of a stage, or data added by hand."""

    path: str
    md5: str | None
    owner: str
    """The file in which DVC has noted it."""
    is_data: bool
    """Whether no stage makes it."""
    _out: Any = field(repr=False)

    def files(self) -> dict[str, str]:
        """Return its files by path with their md5, as far as DVC holds the listing."""
        obj = self._out.get_obj() if self._out.hash_info else None
        if obj is None:
            return {}
        if not self._out.is_dir_checksum:
            return {self.path: self._out.hash_info.value}
        return {"/".join((self.path, *parts)): info.value for parts, _, info in obj}

    def objects(self) -> set[str]:
        """Return the md5 of every object that it uses."""
        return {info.value for infos in self._out.get_used_objs().values() for info in infos}


@dataclass(frozen=True)
class RemoteStore:
    """A remote of the project. Where it cannot be reached, methods raise whatever its kind of storage raises."""

    name: str
    protocol: str
    folder: str
    """Where it is, without the part that DVC adds."""
    _odb: Any = field(repr=False)
    _legacy: Any = field(repr=False)
    """The same place as DVC addresses the run-cache in it."""

    def held(self, objects: Iterable[str]) -> list[str]:
        """Return which of some objects it has."""
        asked = sorted(objects)
        return list(self._odb.list_oids_exists(asked)) if asked else []

    def delete(self, objects: Iterable[str], runs: Iterable[PurePath]) -> None:
        """Delete objects that it has, and the entries of the run-cache at some paths within that, where it has them."""
        from dvc_data.hashfile.db import get_index

        entries = [self._legacy.fs.join(self._legacy.path, "runs", *path.parts) for path in runs]
        doomed = [self._odb.oid_to_path(md5) for md5 in objects]
        doomed += [path for path in entries if self._legacy.fs.exists(path)]
        if doomed:
            self._odb.fs.remove(doomed)
            get_index(self._odb).clear()


@dataclass(frozen=True)
class Stores:
    """Where a project keeps its objects."""

    cache: Path
    """The folder of the cache's objects."""
    runs: Path
    """The folder of the run-cache."""
    remotes: Mapping[str, RemoteStore]
    shares: bool
    """Whether a remote is the default one, to which outputs are pushed."""
    _repo: Any = field(repr=False)

    def outputs(self) -> list[_TrackedOutput]:
        """Return all that the project keeps in DVC."""
        return [
            _TrackedOutput(
                path=out.def_path,
                md5=out.hash_info.value if out.hash_info else None,
                owner=out.stage.relpath,
                is_data=out.stage.is_data_source,
                _out=out,
            )
            for out in self._repo.index.outs
        ]

    def object_path(self, md5: str) -> Path:
        """Return where the cache has an object, if it has it."""
        return self.cache / md5[:2] / md5[2:]


@contextlib.contextmanager
def open_stores() -> Iterator[Stores]:
    """Open the stores of the project in this folder."""
    with dvc_errors():
        from dvc.repo import Repo

        with contextlib.closing(Repo()) as repo:
            yield Stores(
                cache=Path(repo.cache.local.path),
                runs=Path(repo.stage_cache.cache_dir),
                remotes={name: _remote(repo, name) for name in sorted(repo.config["remote"])},
                shares=bool(repo.config["core"].get("remote")),
                _repo=repo,
            )


def _remote(repo: Any, name: str) -> RemoteStore:  # noqa: ANN401 - of DVC, which ships no types
    odb = repo.cloud.get_remote_odb(name, "retire")
    legacy = repo.cloud.get_remote_odb(name, "retire", hash_name="md5-dos2unix")
    protocol = odb.fs.protocol
    return RemoteStore(
        name=name,
        protocol=protocol if isinstance(protocol, str) else protocol[0],
        folder=odb.path.removesuffix("/files/md5"),
        _odb=odb,
        _legacy=legacy,
    )
