"""Projects that share a Prefect server keep apart, and so do the clones of one that hands nothing on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.orchestration.names import project_name
from pipelines.orchestration.one_clone import PastRun, other_clone
from pipelines.orchestration.owners import Deployed, require_own
from pipelines.orchestration.repository import clone_place, repository_id
from pipelines.project.environment import WORKERS_PROJECT
from pipelines.project.errors import InputError
from tests.support.parameters import settings

OURS = Deployed("birds", "gpu", named=True, repository="1a1a1a1a1a1a")


def git(*arguments: str, folder: Path) -> str:
    person = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    command = ["git", "-C", str(folder), *person, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("other", "fault"),
    [
        (OURS, None),
        (OURS._replace(pool="cpu"), None),
        (OURS._replace(named=False, repository=""), None),  # an older version's, of this name
        (OURS._replace(name="cats", pool="cats", repository="2b2b2b2b2b2b"), None),
        (OURS._replace(name="workers", pool="other", named=False, repository=""), None),
        (OURS._replace(repository="2b2b2b2b2b2b"), r"project: learn/birds is another project's, whose first .* 2b2b"),
        (OURS._replace(name="cats", repository="2b2b2b2b2b2b"), r"workers\.pool: gpu is the pool of learn/cats"),
        (OURS._replace(name="cats", repository=""), r"workers\.pool: gpu is the pool of learn/cats"),
        (OURS._replace(name="fowl"), r"learned twice; delete it \(.* learn/fowl sweep/fowl tend/fowl\), or write fowl"),
        (OURS._replace(name="workers", named=False, repository=""), r"learn/workers runs on .* write workers to keep"),
    ],
)  # fmt: skip
def test_a_name_and_a_pool_belong_to_one_project(other: Deployed, fault: str | None) -> None:
    if fault is None:
        require_own([other], OURS)
        return
    with pytest.raises(InputError, match=fault) as caught:
        require_own([other], OURS)
    assert len(str(caught.value)) <= 300


def test_a_project_is_called_as_it_says_or_as_its_repository_in_every_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, clone, other = tmp_path / "Song Birds", tmp_path / "one", tmp_path / "other"
    for folder in (origin, other):
        git("init", "-q", str(folder), folder=tmp_path)
        git("commit", "-q", "--allow-empty", "-m", folder.name, folder=folder)
    git("clone", "-q", str(origin), str(clone), folder=tmp_path)
    found = {}
    for folder in (origin, clone, other):
        monkeypatch.chdir(folder)
        (folder / "params.yaml").write_text(settings())
        found[folder.name] = (project_name(), repository_id())
    assert [name for name, _ in found.values()] == ["song-birds", "song-birds", "other"]
    assert found["Song Birds"] == found["one"]
    assert len({first for _, first in found.values()}) == 2

    (clone / "params.yaml").write_text(settings(project="birds"))
    monkeypatch.chdir(clone)
    assert project_name() == "birds"
    monkeypatch.setenv(WORKERS_PROJECT, "cats")  # what the deployment says
    assert project_name() == "cats"
    (tmp_path / "no repository").mkdir()
    monkeypatch.chdir(tmp_path / "no repository")
    monkeypatch.delenv(WORKERS_PROJECT)
    assert (project_name(), repository_id()) == ("no-repository", "")


def test_worktrees_share_their_branches_and_clones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "one"
    git("init", "-q", str(one), folder=tmp_path)
    git("commit", "-q", "--allow-empty", "-m", "first", folder=one)
    git("worktree", "add", "-q", "--detach", str(tmp_path / "two"), folder=one)
    git("clone", "-q", str(one), str(tmp_path / "three"), folder=tmp_path)
    places = {}
    for name in ("one", "two", "three"):
        monkeypatch.chdir(tmp_path / name)
        places[name] = clone_place(branches=True), clone_place(branches=False)
    assert places["one"][0] == places["two"][0] != places["three"][0]
    assert len({folder for _, folder in places.values()}) == 3


def test_a_run_is_refused_where_runs_of_the_same_deployment_were_in_another_clone() -> None:
    def past(deployed: str, clone: str | None) -> PastRun:
        return PastRun(deployed, {} if clone is None else {"sdlora.clone": clone, "other": 1})

    assert other_clone("a:/one", "v2", []) is None
    assert other_clone("a:/one", "v2", [past("v2", "a:/one"), past("v2", None)]) is None
    assert other_clone("a:/one", "v2", [past("v1", "b:/two")]) is None  # deployed anew since
    assert other_clone("a:/one", "v2", [past("v2", "a:/one"), past("v2", "b:/two")]) == "b:/two"
