"""A command works for the project that its caller stands in, and takes their paths from where they stand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.cli.place import Caller
from pipelines.ledger.find_step import find_model
from pipelines.project.layout import project_root
from tests.support.commands import call_here, environment, said_here
from tests.support.folders import replace, write_project
from tests.support.pictures import paint
from tests.support.repository import REPOSITORY


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without tasks, whose path has blanks and a dollar, and images in it."""
    texts = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("params.yaml", "dvc.yaml")}
    texts["params.yaml"] = texts["params.yaml"].partition("tasks:\n")[0] + "tasks: {}\n"
    folder = write_project(tmp_path / "my $x project", texts)
    paint(folder / "data" / "raw" / "own" / "ant", 0, 2)
    monkeypatch.chdir(folder)
    return folder


def test_a_task_is_added_from_below_by_a_path_from_there(project: Path) -> None:
    said = call_here(project / "data", "add-task", "raw/own")
    assert "t01: {after: t00, source: data/raw/own, classes: " in said
    call_here(project / "data" / "raw" / "own", "add-task", ".", status=2)
    assert "source: data/raw/own" in (project / "params.yaml").read_text(encoding="utf-8")


def test_a_parameter_set_is_found_from_below(project: Path) -> None:
    call_here(project, "add-task", "data/raw/own")
    (project / "data" / "set.yaml").write_text("seed: 7\n")
    call_here(project / "data", "run", "--params", "set.yaml", "--dry", "--force")
    assert "\nseed: 7 " in (project / "params.yaml").read_text(encoding="utf-8")


def test_status_works_from_below_into_closed_streams_and_says_nothing_of_itself(project: Path) -> None:
    call_here(project, "add-task", "data/raw/own")
    for streams, said in ((">&- 2>&-", ""), ("", "are not up to date: sdlora run")):
        done = subprocess.run(
            ["sh", "-c", f"exec sdlora status {streams}"],
            cwd=project / "data",
            env={**environment(), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout


def test_a_folder_without_git_is_one_line_and_dvc_may_do_without(project: Path) -> None:
    call_here(project, "add-task", "data/raw/own")
    shutil.rmtree(project / ".git")
    line = said_here(project, "status", status=2)[1]
    assert line == (
        f"error: {project}: no Git repository; make one (git init), or do without (dvc config core.no_scm true)\n"
    )
    replace(project / ".dvc" / "config", "[core]\n", "[core]\n    no_scm = true\n")
    assert "are not up to date" in call_here(project, "status")


@pytest.mark.parametrize("name", ["${x}", "{", "a}"])
def test_a_path_with_braces_which_dvc_does_not_take_is_one_line(name: str, project: Path) -> None:
    moved = project.rename(project.parent / name)
    line = f"error: {moved}: DVC takes no braces in the path of a project; move it, or rename the folder\n"
    assert said_here(moved, "status", status=2)[1] == line
    assert said_here(project.parent, "init", str(moved / "new"), status=2)[1].startswith("error: ")
    assert not (moved / "new").exists()


def test_a_project_ends_where_a_repository_begins(tmp_path: Path) -> None:
    project = write_project(tmp_path / "outer", {"params.yaml": "", "dvc.yaml": ""})
    inner = write_project(project / "inner", {"params.yaml": ""})
    assert project_root(project) == project
    assert project_root(project / "a" / "b") == project
    assert project_root(inner) is None
    assert project_root(tmp_path) is None
    line = said_here(inner, "status", status=2)[1]
    assert line.startswith(f"error: no dvc.yaml in {inner}: run sdlora in the folder of the project")


def test_a_stage_works_in_the_folder_that_it_is_called_in_and_no_other(project: Path) -> None:
    assert "error: no params.yaml in" in said_here(project / "data", "code", "--out", "x", status=2)[1]


def test_a_step_is_found_from_below_and_a_name_is_no_path(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "artifacts" / "model" / "t01").mkdir(parents=True)
    monkeypatch.chdir(project / "data")
    assert find_model("t01") == Path("../artifacts/model/t01")
    caller = Caller(Path.cwd())
    os.chdir(project)
    assert caller.path(Path("raw/own")) == Path("data/raw/own")
    assert caller.path(Path("/x")) == Path("/x")
    assert (caller.path_or_name("t01"), caller.path_or_name("raw")) == ("t01", "data/raw")
