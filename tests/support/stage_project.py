"""A small project with splits and a backbone, and its steps, by the stages alone."""

from __future__ import annotations

from pathlib import Path

from pipelines.stages.backbone import backbone
from pipelines.stages.freeze import freeze
from pipelines.stages.start import start
from tests.support.parameters import settings
from tests.support.pictures import paint
from tests.support.steps import run_fit
from tests.support.task_splits import split_task


def paint_project(root: Path) -> None:
    """Paint the pictures of four classes, and write params.yaml for two tasks of them."""
    for index, name in enumerate("abcd"):
        paint(root / "pictures/train" / name, index, 5)
        paint(root / "pictures/test" / name, 10 + index, 2)
    (root / "params.yaml").write_text(settings())


def split_project() -> None:
    """Split the tasks of the working directory, and leave its backbone."""
    start(out=Path("split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
    backbone(out=Path("model/t00"))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        split_task(task, before)


def run_step(task: str, before: str) -> None:
    """Learn a task of the working directory, and freeze it."""
    run_fit(task, before, f"fit/{task}")
    run_freeze(task, before)


def run_freeze(task: str, before: str, fit: str | None = None) -> None:
    """Freeze a fit of the working directory."""
    freeze(
        task,
        fit=Path(fit or f"fit/{task}"),
        train=Path(f"split/{task}/train.json"),
        images=Path("train"),
        before=Path(f"model/{before}"),
        backbone=Path("model/t00"),
        out=Path(f"model/{task}"),
    )
