"""What removed tasks have left: nothing depends on it, and DVC's cache keeps it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from pipelines.project.files import remove_path
from pipelines.project.layout import ARTIFACTS, TASK_FOLDERS
from pipelines.project.param_checks import TASK_KEY


def leftovers(tasks: Collection[str], artifacts: Path = ARTIFACTS) -> list[Path]:
    """Return the outputs of tasks that are not among these. What else lies beside them is somebody's own."""
    return [
        path
        for folder in TASK_FOLDERS
        for path in sorted((artifacts / folder.name).glob("t*"))
        if re.fullmatch(TASK_KEY, path.name) and path.name not in tasks
    ]


def remove_leftovers(tasks: Collection[str], artifacts: Path = ARTIFACTS) -> list[str]:
    """Remove the outputs of tasks that are not among these. Return the tasks."""
    found = leftovers(tasks, artifacts)
    for path in found:
        remove_path(path)
    return sorted({path.name for path in found})
