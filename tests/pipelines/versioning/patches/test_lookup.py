"""All stages looked at together are found as DVC finds them one by one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo, lock_repo

from pipelines.project.errors import InputError
from pipelines.versioning.patches import apply_patches
from pipelines.versioning.patches.lookup import changes_of
from pipelines.versioning.plan import read_plan
from tests.support.folders import write_project

DVC_YAML = """
stages:
  make:
    foreach: ${tasks}
    do:
      cmd: mkdir -p out/${key} && cp shared/* out/${key}
      params:
        - tasks.${key}
        - block
        - block.inner
        - other.yaml:
            - depth
      deps:
        - shared
        - shared/one
      outs:
        - out/${key}
  gather:
    cmd: cp -r out all
    deps:
      - out
    outs:
      - all
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project all of whose stages DVC has run."""
    folder = write_project(
        tmp_path_factory.mktemp("made") / "project",
        {
            "dvc.yaml": DVC_YAML,
            "params.yaml": "block: {inner: 1, list: [1, 2]}\ntasks: {t1: {a: 1}, t2: {a: 2}, t3: {a: 3}}\n",
            "other.yaml": "depth: 1\n",
            "shared/one": "1",
            "shared/two": "2",
            ".gitignore": "/out/\n/all/\n",
        },
    )
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "project"))
    return tmp_path / "project"


def alone() -> dict[str, Any]:
    """What DVC finds, stage by stage."""
    with contextlib.closing(Repo()) as repo, lock_repo(repo):
        return {s.addressing: s.status().get(s.addressing, []) for s in repo.stage.load_all("dvc.yaml")}


def together() -> dict[str, Any]:
    assert "lookup" in apply_patches()
    with contextlib.closing(Repo()) as repo, lock_repo(repo):
        return changes_of(repo, repo.stage.load_all("dvc.yaml"))


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda: None, id="nothing"),
        pytest.param(lambda: Path("shared/one").write_text("other"), id="an-input"),
        pytest.param(lambda: Path("shared/three").write_text("3"), id="a-file-more"),
        pytest.param(lambda: Path("shared/one").unlink(), id="an-input-is-gone"),
        pytest.param(lambda: Path("out/t2/one").write_text("other"), id="an-output"),
        pytest.param(lambda: shutil.rmtree("out/t3"), id="an-output-is-gone"),
        pytest.param(lambda: shutil.rmtree(".dvc/cache/files"), id="the-cache-is-gone"),
        pytest.param(lambda: edit("params.yaml", "inner: 1", "inner: 2"), id="a-parameter"),
        pytest.param(lambda: edit("params.yaml", "{a: 2}", "{a: 2, b: 1}"), id="a-task"),
        pytest.param(lambda: edit("params.yaml", "inner: 1, ", ""), id="a-parameter-is-gone"),
        pytest.param(lambda: edit("other.yaml", "depth: 1", "depth: 2"), id="another-file"),
        pytest.param(lambda: edit("dvc.yaml", "mkdir -p", "mkdir"), id="a-command"),
        pytest.param(lambda: Path("dvc.lock").unlink(), id="no-lock"),
    ],
)
def test_stages_are_found_as_dvc_finds_them(change: Callable[[], object], project: Path) -> None:
    change()
    assert together() == alone()


def test_afterwards_dvc_reads_again(project: Path) -> None:
    assert together()["make@t1"] == []
    edit("params.yaml", "inner: 1", "inner: 2")
    Path("shared/one").write_text("other")
    assert together() == alone() != {}


def test_a_project_that_a_stage_writes_to_is_not_read(project: Path) -> None:
    entry = {"pid": os.getppid(), "cmd": "dvc repro"}
    Path(".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(project / "out/t2"): entry}, "read": {}}))
    with pytest.raises(InputError, match="dvc"):
        read_plan(["t1", "t2", "t3"])


def test_what_dvc_would_read_without_end_is_refused_before_it_reads(project: Path) -> None:
    os.mkfifo("shared/pipe.png")

    with pytest.raises(
        InputError, match=r"^shared/pipe\.png: a pipe among the files, which is not read; remove"
    ):
        read_plan(["t1", "t2", "t3"])
