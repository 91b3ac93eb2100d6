"""What is hashed once is what DVC hashes several times, and what a command changes is hashed again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dvc.stage
import pytest
from dvc.output import Output
from dvc.repo import Repo

from pipelines.versioning.patches import hashing
from pipelines.versioning.patches.hashing import Hashes

DVC_YAML = """
stages:
  gather:
    cmd: python make.py
    deps:
      - make.py
      - many
      - many/a
      - many/a/one
    outs:
      - out
"""
MAKE = """
import pathlib
pathlib.Path("out").write_text("made")
"""


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path]) -> Path:
    folder = make_project(
        {
            "dvc.yaml": DVC_YAML,
            "params.yaml": "tasks: {}\n",
            "make.py": MAKE,
            "many/a/one": "1",
            "many/a/b/two": "2",
            "many/c/three": "3",
            "many/four": "4",
            "many/c/left.out": "no",
            ".dvcignore": "*.out\n",
            ".gitignore": "/out\n",
            "elsewhere/five": "5",
        }
    )
    (folder / "many/empty").mkdir()
    (folder / "many/a/link").symlink_to("one")
    (folder / "many/to-a-folder").symlink_to(folder / "elsewhere")
    return folder


@pytest.fixture
def seen(project: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the files of each folder of the project were hashed."""
    counts: Counter[str] = Counter()
    build = hashing._build_files

    def counted(folder: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        counts[os.path.relpath(folder, project)] += 1
        return build(folder, *args, **kwargs)

    monkeypatch.setattr(hashing, "_build_files", counted)
    return counts


def repro(*, module: str) -> str:
    """Run all stages by a DVC; return what dvc.lock says then."""
    Path("dvc.lock").unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", module, "repro", "-q", "--no-run-cache"], check=True)
    return Path("dvc.lock").read_text()


def hashed(parts: Callable[[Any], list[Any]], find: Callable[[Any], Any]) -> dict[str, Any]:
    with contextlib.closing(Repo()) as repo:
        return {part.def_path: find(part) for stage in repo.index.stages for part in parts(stage)}


def test_a_hash_is_the_one_of_dvc(project: Path) -> None:
    known = Hashes()
    ours = hashed(lambda stage: stage.deps, lambda part: known.of(part)[2].hash_info)
    theirs = hashed(lambda stage: stage.deps, lambda part: part.get_hash())

    assert ours == theirs
    assert {str(value.value).endswith(".dir") for value in ours.values()} == {True, False}


def test_size_and_number_of_files_are_those_of_dvc(project: Path) -> None:
    assert repro(module="pipelines.versioning.patches") == repro(module="dvc")


def test_each_folder_is_looked_at_once_however_many_ask(seen: Counter[str]) -> None:
    known = Hashes()
    for _ in range(2):
        hashed(lambda stage: stage.deps, known.of)

    assert seen == dict.fromkeys(["many", "many/a", "many/a/b", "many/c", "many/empty"], 1)


def test_a_folder_without_files_is_as_dvc_has_it(project: Path) -> None:
    known = Hashes()
    Path("many/to-a-folder").unlink()
    for path in [path for path in Path("many").rglob("*") if not path.is_dir()]:
        path.unlink()
    for part in ("many", "many/a"):
        with contextlib.closing(Repo()) as repo:
            dep = next(d for stage in repo.index.stages for d in stage.deps if d.def_path == part)
            assert known.of(dep)[2].hash_info == dep.get_hash()


@pytest.mark.filterwarnings("ignore:_NoneStep")  # DVC's tries
def test_a_stage_that_runs_has_each_dep_hashed_once_before_and_once_after(
    seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in ((Output, "_build"), (dvc.stage, "run_stage"), (dvc.stage.Stage, "save")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back what `use` changes
    hashing.use()
    with contextlib.closing(Repo()) as repo:
        repo.reproduce()

    assert Path("out").read_text() == "made"
    assert seen == dict.fromkeys(["many", "many/a", "many/a/b", "many/c", "many/empty"], 2)


def test_what_a_command_changes_is_recorded_as_it_is_afterwards(project: Path) -> None:
    text = MAKE + 'pathlib.Path("many/a/b/two").write_text("other")\n'
    Path("make.py").write_text(text)
    ours = repro(module="pipelines.versioning.patches")
    Path("many/a/b/two").write_text("2")
    theirs = repro(module="dvc")

    assert ours == theirs
    assert Path("many/a/b/two").read_text() == "other"
