"""What Git says of the clone that this process works in."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path


def repository_name() -> str:
    """Return the name in the address of the Git remote, the same in all clones. Without a remote the folder's."""
    remote = _git("remote").partition("\n")[0]
    address = _git("remote", "get-url", "origin") or (_git("remote", "get-url", remote) if remote else "")
    place = re.split(r"[/\\:]", address.rstrip("/"))[-1].removesuffix(".git")
    return place or Path(_git("rev-parse", "--show-toplevel") or Path.cwd()).name


def repository_id() -> str:
    """Return what tells this repository from others of its name: its first commit. Empty where that is not known."""
    if _git("rev-parse", "--is-shallow-repository") != "false":
        return ""
    return _git("rev-list", "--max-parents=0", "HEAD").partition("\n")[0][:12]


def clone_place(*, branches: bool) -> str:
    """Return where this clone is, of all machines. With `branches` where its branches are, which worktrees share."""
    folder = _git("rev-parse", "--path-format=absolute", "--git-common-dir") if branches else ""
    return f"{socket.gethostname()}:{folder or Path.cwd()}"


def _git(*arguments: str) -> str:
    """Return what Git prints. Nothing where it fails, or is not there."""
    try:
        done = subprocess.run(["git", *arguments], stdin=subprocess.DEVNULL, capture_output=True)
    except FileNotFoundError:
        return ""
    return "" if done.returncode else done.stdout.decode(errors="replace").strip()
