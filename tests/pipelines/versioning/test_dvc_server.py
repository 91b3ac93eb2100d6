"""The fork server of DVC forks for a command: what it does, prints and ends with is DVC's own, stage by stage."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.project.environment import DVC_SOCKET, STAGE_SOCKET
from pipelines.versioning.dvc_server import dvc_server
from pipelines.versioning.repro import StageFailedError, reproduce_stage, run_dvc
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import LEAVE

DVC_YAML = """
stages:
  make:
    foreach: ${tasks}
    do:
      cmd: ./make ${key}
      params:
        - rate
      deps:
        - make
      outs:
        - out/${key}
"""
MAKE = f'#!/bin/sh\nmkdir -p out\necho said by "$1"\necho "$1" > "out/$1"\n{LEAVE}\n'


@pytest.fixture
def project(
    make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A project of three stages, and a fork server for it."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = make_project(
        {
            "dvc.yaml": DVC_YAML,
            "params.yaml": "rate: 1\ntasks: {a: {}, b: {}, c: {}}\n",
            "make": MAKE,
            ".gitignore": "/out/\n/pid\n",
        }
    )
    (folder / "make").chmod(0o755)
    with dvc_server():
        wait_for(lambda: Path(os.environ[DVC_SOCKET]).exists())
        yield folder


def server() -> psutil.Process:
    """The process that forks: the newest, beside one that is kept for other tests."""
    servers = [
        child for child in psutil.Process().children() if "pipelines.versioning.dvc_server" in child.cmdline()
    ]
    return max(servers, key=psutil.Process.create_time)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_it_leaves_what_dvc_leaves_and_passes_on_what_stages_print(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [reproduce_stage(f"make@{name}", pull=False) for name in "abc"] == [False] * 3
    assert capfd.readouterr().out == "said by a\nsaid by b\nsaid by c\n"
    ours = (project / "dvc.lock").read_bytes()
    (project / "dvc.lock").unlink()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True)
    assert (project / "dvc.lock").read_bytes() == ours


def test_a_stage_finds_the_fork_server_of_stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STAGE_SOCKET, "/somewhere")
    (project / "make").write_text(
        f'#!/bin/sh\nmkdir -p out\necho "${STAGE_SOCKET} ${DVC_SOCKET}" > "out/$1"\n'
    )
    reproduce_stage("make@a", pull=False)
    assert (project / "out/a").read_text() == "/somewhere \n"


def test_every_command_sees_the_files_as_they_are_then(project: Path) -> None:
    reproduce_stage("make@a", pull=False)
    reproduce_stage("make@b", pull=False)
    (project / "params.yaml").write_text("rate: 2\ntasks: {a: {}, b: {}, d: {}}\n")
    (project / "make").write_text(MAKE + 'echo more >> "out/$1"\n')
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "make@b"], check=True)  # another terminal
    for name in "abd":
        reproduce_stage(f"make@{name}", pull=False)
    assert (project / "out/a").read_text() == "a\nmore\n"
    assert run_dvc(["status", "--quiet"]) == 0
    (project / "out/a").unlink()
    assert reproduce_stage("make@a", pull=False) is True


def test_what_fails_fails_as_in_a_process_of_its_own(project: Path) -> None:
    (project / "make").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(StageFailedError, match="make@a did not finish") as found:
        reproduce_stage("make@a", pull=False)
    assert found.value.interrupted
    with no_dvc_server():
        assert run_dvc(["repro", "no-such-stage"]) == 255
    assert run_dvc(["repro", "no-such-stage"]) == 255


@contextlib.contextmanager
def no_dvc_server() -> Iterator[None]:
    path = os.environ.pop(DVC_SOCKET)
    try:
        yield
    finally:
        os.environ[DVC_SOCKET] = path


@pytest.mark.parametrize("victim", ["the forked DVC", "what has forked it"])
def test_a_killed_dvc_takes_its_stage_along_and_is_no_harm_to_the_next(victim: str, project: Path) -> None:
    # What a stage does first, so that it ends with its DVC; its process is named when that is done.
    (project / "make").write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, time\n"
        "from pipelines.runtime.processes import die_with_starter\n"
        "die_with_starter()\n"
        "pathlib.Path('pid.part').write_text(str(os.getpid()))\n"
        "os.rename('pid.part', 'pid')\n"
        "time.sleep(60)\n"
    )
    ends: list[StageFailedError] = []

    def work() -> None:
        try:
            reproduce_stage("make@a", pull=False)
        except StageFailedError as end:
            ends.append(end)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for((project / "pid").exists)
    sleeper = psutil.Process(int((project / "pid").read_text()))
    forked = server().children()[0]
    assert os.getsid(forked.pid) == forked.pid
    assert forked.name() == "dvc repro"
    (forked if victim == "the forked DVC" else server()).send_signal(signal.SIGKILL)
    thread.join(timeout=30)
    assert [end.interrupted for end in ends] == [True]
    _, left = psutil.wait_procs([forked, sleeper], timeout=20)
    assert left == []
    (project / "make").write_text(MAKE)
    assert reproduce_stage("make@a", pull=False) is False
    assert (project / "out/a").read_text() == "a\n"
