"""A fork server forks for a command: same streams, folder, environment and end as if it had run by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.cli import preloaded
from pipelines.project.environment import STAGE_SOCKET
from pipelines.runtime.fork_server import STAGE_ENTRY, fork_server, has_loaded, listening, start_server
from tests.support.repository import REPOSITORY


@pytest.fixture
def server_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The fork server of stages, which preloads only what is loaded fast."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    with fork_server(STAGE_ENTRY, STAGE_SOCKET, ["json"]):
        path = os.environ[STAGE_SOCKET]
        wait_until(lambda: has_loaded(path))
        yield path


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def sdlora(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_command_ends_as_it_would_by_itself(server_path: str, tmp_path: Path) -> None:
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


def test_a_command_that_finds_no_fork_server_runs_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv(STAGE_SOCKET, str(tmp_path / "nothing"))
    with sdlora("start", folder=tmp_path) as process:
        process.communicate(timeout=60)
    assert process.returncode == 2


def test_a_stage_that_needs_no_torch_does_not_wait_until_the_server_has_loaded_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\n")
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(tmp_path)]))
    monkeypatch.chdir(tmp_path)
    with fork_server(STAGE_ENTRY, STAGE_SOCKET, ["slow"]):
        path = os.environ[STAGE_SOCKET]
        with sdlora("start", "--out", "x", "--evaluation", "y", "--gate", "z", folder=tmp_path) as early:
            early.communicate(timeout=60)
        assert early.returncode == 0
        with sdlora("backbone", "--out", "b", folder=tmp_path) as waiting:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(timeout=1)
            assert not has_loaded(path)
            (tmp_path / "go").touch()
            waiting.communicate(timeout=60)
        assert waiting.returncode == 2  # params.yaml is empty
        assert has_loaded(path)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_command_ends_with_the_process_that_asked_for_it(
    stopped: bool, server_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    server_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    """A forked process has its server's command line."""
    parent = process.parent()
    return parent is not None and STAGE_ENTRY in process.cmdline() and parent.cmdline() == process.cmdline()


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
def test_dvc_alone_gets_a_fork_server_where_a_stage_will_not_be_its_only_one(
    lock: str, words: str, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if lock != "none":
        Path("dvc.lock").touch()
        # Files are dated by a coarser clock than processes.
        os.utime("dvc.lock", (0, 0) if lock == "older" else (time.time() + 1, time.time() + 1))
    asked: list[int] = []
    monkeypatch.setenv("DVC_STAGE", "start")
    monkeypatch.setattr(preloaded, "_start_for_dvc", lambda path, dvc: asked.append(dvc))
    with subprocess.Popen(
        ["python", "-c", "input()", *words.split()], executable=sys.executable, stdin=subprocess.PIPE
    ) as process:
        monkeypatch.setattr(preloaded, "starter", lambda: process.pid)
        monkeypatch.setattr("pipelines.runtime.fork_server.die_with_starter", lambda: None)
        assert preloaded.delegate_stage(["start"]) is None
        assert asked == ([process.pid] if begun else [])
        process.communicate(b"\n")


def test_one_whose_dvc_has_ended_preloads_no_more(tmp_path: Path) -> None:
    (tmp_path / "marker.py").write_text("from pathlib import Path\nPath('loaded').touch()\n")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        handle = os.pidfd_open(process.pid)
        process.wait()
    with listening(str(tmp_path / "server")) as listener:
        server = start_server(
            STAGE_ENTRY,
            listener,
            until=handle,
            arguments=["marker"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(tmp_path)])},
        )
    os.close(handle)
    assert server.wait(timeout=30) == 0
    assert not (tmp_path / "loaded").exists()
    assert not (tmp_path / "server").exists()


ENTRY = """
import atexit, sys, threading, time
from pipelines.runtime.fork_server import end_as, receive

request = receive(sys.argv[1:], ["no_such_library", "json"])
atexit.register(print, "exit function")

def main():
    print("work", flush=True)
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    sys.stderr.write("unflushed")
    match request["arguments"][0]:
        case "status":
            return 3
        case "line":
            sys.exit("a line")
        case "bug":
            raise RuntimeError("a bug")

end_as(main)
"""


@pytest.mark.parametrize(
    ("how", "status", "error"),
    [("status", 3, ""), ("none", 0, ""), ("line", 1, "a line"), ("bug", 1, "a bug")],
)
def test_a_forked_process_ends_as_python_ends(
    how: str, status: int, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for threads, calls exit functions and flushes."""
    (tmp_path / "entry.py").write_text(ENTRY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(tmp_path)]))
    ask = "import os, sys; from pipelines.runtime.fork_server import delegate; sys.exit(delegate(*eval(sys.argv[1])))"
    with fork_server("entry", "SDLORA_TEST_SERVER"):
        command = [sys.executable, "-c", ask, repr((os.environ["SDLORA_TEST_SERVER"], [how]))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stdout == "work\nthread\nexit function\n"
    assert "unflushed" in done.stderr
    assert error in done.stderr
    assert ("Traceback" in done.stderr) == (how == "bug")


def test_what_is_for_later_is_loaded_while_nobody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noted.py").write_text("from pathlib import Path\nPath('loaded').touch()\n")
    (tmp_path / "entry.py").write_text(
        "import sys\n"
        "from pipelines.runtime.fork_server import end_as, receive\n"
        "receive(sys.argv[1:], [], later=['no_such_library', 'noted'])\n"
        "end_as(lambda: 'noted' not in sys.modules)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(tmp_path)]))
    monkeypatch.chdir(tmp_path)
    with fork_server("entry", "SDLORA_TEST_SERVER"):
        wait_until(Path("loaded").exists)
        ask = "import os, sys; from pipelines.runtime.fork_server import delegate; sys.exit(delegate(sys.argv[1], []))"
        done = subprocess.run([sys.executable, "-c", ask, os.environ["SDLORA_TEST_SERVER"]], timeout=60)
    assert done.returncode == 0
