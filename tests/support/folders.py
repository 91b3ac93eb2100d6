"""What stands in a folder, and how a test changes it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

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
