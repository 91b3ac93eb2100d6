"""Processes that have loaded their libraries and fork for each command: most work less long than loading takes.

`sdlora run` keeps one for stages while it works. DVC calls `sdlora fit …` as ever; that process hands its arguments,
its streams, folder and environment over, and ends as the forked one ends. Without it a stage runs in its own
process, to the same bytes. Another of its kind is for DVC itself (`warm_dvc`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.project.environment import STAGE_SOCKET
from pipelines.runtime.processes import die_with, die_with_starter, end_group, environment

LIBRARIES = (
    "prefect.flow_engine",
    "prefect.artifacts",
    "typer",
    "pydantic.type_adapter",
    "pydantic.types",
    "ruamel.yaml",
    "pyarrow",
    "PIL.Image",
    "imagehash",
    "torch",
    "timm",
    "safetensors.torch",
)
"""What a stage loads of others' packages; none of this project's own, which is read as it is when a stage runs."""


@contextlib.contextmanager
def warm_process(libraries: Sequence[str] = LIBRARIES) -> Iterator[None]:
    """Keep a warm process for commands that are started meanwhile; where there is none they do without."""
    with forking("pipelines.runtime.fork_server", STAGE_SOCKET, libraries):
        yield


@contextlib.contextmanager
def forking(module: str, variable: str, arguments: Sequence[str] = ()) -> Iterator[None]:
    """Keep a process that runs a module, and have an environment variable say where it listens."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    parent = os.getpid()
    with TemporaryDirectory(prefix="sdlora-") as folder:
        path = str(Path(folder) / "warm")
        with listening(path) as listener:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(listener.fileno()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
        try:
            with environment({variable: path}):
                yield
        finally:
            end_group(process)


def listening(path: str) -> socket.socket:
    """A socket that whoever comes can wait at while the process that it is for starts."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


class Forked:
    """A command that a warm process has forked for: as much of a `Popen` as is asked of it."""

    def __init__(
        self, path: str, arguments: Sequence[str], settings: Mapping[str, str], streams: Sequence[int]
    ) -> None:
        """Have it begin in this folder, with this environment and these streams; an `OSError` where nobody listens."""
        request = {"arguments": [*arguments], "folder": os.getcwd(), "environment": dict(settings)}
        data = json.dumps(request).encode()
        self._link = socket.socket(socket.AF_UNIX)
        try:
            self._link.connect(path)
            socket.send_fds(self._link, [len(data).to_bytes(8)], streams)
            self._link.sendall(data)
        except OSError:
            self._link.close()
            raise
        self._status: int | None = None
        self.pid = self._answer() or 0
        """0 where the warm process had ended before it could fork."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the status is a `Popen`'s, and -SIGTERM where the warm process ended, and so it too."""
        if self._status is None:
            self._link.settimeout(timeout)
            try:
                answer = self._answer()
            except TimeoutError:
                raise subprocess.TimeoutExpired("forked command", timeout or 0) from None
            self._status = -signal.SIGTERM if answer is None else answer
            self._link.close()
        return self._status

    def _answer(self) -> int | None:
        data = self._link.recv(ANSWER)
        return int.from_bytes(data, signed=True) if data else None


ANSWER = 8
"""Bytes of an answer: the number of the process that was forked, then its status."""


def ask(arguments: list[str]) -> int | None:
    """Have the warm process run a command in place of this one; return its status, None if there is none."""
    path = os.environ.get(STAGE_SOCKET)
    if not path:
        return None
    die_with_starter()
    try:
        forked = Forked(path, arguments, os.environ, [0, 1, 2])
    except OSError:
        return None
    return status_of(forked)


def status_of(forked: Forked) -> int:
    """Wait for a forked command; return its status as a shell has it."""
    code = forked.wait() if forked.pid else 1
    return code if code >= 0 else 128 - code


def main(socket: int, libraries: Sequence[str]) -> None:
    """Load, and fork for each request that comes to a socket, until ended."""
    run_as_forked(forked_for(socket, libraries))


def run_as_forked(request: dict[str, Any]) -> None:
    """Run a command of `sdlora`, whose own this process is from here on."""
    from pipelines.cli.app import main

    os.environ.pop(STAGE_SOCKET, None)
    sys.argv = ["sdlora", *request["arguments"]]
    end_as(main)


def end_as(main: Callable[[], object]) -> None:
    """Run a command and end the process with its status, as Python does, but for taking all libraries apart.

    In a forked process that costs a second and more: each object that is freed makes a page of the other's memory its
    own first.
    """
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # what Python itself calls, before the exit functions
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def forked_for(
    number: int,
    libraries: Sequence[str],
    *,
    prepare: Callable[[], object] | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Load, and fork for each request that comes to a socket; only a forked process returns, with its request.

    It is in the folder, and has the environment and the streams, of who asked. `prepare` is called at once, and again
    before each fork. Once the process of the handle `until` has ended, this one ends too.
    """
    with socket.socket(fileno=number) as listener:
        for name in libraries:
            if until is not None and select.select([until], [], [], 0)[0]:
                raise SystemExit
            importlib.import_module(name)
        if prepare is not None:
            prepare()
        gc.freeze()  # a collection in a forked process would copy all of it
        request = serve(listener, prepare, until)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request


def serve(listener: socket.socket, prepare: Callable[[], object] | None, until: int | None) -> dict[str, Any]:
    """Fork for each request; only a forked process returns, with its request and the asker's streams."""
    this = os.getpid()
    at_work: dict[int, Worker] = {}
    while True:
        links = [worker.link.fileno() for worker in at_work.values() if not worker.told]
        own = [listener.fileno(), *([] if until is None else [until])]
        ready, _, _ = select.select([*own, *at_work, *links], [], [])
        if until in ready:
            raise SystemExit
        for handle, worker in list(at_work.items()):
            if handle in ready:
                del at_work[handle]
                worker.answer()
                os.close(handle)
            elif not worker.told and worker.link.fileno() in ready:
                worker.end()
        if listener.fileno() not in ready:
            continue
        link, _ = listener.accept()
        size, streams, _, _ = socket.recv_fds(link, 8, 3)
        with link.makefile("rb") as file:
            data = file.read(int.from_bytes(size))
        if prepare is not None:
            prepare()
        child = os.fork() if len(streams) == 3 and len(data) == int.from_bytes(size) else None
        if child == 0:
            die_with(this)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        if child == 0:
            for handle, worker in at_work.items():  # the others' business
                os.close(handle)
                worker.link.close()
            link.close()
            return dict(json.loads(data))
        if child is None:
            link.close()
            continue
        with contextlib.suppress(OSError):
            link.sendall(child.to_bytes(ANSWER))
        at_work[os.pidfd_open(child)] = Worker(child, link)


class Worker:
    """A forked process, and the socket of who asked for it."""

    def __init__(self, child: int, link: socket.socket) -> None:
        self.child, self.link = child, link
        self.told = False
        """Whether it was told to end, because the asker is gone."""

    def end(self) -> None:
        """Tell it to end; one that was stopped takes no other signal than the one that wakes it."""
        self.told = True
        os.kill(self.child, signal.SIGTERM)
        os.kill(self.child, signal.SIGCONT)

    def answer(self) -> None:
        """Tell the asker how it has ended: its status, as a `Popen` has it."""
        _, status = os.waitpid(self.child, 0)
        with contextlib.suppress(OSError):
            self.link.sendall(os.waitstatus_to_exitcode(status).to_bytes(ANSWER, signed=True))
        self.link.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
