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

from pipelines.orchestration.run import finish, run_pipeline
from pipelines.project.environment import DVC_SOCKET
from pipelines.runtime.processes import end_group
from pipelines.versioning import remote as sharing
from pipelines.versioning import repro
from pipelines.versioning.file_hashes import md5_of
from pipelines.versioning.plan import read_plan
from pipelines.versioning.remote import unpushed
from pipelines.versioning.repro import StageFailedError
from tests.support.commands import call, call_here
from tests.support.finished_chain import entries, hashes
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import EVALUATE, REPORT, ran
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("preloaded")]

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
        - artifacts/train/${key}
  fit:
    foreach: ${tasks}
    do:
      cmd: ./fit ${key} ${item.after}
      params:
        - adapter.rank
      deps:
        - fit
        - artifacts/split/${key}/classes
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
mkdir -p artifacts/split/$1 artifacts/train
cat artifacts/split/$3/classes > artifacts/split/$1/classes
echo $1 >> artifacts/split/$1/classes
cat $2/* > artifacts/train/$1
"""
FIT = """#!/bin/sh
for task in t01 t02 t03 t04; do
    if test $task = $1 || grep -q "^  method: joint" params.yaml; then
        test -f artifacts/train/$task || exit 1
    fi
    test $task != $1 || break
done
echo "fit $1" >> ran
mkdir -p artifacts/model
(echo "$1 after $2"; grep "^  rank:" params.yaml) > artifacts/model/$1
"""
IN_A_FOLDER = "    url = ../../remote\n"


@pytest.fixture
def remote(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The DVC remote that all machines share: a folder, or a bucket of an S3 server on this machine."""
    if getattr(request, "param", "folder") == "folder":
        yield IN_A_FOLDER
        return
    monkeypatch.delenv(DVC_SOCKET)  # a run's own server of DVC loads what speaks to S3
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


@pytest.fixture(scope="module")
def learned(preloaded: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `first` is where the remote is a folder, beside that folder."""
    root = tmp_path_factory.mktemp("learned")
    (root / "remote").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        learn_three_tasks(root / "first", IN_A_FOLDER, monkeypatch)
    return root


@pytest.fixture
def first(learned: Path, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has learned three tasks, each from a folder of its own, and shared all of it."""
    folder = tmp_path / "first"
    if remote != IN_A_FOLDER:
        learn_three_tasks(folder, remote, monkeypatch)
        return folder
    shutil.copytree(learned, tmp_path, dirs_exist_ok=True)
    work_alone_in(folder, monkeypatch)
    return folder


def work_alone_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to a folder whose stages are shell scripts, with a server named that does not answer."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.chdir(folder)


def learn_three_tasks(folder: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    work_alone_in(folder, monkeypatch)
    finish(lambda: None)


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


def pictures(folder: Path) -> set[str]:
    """The contents that a machine holds in DVC's cache and that are images."""
    files = (path for path in (folder / ".dvc/cache/files").rglob("*") if path.is_file())
    return {text for text in (path.read_text() for path in files) if text.startswith("the picture of ")}


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize("remote", ["folder", "s3"], indirect=True)
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
    assert read_plan([f"t{number:02d}" for number in range(1, 5)], partial_checkout=True).stale() == [
        *("split@t04", "fit@t04", "evaluate@t04", "report")
    ]
    finish(lambda: None)
    assert ran(folder) == ["split t04", "fit t04", "evaluate t04", "report"]
    assert pictures(folder) == {"the picture of t04"}
    # A fit stands on the models of all steps before, and reads no other output of theirs.
    assert (folder / "artifacts/model/t02").exists()
    assert not (folder / "artifacts/fit/t02").exists()
    assert finish(lambda: None) == []


def test_a_fit_that_really_runs_fetches_the_images_of_its_task(
    fresh: Callable[[tuple[str, ...]], Path],
) -> None:
    folder = fresh(tuple(f"t{number:02d}" for number in range(1, 4)))
    replace(folder / "params.yaml", "  rank: 10 ", "  rank: 9 ")
    finish(lambda: None)
    assert [line for line in ran(folder) if "fit" in line or "split" in line] == [
        "fit t01",
        "fit t02",
        "fit t03",
    ]
    assert pictures(folder) == {f"the picture of t{number:02d}" for number in range(1, 4)}


def test_a_fit_that_the_run_cache_has_fetches_no_images(
    first: Path, fresh: Callable[[tuple[str, ...]], Path]
) -> None:
    """Its dvc.lock is that of before: another machine has learned with the other rank meanwhile."""
    lock = (first / "dvc.lock").read_text()
    replace(first / "params.yaml", "  rank: 10 ", "  rank: 9 ")
    finish(lambda: None)
    folder = fresh(tuple(f"t{number:02d}" for number in range(1, 4)))
    (folder / "dvc.lock").write_text(lock)
    finished = finish(lambda: None)
    assert {row["from cache"] for row in finished} == {"yes"}
    assert {row["stage"] for row in finished} >= {"fit@t01", "fit@t02", "fit@t03"}
    assert (folder / "artifacts/model/t03").read_text() == (first / "artifacts/model/t03").read_text()
    assert not pictures(folder)


def test_a_joint_fit_fetches_the_images_of_all_tasks_before(
    fresh: Callable[[tuple[str, ...]], Path],
) -> None:
    folder = fresh(tuple(f"t{number:02d}" for number in range(1, 4)))
    replace(folder / "params.yaml", "  method: sdlora ", "  method: joint ")
    replace(folder / "params.yaml", "  head: rgda ", "  head: linear ")
    replace(folder / "params.yaml", "  temperature: auto", "  temperature: null")
    replace(folder / "params.yaml", "  unknown: relative", "  unknown: null")
    with (folder / "params.yaml").open("a") as file:
        file.write("  t04: {after: t03, source: images/t04, classes: [t04]}\n")
    finish(lambda: None)
    assert ran(folder) == ["split t04", "fit t04", "evaluate t04", "report"]
    assert pictures(folder) == {f"the picture of t{number:02d}" for number in range(1, 5)}


def test_what_another_machine_changed_is_not_taken_for_finished(
    fresh: Callable[[tuple[str, ...]], Path],
) -> None:
    folder = fresh(())
    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    lock["stages"]["fit@t03"]["outs"][0]["md5"] = "0" * 32
    yaml.dump(lock, folder / "dvc.lock")
    stale = read_plan([f"t{number:02d}" for number in range(1, 4)], partial_checkout=True).stale()
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


@pytest.fixture(scope="module")
def stored(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished chain of the real stages, pushed to a folder beside it, and committed."""
    folder = tmp_path_factory.mktemp("stored") / "project"
    shutil.copytree(finished[0], folder)
    call(folder, "dvc", "remote", "add", "-d", "storage", str(folder.parent / "storage"))
    call(folder, "dvc", "push", "-q", "--run-cache")
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org")
    call(folder, "git", "add", "-A")
    call(folder, *git, "commit", "-q", "-m", "learned")
    return folder


@pytest.fixture
def worker(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty clone of it without the pictures of its tasks, as the working directory."""
    call(tmp_path, "git", "clone", "-q", str(stored), "worker")
    shutil.rmtree(tmp_path / "worker/pictures")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.chdir(tmp_path / "worker")
    return tmp_path / "worker"


def training_objects(folder: Path, task: str) -> list[str]:
    """The objects of a task's training images: what DVC names the folder by, and the file in it."""
    stage = entries(folder)[f"split@{task}"]
    assert isinstance(stage, dict)
    listing = next(out["md5"] for out in stage["outs"] if out["path"] == f"artifacts/train/{task}")
    return [listing, md5_of(folder / f"artifacts/train/{task}/train.arrow")]


def held(root: Path, objects: list[str]) -> list[bool]:
    """Whether a cache or a remote has each of some objects."""
    return [(root / "files/md5" / md5[:2] / md5[2:]).is_file() for md5 in objects]


def test_a_worker_learns_a_task_to_the_same_bytes_without_the_training_images_of_those_before(
    stored: Path, worker: Path, grown: tuple[Path, str]
) -> None:
    whole, _ = grown
    call_here(worker, "add-task", "more")
    finished = finish(lambda: None)

    assert [row["stage"].partition("@")[2] for row in finished] == ["t03"] * 5 + [""]
    for task in ("t01", "t02"):
        assert held(stored.parent / "storage", training_objects(stored, task)) == [True, True]
        assert held(worker / ".dvc/cache", training_objects(stored, task)) == [False, False]
        assert not (worker / "artifacts/train" / task).exists()
    assert entries(worker) == entries(whole)
    expected = hashes(whole)
    here = hashes(worker)
    assert here == {name: expected[name] for name in here}
    assert {name for name in expected if "/t03/" in name} <= here.keys()


def test_a_worker_fetches_the_training_images_of_the_fit_that_runs_and_of_no_other(
    stored: Path, worker: Path
) -> None:
    yaml = YAML()
    lock = yaml.load(worker / "dvc.lock")
    del lock["stages"]["fit@t02"]
    yaml.dump(lock, worker / "dvc.lock")
    forgotten = worker.parent / "storage"
    shutil.copytree(stored.parent / "storage", forgotten, ignore=shutil.ignore_patterns("runs"))
    call(worker, "dvc", "remote", "modify", "storage", "url", str(forgotten))
    finished = finish(lambda: None)

    assert (finished[0]["stage"], finished[0]["from cache"]) == ("fit@t02", "no")
    assert not [row["stage"] for row in finished if str(row["stage"]).endswith("@t01")]
    assert held(worker / ".dvc/cache", training_objects(stored, "t01")) == [False, False]
    assert held(worker / ".dvc/cache", training_objects(stored, "t02")) == [True, True]
    assert entries(worker) == entries(stored)


def test_a_remote_that_is_away_is_no_reason_to_compute_what_it_holds(
    fresh: Callable[[tuple[str, ...]], Path], tmp_path: Path
) -> None:
    """A share that is not mounted yet looks like an empty folder, or none: other bytes might come of it."""
    folder = fresh(tuple(f"t{number:02d}" for number in range(1, 4)))
    replace(folder / "params.yaml", "  rank: 10 ", "  rank: 9 ")
    (tmp_path / "remote").rename(tmp_path / "away")
    with pytest.raises(
        StageFailedError, match=r"the DVC remote is the folder .*/remote, which is not there"
    ) as caught:
        finish(lambda: None)
    assert caught.value.interrupted
    assert not (folder / "ran").exists()

    (tmp_path / "away").rename(tmp_path / "remote")
    finish(lambda: None)
    assert [line for line in ran(folder) if line.startswith("fit")] == ["fit t01", "fit t02", "fit t03"]


def test_what_the_remote_did_not_take_is_pushed_by_the_next_run(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(first / "evaluate", "#!/bin/sh\n", "#!/bin/sh\n# changed\n")
    ran(first)
    remote = tmp_path / "remote"
    real = repro.run_dvc
    monkeypatch.setattr(
        sharing, "run_dvc", lambda arguments: 1 if arguments[0] == "push" else real(arguments)
    )
    with pytest.raises(
        StageFailedError, match=r"the DVC remote did not take evaluate@t01, evaluate@t02"
    ) as caught:
        finish(lambda: None)
    assert caught.value.interrupted
    monkeypatch.setattr(sharing, "run_dvc", real)

    def known() -> set[str]:
        return {path.name for path in (remote / "runs").rglob("*") if path.is_file()}

    before, done = known(), ran(first)
    assert finish(lambda: None) == []
    assert ran(first) == []
    assert done[:3] == ["evaluate t01", "evaluate t02", "evaluate t03"]
    assert len(known() - before) >= 3
    assert unpushed() == set()
