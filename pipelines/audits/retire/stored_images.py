"""Where the images of a task are stored: in the project, in DVC's cache and in its remotes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipelines.data.packed import read_images
from pipelines.ledger.receipts import RawFile, Receipt
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.layout import RAW
from pipelines.project.params import Params
from pipelines.project.settings import Fetch
from pipelines.versioning.file_hashes import md5_of
from pipelines.versioning.stores import RemoteStore, Stores, open_stores


class Left(NamedTuple):
    """What of the images is still there."""

    raw: list[RawFile]
    packed: bool
    cached: list[str]
    """objects of DVC's cache"""
    stored: Mapping[str, list[str]]
    """remote → its objects"""

    def __bool__(self) -> bool:
        return bool(self.raw or self.packed or self.cached or any(self.stored.values()))


def fetched(receipt: Receipt, params: Params) -> list[str]:
    """Return the data sets of `fetch` that would bring the raw files back."""
    names = [name for name in Fetch.names() if params.fetch.entry(name) is not None]
    return [
        name for name in names if any(is_within(file.path, (RAW / name).as_posix()) for file in receipt.raw)
    ]


def is_within(path: str, folder: str) -> bool:
    """Return whether a path is a folder or in it, by their names."""
    return path == folder or path.startswith(f"{folder}/")


@contextlib.contextmanager
def stores() -> Iterator[Stores]:
    """Open the project's cache and every remote that it names. All of them let their objects be deleted."""
    with open_stores() as held:
        for name, remote in held.remotes.items():
            if remote.protocol == "local" and not Path(remote.folder).is_dir():  # it would look empty
                raise InputError(
                    f"retire: DVC's remote {name}: there is no folder {remote.folder}; mount it, or take the remote "
                    f"out if nothing was ever pushed there (`dvc remote remove {name}`)"
                )
            if remote.protocol in ("http", "https"):
                raise InputError(
                    f"retire: DVC's remote {name} is reached over HTTP, which deletes nothing; have its copies "
                    f"deleted where it is kept, then take it out (`dvc remote remove {name}`)"
                )
        yield held


@dataclass(frozen=True)
class _Listings:
    """What the project holds by name: files that are to go, and objects that must stay."""

    used: set[str]
    listed: set[str]
    """objects under the paths that are to go"""


def _listings(held: Stores, receipt: Receipt) -> _Listings:
    """Return the objects that the outputs of this project use beside those that the receipt is about."""
    gone = {receipt.train.path, *(file.path for file in receipt.raw)}
    used = {md5 for its in receipt.stages.values() for md5 in its.files.values()}
    listed = set()
    for out in held.outputs():
        if not any(is_within(path, out.path) for path in gone):
            used |= out.objects()
            continue
        files = out.files()
        used |= {md5 for path, md5 in files.items() if path not in gone}
        listed |= {md5 for path, md5 in files.items() if path in gone}
        if out.md5 and not gone & files.keys():
            used.add(out.md5)
    return _Listings(used, listed)


def objects_of(receipt: Receipt) -> list[str]:
    """Return the objects in the cache and in any remote that hold the images, packed or not, now or earlier."""
    with stores() as held:
        found = _listings(held, receipt)
        candidates = {receipt.train.md5, *found.listed, *(md5_of(Path(file.path)) for file in receipt.raw)}
        train = Path(receipt.train.path)
        for data in read_images(train)["image"]:
            candidates.add(hashlib.md5(data.as_buffer(), usedforsecurity=False).hexdigest())
        candidates |= set(_packed_earlier(held.cache, {image.sha256 for image in receipt.images}))
        candidates -= found.used
        candidates |= set(_naming_listings(held.cache, candidates)) - found.used
        objects = {md5 for md5 in candidates if held.object_path(md5).exists()}
        for remote in held.remotes.values():
            objects |= set(_stored(remote, candidates))
    return sorted(objects)


def _packed_earlier(cache: Path, images: set[str]) -> Iterator[str]:
    """Files of packed images in the cache that hold one of these, such as what an earlier split left."""
    import pyarrow as pa

    for path in cache.glob("??/*"):
        with path.open("rb") as file:
            if file.read(6) != b"ARROW1":
                continue
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (pa.ArrowException, OSError):
            continue  # damaged, or another kind of Arrow file
        if {"image", "sha256"} <= set(table.column_names) and not images.isdisjoint(
            table["sha256"].to_pylist()
        ):
            yield path.parent.name + path.name


def _naming_listings(cache: Path, objects: set[str]) -> Iterator[str]:
    """Listings of folders in the cache that name one of these objects: without it they are of no use."""
    for path in cache.glob("??/*.dir"):
        if any(its["md5"] in objects for its in json.loads(path.read_bytes())):
            yield path.parent.name + path.name


def left_of(receipt: Receipt) -> Left:
    """Return what of all that the receipt names is still there, and used by nothing else."""
    with stores() as held:
        used = _listings(held, receipt).used
        objects = [md5 for md5 in receipt.objects if md5 not in used]
        return Left(
            raw=[file for file in receipt.raw if is_there(file, receipt)],
            packed=Path(receipt.train.path).exists(),
            cached=[md5 for md5 in objects if held.object_path(md5).exists()],
            stored={name: _stored(remote, objects) for name, remote in held.remotes.items()},
        )


def _stored(remote: RemoteStore, objects: Iterable[str]) -> list[str]:
    """Return which of some objects a remote has. An `InputError` where it does not answer."""
    with answering(remote.name):
        return remote.held(objects)


@contextlib.contextmanager
def answering(name: str) -> Iterator[None]:
    """Make one line of whatever a remote raises that cannot be reached, or lets nobody delete."""
    try:
        yield
    except Exception as trouble:  # every kind of storage raises its own
        raise InputError(
            f"retire: DVC's remote {name} does not let its copies be deleted ({one_line(trouble)}); run the same "
            f"when it does, or take it out (`dvc remote remove {name}`) if it is gone"
        ) from trouble


def is_there(file: RawFile, receipt: Receipt) -> bool:
    """Return whether a file of the source is the one that the receipt names, and really in the source."""
    path = Path(file.path)
    home = Path.cwd().resolve() / path.parent
    if path.parent.resolve() != home or not is_within(file.path, receipt.source):
        return False
    if file.link:
        return path.is_symlink()
    return path.is_file() and not path.is_symlink() and sha256_of(path) == file.sha256
