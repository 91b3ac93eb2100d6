"""The Git branch that runs on workers read and write: three files and ledger/, and nothing else of the clone.

What they read of it beside these are the files by which DVC keeps images.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.ledger.journal import joined
from pipelines.project.errors import InputError, PushError
from pipelines.project.files import read_json, write_json, write_whole
from pipelines.project.git import committed, run_git
from pipelines.project.layout import (
    BRANCH_STATE,
    JOURNAL,
    LEDGER,
    LOCK,
    METRICS,
    PARAMS,
    UNRECORDED,
    UNRECORDED_PARAMS,
    WRITTEN_PARAMS,
)
from pipelines.versioning.repro import run_dvc

_FILES = (str(PARAMS), str(LOCK), str(METRICS))
_TRIES = 5
"""How often a commit is made anew, on top of what somebody else pushed meanwhile."""
_NEXT = Path("params.yaml.partial")
"""Where an edit of params.yaml is made: beside it, because it names folders that are relative to its own."""


def take(branch: str, remote: str | None) -> None:
    """Bring the three files and the ledger to what the branch holds, so that any machine goes on where another ended.

    Of the ledger, what this clone itself has written since the last time stays. Where there is no such branch yet it
    begins at the commit that is checked out. A params.yaml that is in no commit and that no unattended run wrote is
    somebody's work: refused.
    """
    if run_git("symbolic-ref", "-q", "HEAD", check=False) == f"refs/heads/{branch}".encode():
        raise InputError(
            f"workers.branch: {branch} is checked out in {Path.cwd()}, and a commit would change it underneath you;"
            " check out another branch there"
        )
    if remote:
        _fetch(branch, remote)
    base = tip(branch) or run_git("rev-parse", "HEAD").decode()
    texts = {name: committed(base, name) for name in _FILES}
    params = PARAMS.read_bytes()
    known = {texts[str(PARAMS)], committed("HEAD", str(PARAMS))}
    if params not in known and _sha256(params) not in _ours():
        raise InputError(
            f"{Path.cwd()}/params.yaml has changes that are in no commit; commit them, or git restore params.yaml"
        )
    _mark(params, texts[str(PARAMS)] or params)
    for name, data in texts.items():
        path = Path(name)
        if data is not None and not (path.is_file() and path.read_bytes() == data):
            write_whole(path, data)
    _take_pointers(base)
    _take_ledger(base)


def edit(change: Callable[[Path], list[str]]) -> list[str]:
    """Have `change` edit params.yaml, whose path it is given, in a copy that takes its place. Return its lines.

    If params.yaml was an unattended run's before, it is one's after, wherever a kill falls: the hashes of both texts
    are there before the new one is.
    """
    old = PARAMS.read_bytes()
    write_whole(_NEXT, old)
    try:
        lines = change(_NEXT)
        new = _NEXT.read_bytes()
        if _sha256(old) in _ours():
            _mark(old, new)
        write_whole(PARAMS, new)
    except InputError as error:
        raise InputError(str(error).replace(_NEXT.name, PARAMS.name)) from None
    finally:
        _NEXT.unlink(missing_ok=True)
    return [line.replace(_NEXT.name, PARAMS.name) for line in lines]


def commit(branch: str, message: str, remote: str | None) -> str | None:
    """Put the files, and what this clone wrote of the ledger, on the branch as one commit, after `take`.

    Return its id, or None if they are there already. The index and the files of the clone stay as they are. The
    remote gets the commit before the clone's own branch does: wherever this ends, the two have not gone apart.

    Raises:
        InputError: the parameters on the branch are others than those that the run began from.
        PushError: the remote does not take the commit. What the run has computed is found again by the next one.
    """
    taken = _remembered()["taken"]
    for _ in range(_TRIES):
        parent = tip(branch)
        start = parent or run_git("rev-parse", "HEAD").decode()
        known = (committed(taken[-1], str(PARAMS)), PARAMS.read_bytes())
        if committed(start, str(PARAMS)) not in known:
            raise InputError(
                f"workers.branch: params.yaml has changed on {branch} since this run began, so nothing was committed;"
                " run it anew, with the same parameters: what was computed is found again"
            )
        made = _commit_on(start, message, taken)
        if remote and (made or parent):
            try:
                run_git("push", "--quiet", remote, f"{made or parent}:refs/heads/{branch}")
            except InputError as refused:
                _fetch(branch, remote)
                if tip(branch) == parent:
                    raise PushError(
                        f"{refused}; nothing was committed: mend that, and run it anew, with the same parameters"
                    ) from None
                continue
        if made:
            run_git(
                "update-ref", f"refs/heads/{branch}", made, parent or "0" * len(made)
            )  # only if not moved
        return made
    raise InputError(f"workers.branch: {branch} moved {_TRIES} times while it was committed to; run it anew")


def _commit_on(start: str, message: str, taken: list[str]) -> str | None:
    """Make the commit that follows a commit, on no branch yet. None if it would change nothing."""
    with TemporaryDirectory(prefix="sdlora-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run_git("read-tree", start, settings=index)
        for name in (*filter(os.path.isfile, _FILES), *_own_ledger(taken[-1])):
            source = Path(name)
            if source == JOURNAL:  # others may have added lines since
                source = Path(folder) / JOURNAL.name
                source.write_bytes(joined(committed(start, name) or b"", JOURNAL.read_bytes()))
            blob = run_git("hash-object", "-w", "--path", name, str(source)).decode()
            run_git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", settings=index)
        tree = run_git("write-tree", settings=index).decode()
    if tree == run_git("rev-parse", f"{start}^{{tree}}").decode():
        return None
    nobody = {f"GIT_{who}_{what}": "sdlora" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    somebody = run_git("config", "user.email", check=False)
    made = run_git(
        "commit-tree", tree, "-p", start, "-m", message, settings={} if somebody else nobody
    ).decode()
    write_json(BRANCH_STATE, {"taken": taken, "made": made})
    return made


def tip(branch: str) -> str | None:
    """Return the commit that the branch stands at, if there is such a branch."""
    return run_git("rev-parse", "-q", "--verify", f"refs/heads/{branch}", check=False).decode() or None


def _fetch(branch: str, remote: str) -> None:
    """Bring the branch forward to where the remote has it."""
    if not run_git("ls-remote", remote, f"refs/heads/{branch}"):
        return
    theirs = f"refs/remotes/{remote}/{branch}"
    run_git("fetch", "--quiet", remote, f"+refs/heads/{branch}:{theirs}")
    mine, other = tip(branch), run_git("rev-parse", theirs).decode()
    common = run_git("merge-base", mine, other, check=False).decode() if mine else None
    if common == other:
        return
    if common != mine:
        raise InputError(
            f"workers.branch: {branch} has gone two ways, here and at {remote}; merge them in {Path.cwd()}, and push"
        )
    run_git("update-ref", f"refs/heads/{branch}", other, mine or "0" * len(other))


def _mark(*texts: bytes) -> None:
    write_whole(_marks(), "\n".join(map(_sha256, texts)).encode())


def _ours() -> list[str]:
    return _marks().read_text().split() if _marks().is_file() else []


def _marks() -> Path:
    """Return where the hashes of what an unattended run may have left as params.yaml are."""
    return UNRECORDED_PARAMS if UNRECORDED.is_dir() else WRITTEN_PARAMS


def _take_pointers(base: str) -> None:
    """Bring the files by which DVC keeps images to those of a commit, but for what somebody changed here."""
    before = ["HEAD", *_remembered()["taken"]]
    for name in run_git("ls-tree", "-r", "-z", "--name-only", base).decode().split("\0"):
        path = Path(name)
        if path.suffix != ".dvc":
            continue
        new, here = committed(base, name) or b"", path.read_bytes() if path.is_file() else None
        if here is None or (here != new and here in [committed(at, name) for at in before]):
            write_whole(path, new)
            if path.with_suffix("").exists():  # the images of before; absent ones come when they are read
                run_dvc(["pull", name])


def _take_ledger(base: str) -> None:
    """Bring the ledger to that of a commit, but for what this clone itself has written."""
    state = _remembered()
    before = state["taken"]
    if state["made"] and run_git("merge-base", state["made"], base, check=False).decode() == state["made"]:
        before = [*before, state["made"]]
    new, here = _ledger(base), _ledger_here()
    taken = [_ledger(commit) for commit in before]
    # Killed among the writes below, the next take must still know each file as taken, whichever commit it is of.
    write_json(BRANCH_STATE, {"taken": [*before, base], "made": None})
    for name, blob in new.items():
        mine = here.get(name)
        if mine == blob:
            continue
        theirs = committed(base, name) or b""
        if mine in (None, *(tree.get(name) for tree in (*taken, _ledger("HEAD")))):
            write_whole(Path(name), theirs)
        elif name == str(JOURNAL):
            write_whole(JOURNAL, joined(theirs, JOURNAL.read_bytes()))
    for name in sorted(here.keys() - new.keys()):
        if here[name] in (tree.get(name) for tree in taken):
            Path(name).unlink()
            with contextlib.suppress(OSError):
                os.removedirs(Path(name).parent)
    write_json(BRANCH_STATE, {"taken": [base], "made": None})


def _own_ledger(base: str) -> list[str]:
    """Return the files of the ledger that this clone has written since it took those of a commit.

    What is as the checked-out commit has it was written by nobody here, also where the branch lacks it.
    """
    seen = {**_ledger("HEAD"), **_ledger(base)}
    return [name for name, blob in _ledger_here().items() if seen.get(name) != blob]


def _ledger(commit: str) -> dict[str, str]:
    """Return the files of the ledger in a commit, and their hashes. None where Git has forgotten the commit."""
    lines = run_git("ls-tree", "-r", "-z", commit, "--", LEDGER.as_posix(), check=False).split(b"\0")
    rows = [line.split(b"\t", 1) for line in lines if line]
    return {os.fsdecode(name): kind.split()[2].decode() for kind, name in rows}


def _ledger_here() -> dict[str, str]:
    """Return the files of the ledger in this clone, and their hashes. Half-written ones are none."""
    names = sorted(
        path.as_posix() for path in LEDGER.rglob("*") if path.is_file() and path.suffix != ".partial"
    )
    blobs = run_git("hash-object", "--no-filters", "--", *names).decode().split() if names else []
    return dict(zip(names, blobs, strict=True))


def _remembered() -> dict[str, Any]:
    return dict(read_json(BRANCH_STATE)) if BRANCH_STATE.is_file() else {"taken": [], "made": None}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
