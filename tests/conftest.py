"""What all tests share: one thread, no phoning home, a Prefect server, a project in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.folders import write_project
from tests.support.forked_python import PREFECT_SOCKET, PYTHON, forking, write_python
from tests.support.prefect_home import copy_home

# Before torch, Prefect or DVC are loaded, here or in a process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ.pop("PREFECT_API_URL", None)

# What a shell has started in the background ignores Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests: what is left for the end is short, so that workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Have a folder of a name filled by the first who asks, of all workers; nobody changes what is in it.

    Who asks meanwhile waits.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "shared"
    shared.mkdir(exist_ok=True)

    def get(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what somebody left who failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def prefect_home(
    made_once: Callable[[str, Callable[[Path], object]], Path], prefect_preloaded: dict[str, str]
) -> Path:
    """A home of a Prefect server, to be copied: making the tables of a new one takes as long as all else."""

    def serve_once(home: Path) -> None:
        from pipelines.orchestration.server import prefect_server

        with forking(prefect_preloaded), prefect_server(home) as wait:
            wait()

    return made_once("prefect", serve_once)


@pytest.fixture(scope="session")
def prefect_url(
    prefect_home: Path, prefect_preloaded: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The API of a real Prefect server, one for the whole session, for processes that a test starts."""
    from pipelines.orchestration.server import prefect_server

    home = copy_home(prefect_home, tmp_path_factory.mktemp("server") / "prefect")
    with ExitStack() as kept:
        with forking(prefect_preloaded):
            wait = kept.enter_context(prefect_server(home))
        wait()
        yield os.environ.pop("PREFECT_API_URL")


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python, for programs that start others with it, which the fork servers of tests are then to run."""
    return str(write_python(tmp_path_factory.mktemp("python") / "python"))


@pytest.fixture(scope="session")
def kept_server(
    made_once: Callable[[str, Callable[[Path], object]], Path], worker_id: str
) -> Callable[[str], str]:
    """Have the fork server of an entry kept until the tests end, one for all workers. Return where it listens."""
    from pipelines.runtime.fork_server import listening, start_server

    def keep(entry: str) -> str:
        def start(folder: Path) -> None:
            tests = os.pidfd_open(os.getpid() if worker_id == "master" else os.getppid())
            with listening(str(folder / "socket")) as listener:
                server = start_server(entry, listener, until=tests, cwd=folder)
            server.returncode = 0  # nobody waits for it
            os.close(tests)

        return str(made_once(entry, start) / "socket")

    return keep


@pytest.fixture(scope="session")
def prefect_preloaded(kept_server: Callable[[str], str], forked_python: str) -> dict[str, str]:
    """The fork server of what runs with Prefect. Return the variables that name it."""
    return {PREFECT_SOCKET: kept_server("tests.support.prefect_server"), PYTHON: forked_python}


@pytest.fixture
def make_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Make a DVC project of the given files in a folder of its own, and go there."""

    def make(files: dict[str, str]) -> Path:
        folder = write_project(tmp_path / "project", files)
        monkeypatch.chdir(folder)
        return folder

    return make
