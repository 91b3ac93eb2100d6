"""Checkpoints of a fit in progress, in a folder or at any fsspec URL, under a key that is the hash of its inputs."""

import contextlib
import functools
import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.layout import CHECKPOINTS
from pipelines.runtime.console import log_line

if TYPE_CHECKING:
    from sdlora.training import Snapshot

_T = TypeVar("_T")

_KEPT = 2
"""Checkpoints of one fit that are kept: should the newest be damaged, the one before still serves."""
_FORGOTTEN_AFTER_DAYS = 14
"""A fit's checkpoints are removed when none of them is younger."""
_ABANDONED_AFTER_SECONDS = 3600
"""A half-written checkpoint of this age is what a killed process has left."""
WRITE_WAITS = (1.0, 2.0, 4.0)
"""Seconds between tries to write: training stands still meanwhile, and a lost checkpoint is not a lost fit."""
READ_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between tries to read: hours of training may hang on it."""

KEY = re.compile(r"[0-9a-f]{32}")
NAME = re.compile(r"[0-9]{9}-(?P<checksum>[0-9a-f]{32})\.safetensors")
_PARTIAL = re.compile(NAME.pattern + r"\.[0-9a-f]{32}\.partial")


def input_key(values: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Return the hash of a stage's inputs: its settings, and the names and bytes of its files (code among them)."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        digest.update(f"\n{path.name}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def snapshot_bytes(snapshot: "Snapshot") -> bytes:
    """Return the whole state of a fit as the content of a safetensors file."""
    import torch

    from sdlora.tensors import tensor_bytes

    curve = torch.tensor([list(row) for row in snapshot.curve], dtype=torch.float64).reshape(-1, 5)
    return tensor_bytes({**snapshot.tensors, "curve": curve, "step": torch.tensor(snapshot.step)})


def read_snapshot(data: bytes) -> "Snapshot":
    """Return the state of a fit that `snapshot_bytes` has written."""
    import safetensors.torch

    from sdlora.fit_folder import EpochRecord
    from sdlora.training import Snapshot

    tensors = safetensors.torch.load(data)
    curve = [EpochRecord(int(s), int(e), *rest) for s, e, *rest in tensors.pop("curve").tolist()]
    return Snapshot(step=int(tensors.pop("step")), tensors=tensors, curve=curve)


class CheckpointStore:
    """The checkpoints of one fit. A file's name holds its step and its checksum, so one file is one whole state.

    Several processes may work at the fit of one key: the state after a step is the same for all, so what they write
    under one name is the same too, and nobody relies on a file that was there a moment ago.
    """

    def __init__(self, url: str | None, key: str) -> None:
        """Find the store. Nothing is read or written yet.

        Raises:
            InputError: no file system of this kind is known or installed.
        """
        import fsspec

        self._url = url or CHECKPOINTS
        try:
            self._fs, root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"params.yaml: training.checkpoint_store: {self._url}: {one_line(error)}"
            ) from None
        self._root, self._folder = root.rstrip("/"), f"{root.rstrip('/')}/{key}"
        # fsspec's own `mv` copies and deletes: that of an object store, which shows an object when it is whole.
        self._renames = type(self._fs).mv is not fsspec.AbstractFileSystem.mv
        self._damaged: set[str] = set()

    def save(self, snapshot: "Snapshot") -> bool:
        """Store `snapshot`, whole or not at all, and drop all but the newest ones.

        A store that fails is tried again a few times, and then costs a warning: returns whether it was stored.
        """
        data = snapshot_bytes(snapshot)
        name = f"{self._folder}/{snapshot.step:09d}-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        try:
            _insist(functools.partial(self._write, name, data), WRITE_WAITS)
        except Exception as error:  # each file system has its own
            log_line(
                f"warning: no checkpoint of step {snapshot.step} could be kept ({_named(error)}); going on"
            )
            return False
        self._damaged.discard(name)
        # What is not dropped now is dropped at the next save.
        with contextlib.suppress(Exception):
            self._drop()
        return True

    def newest(self) -> Iterator["Snapshot"]:
        """Whole snapshots, the newest first. A damaged one, or one that vanishes, is passed over with a warning.

        Raises:
            InputError: the store cannot be read. Starting over might throw away hours, so that is left to the user.
        """
        seen: set[str] = set()
        # Looked for again at the end: another process that works at this fit drops old ones as it adds new ones.
        while names := [name for name in self._read(self._names) if name not in seen]:
            for name in reversed(names):
                seen.add(name)
                data = self._read(functools.partial(self._bytes, name))
                if data is None:
                    log_line(f"warning: checkpoint {name} has vanished; going on from the one before")
                    continue
                if hashlib.sha256(data).hexdigest()[:32] != _checksum(name):
                    self._damaged.add(name)
                    log_line(f"warning: checkpoint {name} is damaged; going on from the one before")
                    continue
                yield read_snapshot(data)

    def forget_old(self, *, now: float | None = None) -> None:
        """Remove the checkpoints of every fit that has stored none for `_FORGOTTEN_AFTER_DAYS` days.

        Nothing else in the store is touched, and no failure of it is worth more than a warning.
        """
        limit = (time.time() if now is None else now) - _FORGOTTEN_AFTER_DAYS * 86400
        try:
            for folder in self._listed(self._root):
                if KEY.fullmatch(_last(folder)) and _last(folder) != _last(self._folder):
                    self._forget(folder, limit)
        except Exception as error:  # each file system has its own
            log_line(f"warning: old checkpoints in {self._url} could not be removed ({_named(error)})")

    def _forget(self, folder: str, limit: float) -> None:
        inside = self._listed(folder)
        ours = all(NAME.fullmatch(_last(name)) or _PARTIAL.fullmatch(_last(name)) for name in inside)
        # Another process may be at the same: what is gone already is as it should be.
        with contextlib.suppress(FileNotFoundError):
            if ours and all(self._fs.modified(name).timestamp() < limit for name in inside):
                self._fs.rm(folder, recursive=True)

    def _write(self, name: str, data: bytes) -> None:
        self._fs.makedirs(self._folder, exist_ok=True)
        if not self._renames:
            self._fs.pipe_file(name, data)
            return
        partial = f"{name}.{uuid.uuid4().hex}.partial"
        try:
            self._fs.pipe_file(partial, data)
            self._fs.mv(partial, name)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(partial)
            raise

    def _drop(self) -> None:
        """Remove all whole checkpoints but the newest, the damaged ones, and what killed processes left."""
        listed = self._listed(self._folder)
        whole = [name for name in listed if NAME.fullmatch(_last(name)) and name not in self._damaged]
        abandoned = time.time() - _ABANDONED_AFTER_SECONDS
        for name in listed:
            with contextlib.suppress(FileNotFoundError):
                if name in whole[:-_KEPT] or name in self._damaged or self._is_older_part(name, abandoned):
                    self._fs.rm_file(name)

    def _is_older_part(self, name: str, limit: float) -> bool:
        return bool(_PARTIAL.fullmatch(_last(name))) and self._fs.modified(name).timestamp() < limit

    def _bytes(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(name))
        except FileNotFoundError:
            return None

    def _names(self) -> list[str]:
        return [name for name in self._listed(self._folder) if NAME.fullmatch(_last(name))]

    def _listed(self, folder: str) -> list[str]:
        """Return what a folder holds, in the order of the steps: a name begins with its step, padded with zeros."""
        try:
            return sorted(name.rstrip("/") for name in self._fs.ls(folder, detail=False, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _read(self, work: Callable[[], _T]) -> _T:
        try:
            return _insist(work, READ_WAITS)
        except Exception as error:  # each file system has its own
            raise InputError(
                f"params.yaml: training.checkpoint_store: {self._url} cannot be read ({_named(error)}); mend it and "
                "run the same again, or start the fit over with another store"
            ) from error


def _insist(work: Callable[[], _T], waits: Sequence[float]) -> _T:
    """Do `work`, again after each wait where it fails."""
    for wait in waits:
        try:
            return work()
        except Exception:  # each file system has its own
            time.sleep(wait)
    return work()


def _checksum(name: str) -> str:
    match = NAME.fullmatch(_last(name))
    assert match
    return match["checksum"]


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
