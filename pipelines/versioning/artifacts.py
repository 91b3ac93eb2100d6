"""Where the outputs of the chain are, in the workspace or in DVC's cache, and what dvc.lock says of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipelines.project.errors import FaultError, InputError
from pipelines.project.files import read_json
from pipelines.project.layout import LOCK, PARAMS, StageName
from pipelines.project.params import Params
from pipelines.project.schemas import RecordedFiles
from pipelines.project.settings import Fetch
from pipelines.project.yaml_text import read_lock_file
from pipelines.runtime.earlier_outputs import Find
from pipelines.versioning.file_hashes import FileHashes, md5_of

if TYPE_CHECKING:
    from dvc.ignore import DvcIgnoreFilter


@dataclass(frozen=True)
class Lock:
    """What dvc.lock says."""

    outs: Mapping[str, str]
    """Path → md5, of every output of every stage."""
    made: Mapping[str, Sequence[str]]
    """Stage → the paths of its outputs."""
    deps: Mapping[str, Mapping[str, str]]
    """Stage → path → md5 of what it read."""
    commands: Mapping[str, str]
    """Stage → the command line that made its outputs: that of dvc.yaml, with the task filled in."""
    parameters: Mapping[str, Mapping[str, Any]]
    """Stage → what it read of params.yaml, by dotted key."""


def read_lock(params: Params) -> Lock:
    """Read what dvc.lock says of the stages that there are. An `InputError` where there is none."""
    if not LOCK.is_file():
        raise InputError(f"{LOCK}: the file is missing; run `sdlora run`, or restore it from version control")
    items = {*params.tasks, *(name for name in Fetch.names() if params.fetch.entry(name) is not None)}
    try:
        stages = {
            name: stage
            for name, stage in read_lock_file(LOCK)["stages"].items()
            if StageName.parse(name).item in (None, *items)  # DVC keeps those of removed tasks
        }
        outs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
        made = {name: [out["path"] for out in stage.get("outs", [])] for name, stage in stages.items()}
        deps = {
            name: {dep["path"]: dep["md5"] for dep in stage.get("deps", []) if "md5" in dep}
            for name, stage in stages.items()
        }
        commands = {name: str(stage["cmd"]) for name, stage in stages.items()}
        parameters = {
            name: dict(stage.get("params", {}).get(str(PARAMS), {})) for name, stage in stages.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{LOCK}: not what DVC writes; restore it from version control") from None
    return Lock(outs, made, deps, commands, parameters)


class ObjectStore:
    """Files by their md5: those of DVC's cache, and those of its remote, each fetched into a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    @cached_property
    def _stores(self) -> tuple[Path, Any]:
        """The folder of the cache, and the remote. Asked for at first use, because loading DVC takes a while."""
        from dvc.repo import Repo

        with contextlib.closing(Repo()) as repo:
            remote = repo.cloud.get_remote_odb() if repo.config["core"].get("remote") else None
            return Path(repo.cache.local.path), remote

    def find(self, md5: str) -> Path | None:
        """Return where the file of a hash can be read. None where neither the cache nor the remote has it."""
        cache, remote = self._stores
        path = cache / md5[:2] / md5[2:]
        if path.is_file():
            return path
        copy = self._scratch / md5
        if remote is not None and not copy.exists():
            with contextlib.suppress(FileNotFoundError):
                remote.fs.get_file(remote.oid_to_path(md5), str(copy))
        return copy if copy.is_file() else None


class ArtifactStore:
    """Outputs by path: in the workspace, or else in DVC's cache or remote, as links in a scratch folder."""

    def __init__(self, lock: Lock, scratch: Path, hashes: FileHashes | None = None) -> None:
        self.lock = lock
        self.hashes = hashes or FileHashes()
        self._scratch = scratch / "outs"
        (scratch / "objects").mkdir()
        self._objects = ObjectStore(scratch / "objects")
        self._checked: dict[str, Mapping[str, str]] = {}
        self._here: dict[str, str | None] = {}

    def checked(self, path: str) -> bool:
        """Return whether an output has been compared with dvc.lock."""
        return path in self._checked

    def mark(self, path: str, hashes: Mapping[str, str]) -> None:
        """Note that an output has been compared. The md5 of its files by name."""
        self._checked[path] = hashes

    def md5(self, path: str) -> str | None:
        """Return the md5 of a file or folder within a compared output. None for what is in none."""
        for folder in PurePosixPath(path).parents:
            if (hashes := self._checked.get(out := folder.as_posix())) is not None:
                part = path.removeprefix(f"{out}/")
                within = {
                    name.removeprefix(f"{part}/"): md5
                    for name, md5 in hashes.items()
                    if name.startswith(f"{part}/")
                }
                return hashes.get(part) or (folder_md5(within) if within else None)
        return self.lock.outs.get(path) or self._md5_of_parts(path)

    def _md5_of_parts(self, path: str) -> str | None:
        """Return the md5 of a folder of outputs. None where not all of them were compared."""
        outs = [out for out in self.lock.outs if out.startswith(f"{path}/")]
        if not outs or not all(self.checked(out) for out in outs):
            return None
        hashes = {f"{out}/{name}": md5 for out in outs for name, md5 in self._checked[out].items()}
        return folder_md5({name.removeprefix(f"{path}/"): md5 for name, md5 in hashes.items()})

    def workspace_md5(self, path: str) -> str | None:
        """Return the md5 of what no stage made, as it lies in the workspace. None where it is not there."""
        if path not in self._here:
            self._here[path] = self._md5_here(Path(path))
        return self._here[path]

    def _md5_here(self, path: Path) -> str | None:
        """Return DVC's hash of a file or folder in the workspace, from all bytes of it. None where there is none."""
        if not path.is_dir():
            return self.hashes.md5(path) if path.is_file() else None
        from dvc.fs import LocalFileSystem

        root = path.absolute()
        places = self._ignored.walk(LocalFileSystem(), str(root))
        names = [f"{place}/{name}"[len(str(root)) + 1 :] for place, _, names in places for name in names]
        return folder_md5({name: self.hashes.md5(path / name) for name in names})

    @cached_property
    def _ignored(self) -> DvcIgnoreFilter:
        """What DVC leaves out of the folders that it hashes."""
        from dvc.repo import Repo

        with contextlib.closing(Repo()) as repo:
            return repo.dvcignore

    def find(self, path: Path) -> Path:
        """Return where an output can be read."""
        return path if path.exists() else self.linked(path)

    def linked(self, path: Path) -> Path:
        """Return links to an output in DVC's cache, or in its remote."""
        md5 = self.lock.outs.get(path.as_posix())
        if md5 is None:
            raise FaultError(f"{path}: it is missing, and {LOCK} does not know it; run `sdlora run`")
        copy = self._scratch / path
        if not copy.exists():
            for name, file in self._cached(path, md5).items():
                target = copy / name if name else copy
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.resolve())
        return copy

    def changed_file(self, path: str, hashes: Mapping[str, str]) -> str:
        """Return the first file of an output that is not the one it was, as far as DVC's cache can say. Else the
        output.
        """
        md5 = self.lock.outs[path]
        listing = self._objects.find(md5)
        if listing is None or not md5.endswith(".dir") or _md5_of_listing(listing) != md5:
            return path
        made = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_bytes())}
        differing = [name for name in sorted(made.keys() | hashes) if made.get(name) != hashes.get(name)]
        return f"{path}/{differing[0]}"

    def _cached(self, path: Path, md5: str) -> dict[str, Path]:
        """Return the files of an output in the cache by name. One without a name if it is a file."""
        whole = self._objects.find(md5)
        if whole is None:
            raise FaultError(f"{path}: it is neither here nor in DVC's cache or remote; run `sdlora run`")
        if not md5.endswith(".dir"):
            return {"": whole}
        if _md5_of_listing(whole) != md5:
            raise FaultError(f"{path}: DVC's cache has another listing of its files than {LOCK} names")
        found = {}
        for entry in json.loads(whole.read_bytes()):
            if ".." in entry["relpath"].split("/") or entry["relpath"].startswith("/"):
                raise FaultError(f"{path}: DVC's listing of its files leads out of it: {entry['relpath']!r}")
            file = self._objects.find(entry["md5"])
            if file is None:
                raise FaultError(
                    f"{path}/{entry['relpath']}: it is neither here nor in DVC's cache or remote; run `sdlora run`"
                )
            found[entry["relpath"]] = file
        return found


@contextlib.contextmanager
def whole_outputs(folder: Path, record: str) -> Iterator[Find]:
    """Give a function that returns where an output beside `folder` can be read, by name and with all of its files.

    A folder that lacks a file that its record names, or all of them (DVC brings what a stage depends on, and that is
    the record), is read from DVC's cache or remote. Links to it last as long as this context.

    Args:
        folder: One of the outputs.
        record: Name of the record in each: it names all files of its folder.
    """
    with contextlib.ExitStack() as stack:
        store: list[ArtifactStore] = []

        @cache  # who reads a chain asks for each file, and a record is read to see that its folder is whole
        def found(name: str) -> Path:
            path = folder.parent / name
            if _is_whole(path, record) or not LOCK.is_file():
                return path
            if not store:
                scratch = stack.enter_context(TemporaryDirectory(prefix="sdlora-earlier-"))
                store.append(ArtifactStore(read_lock(Params.load()), Path(scratch)))
            try:
                return store[0].linked(path)
            except FaultError as fault:
                raise InputError(str(fault)) from None

        yield found


def _is_whole(folder: Path, record: str) -> bool:
    """Return whether a folder has its record, and every file that this names."""
    path = folder / record
    return path.is_file() and all(
        (folder / file).is_file() for file in read_json(path, RecordedFiles).get("files", {})
    )


def _md5_of_listing(path: Path) -> str:
    """Return what DVC names its listing of a folder by. Empty where there is none."""
    return f"{md5_of(path)}.dir" if path.is_file() else ""


def folder_md5(hashes: Mapping[str, str]) -> str:
    """DVC's hash of a folder of files by name and md5."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for name, md5 in hashes.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
    return f"{hashlib.md5(tree.as_bytes(), usedforsecurity=False).hexdigest()}.dir"
