"""The order of dvc.lock: that of a plain `dvc repro`, whatever order a run of ours brings stages up to date in."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePath

from pipelines.project.files import write_whole
from pipelines.project.layout import LOCK, LOCKED_BEFORE
from pipelines.versioning.lock_text import lock_text, named_entries


@contextlib.contextmanager
def order_of_dvc(outs: Mapping[str, list[str]], deps: Mapping[str, list[str]]) -> Iterator[None]:
    """Have the stages that a run adds to dvc.lock stand in the order in which `dvc repro` would have added them.

    What stood there before stays in its place, as DVC leaves it there. A run that was killed is gone on with: what it
    has added is no more in its place than what is still to come.

    Args:
        outs: Stage → what it leaves, in the order of dvc.yaml.
        deps: Stage → what it reads, in that order.
    """
    if not LOCKED_BEFORE.is_file():
        write_whole(LOCKED_BEFORE, "\n".join(_entries() or ()).encode())
    try:
        yield
    finally:
        before = set(LOCKED_BEFORE.read_text(encoding="utf-8").split("\n"))
        entries = _entries()
        if entries is not None and len(entries.keys() - before) > 1:
            _put_in_order(before, dvc_order(outs, deps))
    LOCKED_BEFORE.unlink()


def _put_in_order(before: Collection[str], order: Sequence[str]) -> None:
    """Move the entries that were not there before to their places."""
    from dvc.repo import Repo, lock_repo

    with contextlib.closing(Repo(_wait_for_lock=True)) as repo, lock_repo(repo):
        place = {stage: place for place, stage in enumerate(order)}
        entries = _entries() or {}
        old = [name for name in entries if name in before]
        new = sorted(entries.keys() - set(old), key=lambda name: (place.get(name, len(place)), name))
        text = lock_text(entries[name] for name in (*old, *new)).encode()
        if text != LOCK.read_bytes():
            write_whole(LOCK, text)


def dvc_order(outs: Mapping[str, list[str]], deps: Mapping[str, list[str]]) -> list[str]:
    """Return the stages in the order in which `dvc repro` runs them: each after what it reads, depth first.

    It is the order of `build_graph` and `plan_repro` (dvc.repo, 3.66), which take seconds for a thousand stages.
    """
    makers = {path: name for name, paths in outs.items() for path in paths}
    parts = {path: [*reversed(PurePath(path).parents), PurePath(path)] for path in makers}
    places: dict[PurePath, int] = {}
    for path in makers:
        for part in parts[path]:
            places.setdefault(part, len(places))
    within: dict[str, list[str]] = {}
    for path in sorted(makers, key=lambda path: [places[part] for part in parts[path]]):
        for part in parts[path]:
            within.setdefault(str(part), []).append(makers[path])

    def read_by(name: str) -> Iterator[str]:
        for dep in (str(PurePath(dep)) for dep in deps[name]):
            # Outputs do not overlap, so one that holds others, or is one, is within none.
            around = () if dep in within else map(str, PurePath(dep).parents)
            yield from (makers[folder] for folder in around if folder in makers)
            yield from within.get(dep, ())

    order: list[str] = []
    seen: set[str] = set()
    for first in outs:
        if first in seen:
            continue
        seen.add(first)
        chain = [(first, read_by(first))]
        while chain:
            name, left = chain[-1]
            following = next((other for other in left if other not in seen), None)
            if following is None:
                order.append(name)
                chain.pop()
            else:
                seen.add(following)
                chain.append((following, read_by(following)))
    return order


def _entries() -> dict[str, str] | None:
    """Return the entries of dvc.lock by name. None where there are none, or it is of another form."""
    try:
        return named_entries(LOCK.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return None
