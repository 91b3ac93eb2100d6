"""Calls of the stages on the files of a small project."""

from __future__ import annotations

from pathlib import Path

from pipelines.stages.fit import fit

FIT = (
    *("fit", "t01", "--train", "split/t01/train.json", "--images", "train", "--out", "fit/t01"),
    *("--classes", "split/t01/classes.json", "--before", "model/t00", "--backbone", "model/t00"),
)
"""The command that learns the first task."""


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
