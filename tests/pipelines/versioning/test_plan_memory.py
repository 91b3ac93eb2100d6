"""A plan that asks DVC only about the stages to which something has happened says what one of all stages says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.project.environment import PLAIN_DVC
from pipelines.project.layout import PLAN_MEMORY
from pipelines.versioning import plan_memory
from pipelines.versioning.plan import Plan, read_plan
from pipelines.versioning.plan_memory import PlanMemory
from tests.support.folders import write_project

DVC_YAML = """
stages:
  make:
    foreach: ${tasks}
    do:
      cmd: mkdir -p out/${key} && cp -r ${item.source}/. shared out/${key}
      params:
        - tasks.${key}
        - block
        - other.yaml:
            - depth
      deps:
        - shared
        - ${item.source}
      outs:
        - out/${key}
  next:
    foreach: ${tasks}
    do:
      cmd: cp out/${key}/a next/${key}
      deps:
        - out/${key}/a
      outs:
        - next/${key}
  gather:
    cmd: cp -r out all
    params:
      - tasks
    deps:
      - out
    outs:
      - all
"""
TASKS = ["t1", "t2", "t3"]
ALL = [f"{kind}@{task}" for kind in ("make", "next") for task in TASKS] + ["gather"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project all of whose stages DVC has run."""
    folder = write_project(
        tmp_path_factory.mktemp("made") / "project",
        {
            "dvc.yaml": DVC_YAML,
            "params.yaml": "block: {inner: 1}\nfetch: {}\ntasks:\n"
            + "".join(f"  {task}: {{source: data/{task}}}\n" for task in TASKS),
            "other.yaml": "depth: 1\n",
            "shared/one": "1",
            **{f"data/{task}/{name}": task + name for task in TASKS for name in ("a", "b")},
            ".gitignore": "/out/\n/all/\n/next/\n/data/t3\n",
            "next/.gitkeep": "",
            ".sdlora/.keep": "",
        },
    )
    for command in (["add", "-q", "data/t3"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory, of which a plan was made before."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "project"))
    monkeypatch.setattr(plan_memory, "_SETTLED", 0)  # what waits for the file system's clock
    assert read_plan(TASKS).stale() == []
    return tmp_path / "project"


def remembered() -> list[str]:
    return list(PlanMemory(partial_checkout=False).stages)


def afresh(tasks: list[str]) -> Plan:
    PLAN_MEMORY.unlink()
    return read_plan(tasks)


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def in_place(path: str) -> None:
    """Change a byte, and nothing else that a listing shows."""
    facts, data = os.stat(path), bytearray(Path(path).read_bytes())
    data[0] ^= 1
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def stored(folder: str) -> Path:
    """The object in the cache of a file of an output."""
    listed = json.loads(next(Path(".dvc/cache/files/md5").glob(f"*/*{_md5(folder)[2:]}")).read_bytes())
    return Path(".dvc/cache/files/md5", listed[0]["md5"][:2], listed[0]["md5"][2:])


def _md5(out: str) -> str:
    lines = Path("dvc.lock").read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if line.endswith(f"path: {out}"))
    return lines[place + 2].split()[1]  # after `hash: md5`


CHANGES: list[tuple[str, Callable[[], object], set[str]]] = [
    ("nothing", lambda: None, set()),
    ("an output", lambda: in_place("out/t2/a"), {"make@t2", "next@t2", "gather"}),
    ("an output is gone", lambda: shutil.rmtree("out/t3"), {"make@t3", "next@t3", "gather"}),
    ("an input", lambda: in_place("data/t1/b"), {"make@t1"}),
    ("an input more", lambda: Path("data/t1/c").touch(), {"make@t1"}),
    ("an input is gone", lambda: shutil.rmtree("data/t1"), {"make@t1"}),
    ("an input that DVC keeps is gone", lambda: shutil.rmtree("data/t3"), {"make@t3"}),
    ("an input of several", lambda: in_place("shared/one"), {"make@t1", "make@t2", "make@t3"}),
    ("a link to a folder", lambda: os.symlink("../..", "data/t1/link"), {"make@t1"}),
    ("an object of the cache", lambda: in_place(str(stored("out/t2"))), {"make@t2", "next@t2", "gather"}),
    ("an object of the cache is gone", lambda: stored("out/t2").unlink(), {"make@t2", "next@t2", "gather"}),
    ("the cache is gone", lambda: shutil.rmtree(".dvc/cache/files"), set(ALL)),
    (
        "a task",
        lambda: edit("params.yaml", "{source: data/t2}", "{source: data/t2, x: 1}"),
        {"make@t2", "next@t2", "gather"},
    ),
    ("a task more", lambda: edit("params.yaml", "  t3: ", "  t4: {source: data/t1}\n  t3: "), {"gather"}),
    (
        "a task less",
        lambda: edit("params.yaml", "  t3: {source: data/t3}\n", ""),
        {"make@t3", "next@t3", "gather"},
    ),
    ("a parameter", lambda: edit("params.yaml", "inner: 1", "inner: 2"), set(ALL)),
    ("a parameter of another kind", lambda: edit("params.yaml", "inner: 1", "inner: 1.0"), set(ALL)),
    (
        "another file of parameters",
        lambda: edit("other.yaml", "depth: 1", "depth: 2"),
        {"make@t1", "make@t2", "make@t3"},
    ),
    ("a command", lambda: edit("dvc.yaml", "cp -r out", "cp -rp out"), set(ALL)),
    (
        "a stage that reads other tasks",
        lambda: edit("dvc.yaml", "cp -r out", "cp -r ${tasks.t1.source}"),
        set(ALL),
    ),
    ("an entry of the lock", lambda: edit("dvc.lock", "cmd: cp -r out", "cmd: cp -r ./out"), {"gather"}),
    ("a lock that DVC did not write", lambda: edit("dvc.lock", "schema: '2.0'", 'schema: "2.0"'), set(ALL)),
    ("no lock", lambda: Path("dvc.lock").unlink(), set(ALL)),
    (
        "a remote",
        lambda: edit(".dvc/config", "[core]", "['remote \"r\"']\n    url = /r\n[core]\n    remote = r"),
        set(ALL),
    ),
    ("what is ignored", lambda: Path("data/.dvcignore").write_text("b\n"), {"make@t1", "make@t2", "make@t3"}),
]


@pytest.mark.parametrize(("change", "happened"), [pytest.param(*rest, id=name) for name, *rest in CHANGES])
@pytest.mark.usefixtures("project")
def test_a_plan_from_memory_is_the_plan_of_all_stages(
    change: Callable[[], object], happened: set[str]
) -> None:
    assert set(remembered()) == set(ALL)

    change()

    assert set(ALL) - set(remembered()) == happened
    tasks = [name for name in ("t1", "t2", "t3", "t4") if f"{name}:" in Path("params.yaml").read_text()]
    assert read_plan(tasks) == read_plan(tasks) == afresh(tasks)


@pytest.mark.usefixtures("project")
def test_what_is_in_the_remote_alone_is_remembered_for_those_who_take_it_from_there() -> None:
    edit(".dvc/config", "[core]", "['remote \"r\"']\n    url = /r\n[core]\n    remote = r")
    shutil.rmtree("out/t1")

    partial = [read_plan(TASKS, partial_checkout=True) for _ in range(2)]
    whole = read_plan(TASKS)

    assert partial[0] == partial[1]
    assert partial[0].reasons["make@t1"] == []
    assert "out/t1 is missing" in whole.reasons["make@t1"]
    assert whole == afresh(TASKS)


@pytest.mark.parametrize(
    ("reads", "old", "new"),
    [
        pytest.param(
            "params:\n        - params.yaml:\n      deps:", "data/t2}", "data/t2, x: 1}", id="all-keys"
        ),
        pytest.param("params:\n        - tasks\n      deps:", "data/t2}", "data/t2, x: 1}", id="all-tasks"),
        pytest.param("deps:\n        - params.yaml", "inner: 1}", "inner: 1} # one", id="the-file"),
    ],
)
@pytest.mark.usefixtures("project")
def test_a_stage_of_a_task_that_reads_all_of_params_is_asked_about_after_any_edit(
    reads: str, old: str, new: str
) -> None:
    edit("dvc.yaml", "deps:\n        - out/${key}/a", f"{reads}\n        - out/${{key}}/a")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    assert read_plan(TASKS).stale() == []
    assert set(remembered()) == set(ALL)

    edit("params.yaml", old, new)

    assert "next@t1" not in remembered()
    plan = read_plan(TASKS)
    assert "next@t1" in plan.stale()
    assert plan == afresh(TASKS)


@pytest.mark.usefixtures("project")
def test_nothing_is_remembered_of_a_file_that_has_just_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_memory, "_SETTLED", 10**12)
    PLAN_MEMORY.unlink()

    assert read_plan(TASKS).stale() == []
    assert remembered() == []


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"setup": {}}', "\0"])
def test_a_memory_that_is_none_is_made_anew(text: str) -> None:
    PLAN_MEMORY.write_text(text)

    assert read_plan(TASKS).stale() == []
    assert set(remembered()) == set(ALL)


@pytest.mark.usefixtures("project")
def test_plain_dvc_is_asked_about_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAIN_DVC, "1")

    assert remembered() == []


@pytest.mark.usefixtures("project")
def test_a_plan_of_a_chain_to_which_nothing_happened_does_not_load_dvc() -> None:
    plan = f"from pipelines.versioning.plan import read_plan; print(read_plan({TASKS}).stale(), 'dvc' in sys.modules)"
    code = f"import sys; {plan}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[] False\n"
