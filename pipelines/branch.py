"""The Git branch that unattended runs read and write: three files and ledger/, and nothing else of the clone."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.errors import InputError
from pipelines.files import write_whole

FILES = ("params.yaml", "dvc.lock", "metrics.json")
LEDGER = Path("ledger")
"""What stages and people leave beside DVC's outputs: costs, signatures, receipts."""
OURS = Path(".sdlora/params.sha256")
"""The hash of the params.yaml that an unattended run left: it may be replaced by the branch's."""
UNPUSHED = Path(".sdlora/unpushed")
"""The commits that unattended runs of this clone made and did not come to push, one a line."""


def take(branch: str, remote: str | None) -> None:
    """Bring the three files to what the branch holds, so that any machine goes on where another ended.

    What the branch has of the ledger and this clone lacks comes too. Where there is no such branch yet it begins at
    the commit that is checked out. A params.yaml that is in no commit and that no unattended run wrote is
    somebody's work: refused.
    """
    if git("symbolic-ref", "-q", "HEAD", check=False) == f"refs/heads/{branch}".encode():
        raise InputError(
            f"workers.branch: {branch} is checked out in {Path.cwd()}, and a commit would change it underneath you;"
            " check out another branch there"
        )
    if remote:
        _fetch(branch, remote)
    base = tip(branch) or "HEAD"
    texts = {name: _content(base, name) for name in FILES}
    params = Path("params.yaml").read_bytes()
    known = {texts["params.yaml"], _content("HEAD", "params.yaml")}
    if params not in known and not (OURS.is_file() and OURS.read_text() == _sha256(params)):
        raise InputError(
            f"{Path.cwd()}/params.yaml has changes that are in no commit; commit them, or git restore params.yaml"
        )
    for name, data in texts.items():
        path = Path(name)
        if data is not None and not (path.is_file() and path.read_bytes() == data):
            write_whole(path, data)
    for entry in git("ls-tree", "-r", "-z", "--name-only", base, "--", LEDGER.as_posix()).split(b"\0"):
        held = Path(os.fsdecode(entry))
        if entry and not held.exists():
            write_whole(held, _content(base, held.as_posix()) or b"")
    mark()


def mark() -> None:
    """Note that the params.yaml that is there was written by an unattended run."""
    write_whole(OURS, _sha256(Path("params.yaml").read_bytes()).encode())


def commit(branch: str, message: str) -> str | None:
    """Put the files and the ledger on the branch as one commit; return its id, or None if they are there already.

    The index and the files of the clone stay as they are.
    """
    parent = tip(branch)
    start = parent or git("rev-parse", "HEAD").decode()
    with TemporaryDirectory(prefix="sdlora-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        git("read-tree", start, settings=index)
        ledger = sorted(path.as_posix() for path in LEDGER.rglob("*") if path.is_file())
        for name in (*filter(os.path.isfile, FILES), *ledger):
            blob = git("hash-object", "-w", "--path", name, name).decode()
            git("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", settings=index)
        tree = git("write-tree", settings=index).decode()
    if tree == git("rev-parse", f"{start}^{{tree}}").decode():
        return None
    nobody = {f"GIT_{who}_{what}": "sdlora" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    somebody = git("config", "user.email", check=False)
    new = git("commit-tree", tree, "-p", start, "-m", message, settings={} if somebody else nobody).decode()
    write_whole(UNPUSHED, "\n".join([*_unpushed(), new]).encode())
    git("update-ref", f"refs/heads/{branch}", new, parent or "0" * len(new))  # only if nobody else moved it
    return new


def push(branch: str, remote: str) -> None:
    """Push the branch, never over what somebody else pushed."""
    git("push", "--quiet", remote, f"refs/heads/{branch}:refs/heads/{branch}")
    UNPUSHED.unlink(missing_ok=True)


def tip(branch: str) -> str | None:
    """The commit that the branch stands at, if there is such a branch."""
    return git("rev-parse", "-q", "--verify", f"refs/heads/{branch}", check=False).decode() or None


def git(*arguments: str, check: bool = True, settings: Mapping[str, str] | None = None) -> bytes:
    """Run Git without asking anything; return what it printed, without the last line end."""
    done = subprocess.run(
        ["git", *arguments],
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0", **(settings or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if check and done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise InputError(f"git {arguments[0]}: {said or f'status {done.returncode}'}")
    return done.stdout.removesuffix(b"\n") if not done.returncode else b""


def _fetch(branch: str, remote: str) -> None:
    """Bring the branch forward to where the remote has it.

    Where it was moved on elsewhere, what a run of this clone committed and was killed before it pushed is dropped: the
    same run, started again, makes it again. Anybody else's commit is refused.
    """
    if not git("ls-remote", remote, f"refs/heads/{branch}"):
        return
    theirs = f"refs/remotes/{remote}/{branch}"
    git("fetch", "--quiet", remote, f"+refs/heads/{branch}:{theirs}")
    mine, other = tip(branch), git("rev-parse", theirs).decode()
    common = git("merge-base", mine, other, check=False).decode() if mine else None
    if common == other:
        return
    if mine and common != mine and not set(_between(common, mine)) <= set(_unpushed()):
        raise InputError(
            f"workers.branch: {branch} has gone two ways, here and at {remote}; merge them in {Path.cwd()}, and push"
        )
    git("update-ref", f"refs/heads/{branch}", other, mine or "0" * len(other))


def _between(common: str | None, mine: str) -> list[str]:
    return git("rev-list", mine, *([f"^{common}"] if common else [])).decode().split()


def _unpushed() -> list[str]:
    return UNPUSHED.read_text().split() if UNPUSHED.is_file() else []


def _content(commit: str, name: str) -> bytes | None:
    """A file's bytes in a commit; None where it is not in it."""
    done = subprocess.run(["git", "cat-file", "blob", f"{commit}:{name}"], capture_output=True)
    return None if done.returncode else done.stdout


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
