"""Calls of the stages on the files of a small project."""

from __future__ import annotations

from pathlib import Path

from pipelines.stages.fit import fit


def run_fit(task: str, before: str, out: str) -> None:
    fit(
        task,
        train=Path(f"split/{task}/train.json"),
        images=Path("train"),
        classes=Path(f"split/{task}/classes.json"),
        before=Path(f"model/{before}"),
        backbone=Path("model/t00"),
        out=Path(out),
    )
