"""The order of dvc.lock: that of a plain `dvc repro`, whatever order a run of ours brings stages up to date in."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from pipelines.project.files import write_whole
from pipelines.project.layout import DVC_YAML, LOCK, LOCKED_BEFORE
from pipelines.versioning.lock_text import lock_text, named_entries


@contextlib.contextmanager
def order_of_dvc() -> Iterator[None]:
    """Have the stages that a run adds to dvc.lock stand in the order in which `dvc repro` would have added them.

    What stood there before stays in its place, as DVC leaves it there. A run that was killed is gone on with: what it
    has added is no more in its place than what is still to come.
    """
    if not LOCKED_BEFORE.is_file():
        write_whole(LOCKED_BEFORE, "\n".join(_entries() or ()).encode())
    try:
        yield
    finally:
        _put_in_order(LOCKED_BEFORE.read_text(encoding="utf-8").split("\n"))
    LOCKED_BEFORE.unlink()


def _put_in_order(before: list[str]) -> None:
    """Move the entries that were not there before to their places."""
    entries = _entries()
    if entries is None or len(entries.keys() - set(before)) < 2:
        return
    from dvc.repo import Repo, lock_repo
    from dvc.repo.graph import build_graph
    from dvc.repo.reproduce import plan_repro

    with contextlib.closing(Repo(_wait_for_lock=True)) as repo, lock_repo(repo):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what DVC's own code calls
            planned = plan_repro(build_graph(repo.stage.load_all(str(DVC_YAML))))
        place = {stage.addressing: place for place, stage in enumerate(planned)}
        entries = _entries() or {}
        old = [name for name in entries if name in before]
        new = sorted(entries.keys() - set(old), key=lambda name: (place.get(name, len(place)), name))
        text = lock_text(entries[name] for name in (*old, *new)).encode()
        if text != LOCK.read_bytes():
            write_whole(LOCK, text)


def _entries() -> dict[str, str] | None:
    """Return the entries of dvc.lock by name. None where there are none, or it is of another form."""
    try:
        return named_entries(LOCK.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return None
