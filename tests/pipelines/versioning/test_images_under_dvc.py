"""Images of tasks: needed by steps that are not finished yet, and fetched where DVC keeps them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.orchestration.run import run_pipeline
from pipelines.planning.new_project import project_files
from pipelines.project.errors import InputError
from pipelines.versioning.plan import read_plan, record_as_it_is
from tests.support.commands import call
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import LEAVE, preload_nothing, ran

DVC_YAML = f"""
stages:
  split:
    foreach: ${{tasks}}
    do:
      cmd: >-
        echo "split ${{key}}" >> ran && mkdir -p artifacts/split && cat ${{item.source}}/* > artifacts/split/${{key}} &&
        {LEAVE}
      deps:
        - ${{item.source}}
      outs:
        - artifacts/split/${{key}}
  report:
    cmd: >-
      echo '{{"last_accuracy": 0.5, "average_accuracy": 0.5, "forgetting": 0.0}}' > metrics.json && {LEAVE}
    params:
      - tasks
    deps:
      - artifacts/split
    metrics:
      - metrics.json:
          cache: false
"""
HEAD = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
FIRST = '  t01: {after: t00, source: data/raw/birds, classes: ["a"]}\n'
SECOND = '  t02: {after: t01, source: data/raw/fish, classes: ["b"]}\n'


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one task whose pictures stand in a folder of their own, and those of a second beside it."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    preload_nothing(monkeypatch)
    # The table of accuracies reads what no stage here makes.
    monkeypatch.setattr("pipelines.orchestration.run.print_summary", lambda params, until: None)
    ignored = project_files("birds", example=False)[".gitignore"]
    files = {f"data/raw/{name}/picture": name for name in ("birds", "fish")}
    files |= {"dvc.yaml": DVC_YAML, "params.yaml": f"{HEAD}tasks:\n{FIRST}", ".gitignore": f"{ignored}/ran\n"}
    return make_project(files)


def add(task: str) -> None:
    with Path("params.yaml").open("a") as file:
        file.write(task)


def test_a_finished_step_needs_no_images(project: Path) -> None:
    run_pipeline()
    shutil.rmtree("data/raw/birds")
    assert read_plan(["t01"]).stale() == []
    ran(project)
    add(SECOND)
    assert run_pipeline() == 0
    assert ran(project) == ["split t02"]
    before = Path("dvc.lock").read_bytes()
    record_as_it_is(["split@t01"])
    call(project, "dvc", "repro", "--allow-missing", "-q")
    assert (ran(project), Path("dvc.lock").read_bytes()) == ([], before)

    shutil.rmtree("artifacts")
    with pytest.raises(
        InputError, match=r"no folder data/raw/birds: `dvc checkout` brings what split@t01 left"
    ):
        run_pipeline()
    call(project, "dvc", "checkout", "-q", "split@t01")
    assert run_pipeline() == 0
    assert ran(project) == []


def test_images_that_dvc_keeps_are_fetched_where_a_step_is_still_to_be_learned(project: Path) -> None:
    add(SECOND)
    call(project, "dvc", "add", "-q", "data/raw/birds", "data/raw/fish")
    kept = subprocess.run(
        ["git", "status", "--porcelain", "-uall", "data"], capture_output=True, text=True, check=True
    )
    assert [line[3:] for line in kept.stdout.splitlines()] == ["data/raw/birds.dvc", "data/raw/fish.dvc"]
    shutil.rmtree("data/raw/birds")
    shutil.rmtree("data/raw/fish")
    assert run_pipeline() == 0
    assert ran(project) == ["split t01", "split t02"]
    assert Path("artifacts/split/t02").read_text() == "fish"

    shutil.rmtree("data/raw/birds")
    assert read_plan(["t01", "t02"]).stale() == []
    pointer = Path("data/raw/birds.dvc")
    pointer.write_text(pointer.read_text().replace("md5: ", "md5: 0", 1))  # somebody added pictures
    assert read_plan(["t01", "t02"]).reasons["split@t01"] == ["data/raw/birds is missing"]
    with pytest.raises(
        InputError, match=r"^data/raw/birds: DVC keeps it, and the cache has not it; `dvc push"
    ):
        run_pipeline()


@pytest.mark.slow
def test_an_experiment_elsewhere_has_the_images_that_dvc_keeps(project: Path) -> None:
    call(project, "dvc", "add", "-q", "data/raw/birds")
    call(project, "git", "add", "-A")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    call(project, *git, "commit", "-qm", "first")
    assert "Ran experiment" in call(project, "dvc", "exp", "run", "--temp", "-S", "seed=1")
