"""Git, as this program calls it: without asking anything."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.project.errors import InputError


def run_git(*arguments: str, check: bool = True, settings: Mapping[str, str] | None = None) -> bytes:
    """Run Git. Return what it printed, without the last line end; nothing where it failed and need not be checked."""
    done = subprocess.run(
        ["git", *arguments],
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0", **(settings or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if check and done.returncode:
        said = " ".join((done.stderr or done.stdout).decode(errors="replace").split())[:200]
        raise InputError(f"git {arguments[0]}: {said or f'status {done.returncode}'}")
    return done.stdout.removesuffix(b"\n") if not done.returncode else b""


def committed(commit: str, name: str) -> bytes | None:
    """Return the bytes of a file of the project in a commit. None where it is not in it."""
    done = subprocess.run(["git", "cat-file", "blob", f"{commit}:./{name}"], capture_output=True)
    return None if done.returncode else done.stdout


def merged_text(base: bytes, ours: bytes, theirs: bytes) -> bytes | None:
    """Return the text with the changes of both sides. None where both changed the same lines."""
    with TemporaryDirectory(prefix="sdlora-") as folder:
        files = [Path(folder, name) for name in ("ours", "base", "theirs")]
        for path, text in zip(files, (ours, base, theirs), strict=True):
            path.write_bytes(text)
        done = subprocess.run(["git", "merge-file", "-p", "-q", *map(str, files)], capture_output=True)
    return None if done.returncode else done.stdout
