"""`sdlora init` writes a project, and nothing over what is there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.planning.new_project import new_project, project_files
from pipelines.planning.tasks import add_task
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from tests.support.pictures import paint
from tests.support.repository import REPOSITORY


def test_a_new_project_has_stages_parameters_and_no_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = new_project(tmp_path / "birds")
    monkeypatch.chdir(tmp_path / "birds")
    assert lines[-1].startswith(f"next: cd {tmp_path / 'birds'} && put images into data/raw")
    assert (
        subprocess.run(["git", "rev-parse", "--git-dir"], capture_output=True, check=True).stdout == b".git\n"
    )
    text = Path("params.yaml").read_text()
    assert text.endswith("\ntasks: {}\n")
    assert "\nfetch: {}\n" in text
    paint(Path("data/raw/birds/wren"), 0, 2)
    add_task("data/raw/birds")
    assert list(Params.load().tasks) == ["t01"]
    assert len(Path("README.md").read_text().splitlines()) <= 12


def test_the_example_has_the_parameters_of_the_repository() -> None:
    files = project_files("digits", example=True)
    assert files["params.yaml"] == (REPOSITORY / "params.yaml").read_text()


def test_stages_are_those_of_the_repository_but_for_the_sources() -> None:
    """The code of an installed program is in no folder that DVC watches, so the stage looks at it every time."""
    ours = (REPOSITORY / "dvc.yaml").read_text().splitlines()
    theirs = project_files("birds", example=False)["dvc.yaml"].splitlines()
    changed = [(old, new) for old, new in zip(ours, theirs, strict=True) if old != new]
    assert [old.strip() for old, _ in changed] == ["deps: [pipelines, sdlora]"]
    assert changed[0][1].strip().startswith("always_changed: true")


@pytest.mark.parametrize("name", ["params.yaml", ".dvc/config", "README.md"])
def test_what_is_there_stays_as_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: there already.*choose another folder"):
        new_project(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(name).name]
    assert (tmp_path / name).read_text() == "mine"


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    new_project(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.yaml")}
    lines = new_project(tmp_path)
    assert len(lines) == 2
    assert {path: path.read_bytes() for path in before} == {
        tmp_path / name: text.encode()
        for name, text in project_files(tmp_path.name, example=False).items()
        if name.endswith(".yaml")
    }


def test_a_folder_inside_a_git_repository_gets_none_of_its_own(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    lines = new_project(tmp_path / "birds")
    assert not (tmp_path / "birds" / ".git").exists()
    assert len(lines) == 2
