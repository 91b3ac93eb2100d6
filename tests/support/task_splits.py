"""The split of a task in a folder of pictures, as `dvc.yaml` calls it."""

from __future__ import annotations

from pathlib import Path

from pipelines.stages.split import split


def split_task(task: str, before: str) -> None:
    """Split the pictures of the working directory for a task."""
    split(
        task,
        source=Path("pictures"),
        before=Path(f"split/{before}"),
        out=Path(f"split/{task}"),
        images=Path(f"train/{task}"),
    )
