"""Machines that share a DVC remote: nothing is computed twice, and only what a stage reads is fetched."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.processes import end_group
from pipelines.run import finish, read_plan, run_pipeline
from tests.pipelines.test_run import EVALUATE, FIT, REPORT, ran, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]

DVC_YAML = """
stages:
  start:
    cmd: ./start
    deps:
      - code
    outs:
      - artifacts/model/t00
      - artifacts/split/t00
  split:
    foreach: ${tasks}
    do:
      cmd: ./split ${key} ${item.source} ${item.after}
      deps:
        - split
        - ${item.source}
        - artifacts/split/${item.after}/classes
      outs:
        - artifacts/split/${key}
        - artifacts/images/${key}
  fit:
    foreach: ${tasks}
    do:
      cmd: ./fit ${key} ${item.after}
      params:
        - adapter.rank
      deps:
        - fit
        - artifacts/images/${key}
        - artifacts/model/${item.after}
      outs:
        - artifacts/model/${key}
  evaluate:
    foreach: ${tasks}
    do:
      cmd: ./evaluate ${key}
      deps:
        - evaluate
        - artifacts/model/${key}
        - artifacts/split/${key}
      outs:
        - artifacts/evaluation/${key}
  report:
    cmd: ./report
    params:
      - tasks
    deps:
      - artifacts/evaluation
    metrics:
      - metrics.json:
          cache: false
"""
START = """#!/bin/sh
mkdir -p artifacts/split/t00 artifacts/model
echo > artifacts/split/t00/classes
echo > artifacts/model/t00
"""
SPLIT = """#!/bin/sh
echo "split $1" >> ran
mkdir -p artifacts/split/$1 artifacts/images
cat artifacts/split/$3/classes > artifacts/split/$1/classes
echo $1 >> artifacts/split/$1/classes
cat $2/* > artifacts/images/$1
"""


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The DVC remote that all machines share: a folder, or a bucket of an S3 server on this machine."""
    if getattr(request, "param", "folder") == "folder":
        yield f"    url = {tmp_path / 'remote'}\n"
        return
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ("-H", "127.0.0.1", "-p", str(port))
    with (tmp_path / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [Path(sys.executable).parent / "moto_server", *address],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        make = urllib.request.Request(f"http://127.0.0.1:{port}/shared", method="PUT")
        wait_for(lambda: accepted(make))
        yield f"    url = s3://shared/cache\n    endpointurl = http://127.0.0.1:{port}\n"
    finally:
        end_group(server)


def accepted(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def first(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has learned three tasks, each from a folder of its own, and shared all of it."""
    folder = tmp_path / "first"
    tasks = [f"t{number:02d}" for number in range(4)]
    params = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0] + "tasks:\n"
    params += "".join(
        f"  {key}: {{after: {before}, source: images/{key}, classes: [{key}]}}\n"
        for before, key in pairwise(tasks)
    )
    scripts = {"start": START, "split": SPLIT, "fit": FIT, "evaluate": EVALUATE, "report": REPORT}
    files = {"dvc.yaml": DVC_YAML, "params.yaml": params, "code": "#", **scripts}
    files |= {f"images/{key}/picture": f"the picture of {key}" for key in [*tasks[1:], "t04"]}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name in scripts:
        (folder / name).chmod(0o755)
    shutil.copytree(REPOSITORY / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    config = (folder / ".dvc/config").read_text().replace("[core]\n", "[core]\n    remote = shared\n")
    (folder / ".dvc/config").write_text(f"{config}['remote \"shared\"']\n{remote}")
    (folder / ".gitignore").write_text("/ran\n/artifacts/\n/.sdlora/\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.chdir(folder)
    finish(lambda: None)
    return folder


@pytest.fixture
def fresh(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, ...]], Path]:
    """Make an empty machine: a clone without anything that was computed or read, and without what is named."""

    def make(without: tuple[str, ...]) -> Path:
        skip = shutil.ignore_patterns("artifacts", "cache", "tmp", "ran", ".sdlora", *without)
        folder = tmp_path / "fresh"
        shutil.copytree(first, folder, ignore=skip)
        monkeypatch.chdir(folder)
        return folder

    return make


def objects(folder: Path) -> set[str]:
    """The contents that a machine holds in DVC's cache, listings left out."""
    files = (path for path in (folder / ".dvc/cache/files").rglob("*") if path.is_file())
    return {path.read_text() for path in files if not path.name.endswith(".dir")}


@pytest.mark.parametrize("remote", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_machine_without_a_lock_file_restores_everything_and_trains_nothing(
    first: Path, fresh: Callable[[tuple[str, ...]], Path]
) -> None:
    folder = fresh(("dvc.lock", "metrics.json"))
    assert run_pipeline() == 0
    assert ran(folder) == ["report"]
    for path in first.glob("artifacts/**/*"):
        if path.is_file():
            assert (folder / path.relative_to(first)).read_bytes() == path.read_bytes()


def test_a_new_task_on_an_empty_machine_fetches_no_image_of_those_before(
    fresh: Callable[[tuple[str, ...]], Path],
) -> None:
    folder = fresh(tuple(f"t{number:02d}" for number in range(1, 4)))
    assert [path.name for path in (folder / "images").iterdir()] == ["t04"]
    with (folder / "params.yaml").open("a") as file:
        file.write("  t04: {after: t03, source: images/t04, classes: [t04]}\n")
    assert read_plan([f"t{number:02d}" for number in range(1, 5)], lean=True).stale() == [
        *("split@t04", "fit@t04", "evaluate@t04", "report")
    ]
    finish(lambda: None)
    assert ran(folder) == ["split t04", "fit t04", "evaluate t04", "report"]
    held = objects(folder)
    assert {text for text in held if text.startswith("the picture of")} == {"the picture of t04"}
    assert not (folder / "artifacts/model/t02").exists()
    assert finish(lambda: None) == []


def test_what_another_machine_changed_is_not_taken_for_finished(
    fresh: Callable[[tuple[str, ...]], Path],
) -> None:
    folder = fresh(())
    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    lock["stages"]["fit@t03"]["outs"][0]["md5"] = "0" * 32
    yaml.dump(lock, folder / "dvc.lock")
    stale = read_plan([f"t{number:02d}" for number in range(1, 4)], lean=True).stale()
    assert stale == ["evaluate@t03", "report"]


def test_what_the_remote_has_lost_is_made_again(
    first: Path, fresh: Callable[[tuple[str, ...]], Path]
) -> None:
    folder = fresh(("t03",))
    (folder / "images/t03").mkdir()
    (folder / "images/t03/picture").write_text("the picture of t03")
    for path in (first.parent / "remote/files").rglob("*"):
        if path.is_file() and path.read_text().startswith("t03 after"):
            path.chmod(0o644)
            path.unlink()
    with (folder / "params.yaml").open("a") as file:
        file.write("  t04: {after: t03, source: images/t04, classes: [t04]}\n")
    finish(lambda: None)
    assert ran(folder) == ["split t04", "fit t03", "fit t04", "evaluate t04", "report"]
