"""The home of a Prefect server."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_home(home: Path, folder: Path) -> Path:
    """Copy the home of a server that has stopped."""
    return shutil.copytree(home, folder, ignore=shutil.ignore_patterns("*.log", "*-shm"))
