"""A run that records nothing: the project's files are put aside before it, and put back after it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, whole_folder, write_whole
from pipelines.project.layout import LEDGER, LOCK, METRICS, PARAMS, UNRECORDED, UNRECORDED_PARAMS


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Put params.yaml, dvc.lock, metrics.json and the ledger back when the block has ended.

    Not where it ends by a signal of Prefect's: then another process may be at work on the same run, in this clone. As
    where it was killed, the next run begins with `put_back`.
    """
    _put_aside()
    try:
        yield
    except Exception:
        put_back()
        raise
    put_back()


def put_back() -> None:
    """Put back what an unrecorded run has changed, if one has left something.

    Raises:
        InputError: somebody has edited params.yaml since.
    """
    if not UNRECORDED.is_dir():
        return
    params = sha256_of(PARAMS) if PARAMS.is_file() else ""
    known = {sha256_of(UNRECORDED / PARAMS), *UNRECORDED_PARAMS.read_text(encoding="utf-8").split()}
    if params and params not in known:
        raise InputError(
            f"{Path.cwd()}/params.yaml was edited after a run that records nothing; its text before that run is "
            f"{UNRECORDED / PARAMS}: copy it back, and make the edit again"
        )
    kept, here = _files(UNRECORDED), _files(Path())
    for name in here - kept:
        Path(name).unlink()
    for name in kept:
        data = (UNRECORDED / name).read_bytes()
        if name not in here or Path(name).read_bytes() != data:
            write_whole(Path(name), data)
    # In one move: of a folder that is half deleted the rest would be put back, and the others taken away.
    gone = UNRECORDED.with_name(f".{UNRECORDED.name}.partial")
    shutil.rmtree(gone, ignore_errors=True)
    UNRECORDED.rename(gone)
    shutil.rmtree(gone)


def _put_aside() -> None:
    with whole_folder(UNRECORDED) as folder:
        for name in _files(Path()):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, folder / name)
        (folder / UNRECORDED_PARAMS.name).write_text(sha256_of(PARAMS), encoding="utf-8")


def _files(root: Path) -> set[str]:
    """Return which of the files are in a folder, as paths below it."""
    found = {str(path) for path in (PARAMS, LOCK, METRICS) if (root / path).is_file()}
    for place, _, names in os.walk(root / LEDGER):
        found |= {str(Path(place, name).relative_to(root)) for name in names if not name.endswith(".partial")}
    return found
