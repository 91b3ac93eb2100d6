"""A small project with splits and a backbone, for tests of the stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.stage_project import paint_project, split_project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with pictures, splits and a backbone."""
    root = tmp_path_factory.mktemp("project")
    paint_project(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        split_project()
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, as the working directory."""
    root = tmp_path / "project"
    shutil.copytree(made, root)
    monkeypatch.chdir(root)
    return root
