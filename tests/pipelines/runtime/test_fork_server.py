"""The warm process forks for a command: same streams, folder, environment and end as if it had run by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.cli import preloaded_for_dvc
from pipelines.project.environment import STAGE_SOCKET
from pipelines.runtime import fork_server
from tests.support.repository import REPOSITORY


@pytest.fixture
def warm_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A warm process of the real kind that loads only what is loaded fast."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with fork_server.warm_process(["json"]):
        path = Path(os.environ[STAGE_SOCKET])
        end = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        yield str(path)


def sdlora(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_command_ends_as_it_would_by_itself(warm_path: str, tmp_path: Path) -> None:
    with sdlora("start", "--out", "x", "--evaluation", "y", "--gate", "z", folder=tmp_path) as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == 2
    line = f"error: no params.yaml in {tmp_path}: run sdlora in the folder of the project"
    assert error == f"{line}, or start one with sdlora init\n"
    assert out == ""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    with sdlora("start", "--out", "x", "--evaluation", "y", "--gate", "z", folder=tmp_path) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert {path.name for path in (tmp_path / "x").iterdir()} >= {"classes.json", "split.json"}


def test_a_command_that_finds_no_warm_process_runs_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(STAGE_SOCKET, str(tmp_path / "nothing"))
    with sdlora("start", folder=tmp_path) as process:
        process.communicate(timeout=60)
    assert process.returncode == 2


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_command_ends_with_the_process_that_asked_for_it(
    stopped: bool, warm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    # A server that takes the connection and says nothing holds the command up for two seconds.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/api")
        with sdlora("start", "--out", "x", "--evaluation", "y", "--gate", "z", folder=tmp_path) as process:
            connection, _ = silent.accept()
            with connection:
                (forked,) = (child for child in psutil.Process().children(recursive=True) if is_forked(child))
                if stopped:
                    forked.suspend()
                process.kill()
                process.wait()
                forked.wait(timeout=1.5)
    assert not (tmp_path / "x").exists()


def test_a_command_need_not_wait_for_the_end_of_another(
    warm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes and goes while the first is stopped."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    words = ("start", "--out", "x", "--evaluation", "y", "--gate", "z")
    # A server that takes the connection and says nothing holds the first up until it is stopped.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with monkeypatch.context() as patch:
            patch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/api")
            first = sdlora(*words, folder=tmp_path)
        with first, silent.accept()[0]:
            (forked,) = (child for child in psutil.Process().children(recursive=True) if is_forked(child))
            forked.suspend()
            with sdlora("start", folder=tmp_path) as second:
                second.communicate(timeout=60)
            assert second.returncode == 2
            assert not (tmp_path / "x").exists()
            forked.resume()
            first.communicate(timeout=60)
    assert first.returncode == 0
    assert (tmp_path / "x").exists()


def is_forked(process: psutil.Process) -> bool:
    """A forked process has its warm parent's command line."""
    parent = process.parent()
    return (
        parent is not None
        and "pipelines.runtime.fork_server" in process.cmdline()
        and parent.cmdline() == process.cmdline()
    )


@pytest.mark.parametrize(
    ("lock", "words", "begun"),
    [
        ("none", "dvc repro", True),
        ("none", "dvc repro --single-item start", False),
        ("none", "dvc repro -s start", False),
        ("older", "dvc repro", False),
        ("newer", "dvc repro -s start evaluate", True),
    ],
)
def test_dvc_alone_gets_a_warm_process_where_a_stage_will_not_be_its_only_one(
    lock: str, words: str, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if lock != "none":
        Path("dvc.lock").touch()
        # Files are dated by a coarser clock than processes.
        os.utime("dvc.lock", (0, 0) if lock == "older" else (time.time() + 1, time.time() + 1))
    asked: list[int] = []
    monkeypatch.setattr(preloaded_for_dvc, "begin", lambda path, dvc: asked.append(dvc))
    with subprocess.Popen(
        ["python", "-c", "input()", *words.split()], executable=sys.executable, stdin=subprocess.PIPE
    ) as process:
        monkeypatch.setattr(preloaded_for_dvc, "starter", lambda: process.pid)
        monkeypatch.setattr(preloaded_for_dvc, "die_with_starter", lambda: None)

        assert preloaded_for_dvc.ask(["start"]) is None
        assert asked == ([process.pid] if begun else [])
        process.communicate(b"\n")


def test_one_whose_dvc_has_ended_loads_no_more(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        handle = os.pidfd_open(process.pid)
        process.wait()
    with fork_server.listening(str(tmp_path / "warm")) as listener, pytest.raises(SystemExit):
        fork_server.forked_for(os.dup(listener.fileno()), ["no_such_library"], until=handle)
    os.close(handle)
