"""What stands in a folder, who works there, and how a test changes it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import psutil

from tests.support.repository import REPOSITORY


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_project(folder: Path, files: dict[str, str]) -> Path:
    """Write a DVC project of the given files."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    shutil.copy(REPOSITORY / ".dvc" / "config", folder / ".dvc" / "config")
    shutil.copy(REPOSITORY / ".dvcignore", folder / ".dvcignore")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def working_in(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder, or below it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
