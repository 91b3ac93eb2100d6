"""A small project with splits and a backbone, for tests of the stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.stages.backbone import backbone
from pipelines.stages.start import start
from tests.support.parameters import settings
from tests.support.pictures import paint
from tests.support.task_splits import split_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with pictures, splits and a backbone."""
    root = tmp_path_factory.mktemp("project")
    for index, name in enumerate("abcd"):
        paint(root / "pictures/train" / name, index, 5)
        paint(root / "pictures/test" / name, 10 + index, 2)
    (root / "params.yaml").write_text(settings())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        start(out=Path("split/t00"), evaluation=Path("evaluation/t00"), gate=Path("gate/t00"))
        backbone(out=Path("model/t00"))
        for task, before in (("t01", "t00"), ("t02", "t01")):
            split_task(task, before)
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, as the working directory."""
    root = tmp_path / "project"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root
