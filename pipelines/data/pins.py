"""Sources elsewhere: a file of the project that names shards at any fsspec URL, each with the hash of its bytes."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from pipelines.data.source_files import SHARDS, visible
from pipelines.project.display import as_line
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.files import naming, natural_key, sha256_of, write_json
from pipelines.project.layout import PINNED
from pipelines.project.names import is_text
from pipelines.project.schemas import PinnedSource
from pipelines.runtime.file_lock import held
from pipelines.runtime.progress import progress
from sdlora.records import read_bounded_json

PIN = "remote.json"
"""What pins a source: a file at the top of its folder."""
_CHUNK = 2**20
_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(/.*)?")
_HUB_PLACE = "hf://datasets/{name}@{commit}{path}"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def pin(urls: Sequence[str], folder: Path) -> list[str]:
    """Read all shards at some URLs once, and write their names and hashes to a folder. Return lines to print."""
    others = [path for path in visible(folder) if path.name != PIN]
    if others:
        raise InputError(f"{folder}: {others[0].name} stands there; pin a source in a folder of its own")
    path = folder / PIN
    PINNED.mkdir(parents=True, exist_ok=True)
    before = {file["url"]: file for file in _read(path)} if path.is_file() else {}
    found: dict[str, dict[str, Any]] = {}
    for url in urls:
        for name, place in _shards_at(url).items():
            if name in found:
                raise InputError(f"{place}: a second {name}, beside {found[name]['url']}; pin each alone")
            found[name] = {"name": name, "url": place}
    with held(PINNED / "lock"):
        for file in found.values():
            file["sha256"], file["size"] = _bring(file["url"])
    files = sorted(found.values(), key=lambda file: natural_key(file["name"]))
    write_json(path, {"format": 1, "files": files})
    changed = [file["url"] for file in files if before and before.get(file["url"]) != file]
    gone = before.keys() - {file["url"] for file in files}
    size = sum(file["size"] for file in files)
    lines = [f"{path}: {len(files)} {'file' if len(files) == 1 else 'files'}, {size:,} bytes, pinned by hash"]
    if before:
        lines += [as_line(f"changed or new: {url}") for url in changed]
        lines += [as_line(f"no longer there: {url}") for url in sorted(gone)]
        lines += [] if changed or gone else ["nothing has changed since they were pinned"]
    return [*lines, f"add the classes with `sdlora add-task {folder}`, and commit {path}"]


def pinned_shards(path: Path) -> dict[str, tuple[Path, str]]:
    """Return the shards that a pin names, each by its name: where it is here, and its URL.

    What is not here yet is read. An `InputError` where it is not what was pinned.
    """
    found = {}
    PINNED.mkdir(parents=True, exist_ok=True)
    for file in _read(path):
        kept = PINNED / file["sha256"]
        with held(PINNED / "lock"):  # one process reads it, and the others find it
            sha256, size = (file["sha256"], file["size"]) if _is_whole(kept) else _bring(file["url"])
            if sha256 != file["sha256"]:
                raise InputError(
                    f"{file['url']}: it has changed since {path} pinned it ({size:,} bytes of SHA-256 {sha256[:12]}…, "
                    f"pinned were {file['size']:,} of {file['sha256'][:12]}…); bring the old file back, or pin the new "
                    "one with `sdlora pin`"
                )
        found[file["name"]] = (kept, file["url"])
    return found


def is_here(folder: Path) -> bool:
    """Return whether all shards that the pin of a source names are on this machine. True where there is no pin."""
    path = folder / PIN
    return not path.is_file() or all((PINNED / file["sha256"]).is_file() for file in _read(path))


def _is_whole(kept: Path) -> bool:
    """Return whether a shard is here, with the bytes that its name says."""
    if not kept.is_file():
        return False
    facts = kept.stat()
    return _digest(kept, facts.st_size, facts.st_mtime_ns) == kept.name


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file, read once as long as it does not change."""
    return sha256_of(path)


def _read(path: Path) -> Any:  # noqa: ANN401 - a list of `PinnedFile`
    try:
        return read_bounded_json(path, PinnedSource)["files"]
    except ValueError as error:
        raise InputError(f"{error}; write it again with `sdlora pin`") from None


def _shards_at(url: str) -> dict[str, str]:
    """Return the shards at a URL: of a file itself, of a pattern or a folder all that there are. Name → URL."""
    if "://" not in url:
        raise InputError(
            f"{url}: not a URL; give one such as s3://bucket/folder, or use files here as they are"
        )
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme in ("http", "https", "ftp")):
        raise InputError(
            f"{parts.scheme}://…{parts.hostname}: a password in the URL would be kept; use the settings"
        )
    if parts.scheme in ("http", "https"):  # which have no folders
        name = unquote(parts.path).rpartition("/")[2]
        return _named({name: url} if name.endswith(SHARDS) else {}, url)
    url = _at_commit(url)
    fs, place = _file_system(url)
    try:
        if set("*?[") & set(place):
            base = re.split(r"[*?\[]", place)[0].rpartition("/")[0]
            paths = fs.glob(place)
        elif place.endswith(SHARDS):
            base, paths = place.rpartition("/")[0], [place]
        else:
            base, paths = place.rstrip("/"), fs.find(place)
    except Exception as trouble:  # every kind of storage raises its own
        raise _unread(url, trouble) from trouble
    found = {path.removeprefix(base).lstrip("/"): path for path in paths if path.endswith(SHARDS)}
    return _named({name: fs.unstrip_protocol(path) for name, path in found.items()}, url)


def _named(found: dict[str, str], url: str) -> dict[str, str]:
    """Return the shards of a URL. An `InputError` where there is none, or one with a name that is no text."""
    if not found:
        raise InputError(as_line(f"{url}: no file there ends in {' or '.join(SHARDS)}; correct the URL"))
    for name in found:
        if not is_text(name):
            raise InputError(as_line(f"{url}: the name {name!a} has a control character; rename the file"))
    return found


def _at_commit(url: str) -> str:
    """Return the URL of a data set of the hub at the commit that its revision is now. Others as they are."""
    if not url.startswith("hf://"):
        return url
    known = _HUB.fullmatch(url)
    if known is None:
        raise InputError(
            as_line(f"{url}: not a data set of the hub; write hf://datasets/OWNER/NAME@REVISION/PATH")
        )
    name, revision, path = known[1], unquote(known[2] or "main"), known[3] or ""
    if not _COMMIT.fullmatch(revision):
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(name, revision=revision).sha
        except Exception as trouble:  # of the network, of the hub, of its library
            raise _unread(url, trouble) from trouble
        if commit is None or not _COMMIT.fullmatch(commit):
            raise InputError(
                as_line(f"{url}: the hub names no commit of {revision}; write @COMMIT in its place")
            )
        revision = commit
    return _HUB_PLACE.format(name=name, commit=revision, path=path)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as trouble:
        raise InputError(as_line(f"{url}: {one_line(trouble)}; for s3:// install sdlora[s3]")) from None
    except Exception as trouble:  # every kind of storage raises its own
        raise _unread(url, trouble) from trouble


def _bring(url: str) -> tuple[str, int]:
    """Copy a file to `PINNED`, under the hash of what was read. Return the hash and the size."""
    fs, place = _file_system(url)
    partial = PINNED / f".{hashlib.sha256(url.encode()).hexdigest()}.partial"
    try:
        with partial.open("wb") as target:
            sha256, size = _copy(fs, url, place, target)
        partial.replace(PINNED / sha256)
    finally:
        partial.unlink(missing_ok=True)
    return sha256, size


def _copy(fs: Any, url: str, place: str, target: IO[bytes]) -> tuple[str, int]:  # noqa: ANN401 - of fsspec
    digest, done = hashlib.sha256(), 0
    try:
        with fs.open(place, "rb") as file:
            total = getattr(file, "size", None) or 0
            with progress(f"read {url.rpartition('/')[2]}", total=-(-total // _CHUNK), unit="MiB") as bar:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    with naming(Path(target.name)):
                        target.write(chunk)
                    bar.update(-(-done // _CHUNK))
    except Exception as trouble:
        if isinstance(trouble, OSError) and trouble.filename == target.name:
            raise
        raise _unread(url, trouble) from trouble
    return digest.hexdigest(), done


def _unread(url: str, trouble: Exception) -> InputError:
    return InputError(
        as_line(f"{url}: it cannot be read ({one_line(trouble)}); run the same again when it can")
    )
