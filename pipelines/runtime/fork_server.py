"""A fork server: a preloaded process that forks for each command, most of which work less long than loading takes.

A command hands its arguments, streams, folder and environment over, and ends as the forked process ends. Without a
server it does its own work, to the same bytes. What is preloaded, and run, is the entry's business, a module that
`python -m` runs: `cli.preloaded` for stages, `versioning.dvc_server` for DVC.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from pipelines.runtime.processes import die_with, die_with_starter, end_group, environment

STAGE_ENTRY = "pipelines.cli.preloaded"
"""The module that is the fork server of stages."""


@contextlib.contextmanager
def fork_server(entry: str, variable: str, arguments: Sequence[str] = ()) -> Iterator[None]:
    """Keep a fork server for commands that are started meanwhile. An environment variable says where it listens.

    One that the variable names already is used. Where there is none, on a system that cannot have one, commands do
    their own work.
    """
    if variable in os.environ or not hasattr(os, "pidfd_open"):
        yield
        return
    parent = os.getpid()
    with TemporaryDirectory(prefix="sdlora-") as folder:
        path = str(Path(folder) / "server")
        with listening(path) as listener:
            process = start_server(entry, listener, arguments=arguments, preexec_fn=lambda: die_with(parent))
        try:
            with environment({variable: path}):
                yield
        finally:
            end_group(process)


def start_server(
    entry: str,
    listener: socket.socket,
    *,
    until: int | None = None,
    arguments: Sequence[str] = (),
    **options: Any,  # noqa: ANN401 - of a Popen
) -> subprocess.Popen[bytes]:
    """Start a fork server that serves a socket. Once the process of the handle `until` has ended, it ends too."""
    handles = [listener.fileno(), *([] if until is None else [until])]
    numbers = [str(handles[0]), "" if until is None else str(until)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", entry, *numbers, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=handles,
        start_new_session=True,
        **options,
    )


def listening(path: str) -> socket.socket:
    """Return a socket that whoever comes can wait at while the process that it is for starts."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


class ForkedProcess:
    """A process that a fork server has forked for a command: as much of a `Popen` as is asked of it."""

    def __init__(
        self, path: str, arguments: Sequence[str], settings: Mapping[str, str], streams: Sequence[int]
    ) -> None:
        """Have it begin in this folder, with this environment and these streams. An `OSError` where nobody listens."""
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
        """0 where the server had ended before it could fork."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. The status is a `Popen`'s, and -SIGTERM where the server ended, and so it too."""
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
        data = self._link.recv(_ANSWER)
        return int.from_bytes(data, signed=True) if data else None


_ANSWER = 8
"""Bytes of an answer: the number of the process that was forked, then its status."""


def forget(path: str) -> None:
    """Remove what a fork server that has ended left at its path."""
    for left in (_mark(path), Path(path)):
        left.unlink(missing_ok=True)


def has_loaded(path: str) -> bool:
    """Return whether the fork server that listens at a path has loaded all that it preloads."""
    return _mark(path).exists()


def _mark(path: str) -> Path:
    return Path(f"{path}.ready")


def delegate(path: str, arguments: Sequence[str]) -> int:
    """Have a fork server run a command in place of this process. Return its status as a shell has it.

    Raises:
        OSError: nobody listens at the path.
    """
    die_with_starter()
    forked = ForkedProcess(path, arguments, os.environ, [0, 1, 2])
    code = forked.wait() if forked.pid else 1
    return code if code >= 0 else 128 - code


def receive(
    arguments: Sequence[str],
    libraries: Sequence[str],
    *,
    later: Sequence[str] = (),
    prepare: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """Preload libraries, and fork for each request. Only a forked process returns, with its request.

    It is in the folder, and has the environment and the streams, of who asked. A library that is not there is not
    preloaded. `prepare` is called at once, and again before each fork.

    Args:
        arguments: What `start_server` has given the entry: the socket, and the process with which to end.
        libraries: The modules to preload.
        later: More of them, each loaded while nobody asks.
        prepare: What else to do.
    """
    # Called last of all that is registered from here on.
    atexit.register(_exit_without_freeing)
    until = int(arguments[1]) if arguments[1] else None
    with socket.socket(fileno=int(arguments[0])) as listener:
        try:
            for name in libraries:
                if until is not None and select.select([until], [], [], 0)[0]:
                    raise SystemExit
                _preload(name)
            if prepare is not None:
                prepare()
            _mark(listener.getsockname()).touch()
            request = _fork_for_each(listener, prepare, until, list(later))
        except SystemExit:
            forget(listener.getsockname())
            raise
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request


def _preload(name: str) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
    gc.freeze()  # a collection in a forked process would copy all of it


_status = 0
"""What this process ends with."""


def end_as(main: Callable[[], object]) -> NoReturn:
    """Run a command and end the process with its status."""
    global _status
    try:
        raise SystemExit(main())
    except SystemExit as end:
        _status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        _status = 1
        raise


def _exit_without_freeing() -> None:
    """End the process when Python has called all other exit functions: the last step would take libraries apart.

    In a forked process that costs a second and more: each object that is freed makes a page of the server's memory its
    own first.
    """
    logging.shutdown()  # registered earlier, as logging was loaded before
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(_status)


def _fork_for_each(
    listener: socket.socket, prepare: Callable[[], object] | None, until: int | None, later: list[str]
) -> dict[str, Any]:
    """Fork for each request, and load what is for later in between.

    Only a forked process returns, with its request and the asker's streams.
    """
    this = os.getpid()
    at_work: dict[int, _Worker] = {}
    while True:
        links = [worker.link.fileno() for worker in at_work.values() if not worker.told]
        own = [listener.fileno(), *([] if until is None else [until])]
        ready, _, _ = select.select([*own, *at_work, *links], [], [], 0 if later else None)
        if later and not ready:
            _preload(later.pop(0))
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
            link.sendall(child.to_bytes(_ANSWER))
        at_work[os.pidfd_open(child)] = _Worker(child, link)


class _Worker:
    """A forked process, and the socket of who asked for it."""

    def __init__(self, child: int, link: socket.socket) -> None:
        self.child, self.link = child, link
        self.told = False
        """Whether it was told to end, because the asker is gone."""

    def end(self) -> None:
        """Tell it to end. One that was stopped takes no other signal than the one that wakes it."""
        self.told = True
        os.kill(self.child, signal.SIGTERM)
        os.kill(self.child, signal.SIGCONT)

    def answer(self) -> None:
        """Tell the asker how it has ended: its status, as a `Popen` has it."""
        _, status = os.waitpid(self.child, 0)
        with contextlib.suppress(OSError):
            self.link.sendall(os.waitstatus_to_exitcode(status).to_bytes(_ANSWER, signed=True))
        self.link.close()
