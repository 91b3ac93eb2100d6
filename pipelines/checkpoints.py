"""Checkpoints of a fit in progress, in a folder or at any fsspec URL, under a key that is the hash of its inputs."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stage import say

if TYPE_CHECKING:
    from sdlora.training import Snapshot

DEFAULT_STORE = ".sdlora/checkpoints"
KEPT = 2
"""Checkpoints of one fit that are kept: should the newest be damaged, the one before still serves."""
FORGOTTEN_AFTER_DAYS = 14
"""A fit's checkpoints are removed when none of them is younger."""
SUFFIX = ".safetensors"


def input_key(values: Mapping[str, Any], files: Iterable[Path]) -> str:
    """The hash of a stage's inputs: its settings, and the names and bytes of its files (code among them)."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        digest.update(f"\n{path.name}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


class CheckpointStore:
    """The checkpoints of one fit. A file's name holds its step and its checksum, so one file is one whole state."""

    def __init__(self, url: str | None, key: str) -> None:
        import fsspec

        self._fs, root = fsspec.core.url_to_fs(url or DEFAULT_STORE)
        self._root, self._folder = root.rstrip("/"), f"{root.rstrip('/')}/{key}"

    def save(self, snapshot: "Snapshot") -> None:
        """Store `snapshot`, whole or not at all, and drop all but the newest ones."""
        import torch

        from sdlora.tensors import tensor_bytes

        curve = torch.tensor([list(row) for row in snapshot.curve], dtype=torch.float64).reshape(-1, 5)
        data = tensor_bytes({**snapshot.tensors, "curve": curve, "step": torch.tensor(snapshot.step)})
        name = f"{self._folder}/{snapshot.step:09d}-{hashlib.sha256(data).hexdigest()[:32]}{SUFFIX}"
        self._fs.makedirs(self._folder, exist_ok=True)
        self._fs.pipe_file(f"{name}.partial", data)
        self._fs.mv(f"{name}.partial", name)
        for old in self._names()[:-KEPT]:
            self._fs.rm_file(old)

    def newest(self) -> Iterator["Snapshot"]:
        """Whole snapshots, the newest first; a damaged one is passed over with a warning."""
        import safetensors.torch

        from sdlora.fit_folder import EpochRecord
        from sdlora.training import Snapshot

        for name in reversed(self._names()):
            data = self._fs.cat_file(name)
            checksum = name.removesuffix(SUFFIX).rsplit("-", 1)[1]
            if hashlib.sha256(data).hexdigest()[:32] != checksum:
                say(f"warning: checkpoint {name} is damaged; going on from the one before")
                continue
            tensors = safetensors.torch.load(data)
            curve = [EpochRecord(int(s), int(e), *rest) for s, e, *rest in tensors.pop("curve").tolist()]
            yield Snapshot(step=int(tensors.pop("step")), tensors=tensors, curve=curve)

    def forget_old(self, *, now: float | None = None) -> None:
        """Remove the checkpoints of every fit that has stored none for `FORGOTTEN_AFTER_DAYS` days."""
        limit = (time.time() if now is None else now) - FORGOTTEN_AFTER_DAYS * 86400
        if not self._fs.isdir(self._root):
            return
        for entry in self._fs.ls(self._root, detail=False):
            if entry.rstrip("/") == self._folder or not self._fs.isdir(entry):
                continue
            inside = self._fs.find(entry)
            if all(self._fs.modified(name).timestamp() < limit for name in inside):
                self._fs.rm(entry, recursive=True)

    def _names(self) -> list[str]:
        if not self._fs.isdir(self._folder):
            return []
        # A name is a step padded with zeros before anything else, so the order of the names is that of the steps.
        return sorted(
            name for name in self._fs.ls(self._folder, detail=False, refresh=True) if name.endswith(SUFFIX)
        )
