"""A process that has loaded the libraries and forks for each stage: most work less long than loading takes.

`sdlora run` keeps one while it works. DVC calls `sdlora fit …` as ever; that process hands its arguments, its
streams, folder and environment over, and ends as the forked one ends. Without it a stage runs in its own
process, to the same bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.processes import die_with, die_with_starter, end_group, environment

SOCKET = "SDLORA_WARM"
"""Environment variable: where the warm process listens."""

LIBRARIES = (
    "prefect.flow_engine",
    "prefect.artifacts",
    "pyarrow",
    "PIL.Image",
    "torch",
    "timm",
    "safetensors.torch",
)


@contextlib.contextmanager
def warm_process(libraries: Sequence[str] = LIBRARIES) -> Iterator[None]:
    """Keep a warm process for commands that are started meanwhile; where there is none they do without."""
    if not hasattr(os, "pidfd_open"):
        yield
        return
    parent = os.getpid()
    with TemporaryDirectory(prefix="sdlora-") as folder:
        path = str(Path(folder) / "warm")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines.warm", path, *libraries],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
        try:
            with environment({SOCKET: path}):
                yield
        finally:
            end_group(process)


def ask(arguments: list[str]) -> int | None:
    """Have the warm process run a command in place of this one; return its status, None if there is none."""
    path = os.environ.get(SOCKET)
    if not path:
        return None
    die_with_starter()
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    data = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as link:
        try:
            link.connect(path)
        except OSError:
            return None
        socket.send_fds(link, [len(data).to_bytes(8)], [0, 1, 2])
        link.sendall(data)
        answer = link.recv(1)
    return answer[0] if answer else 1  # no answer: it was killed, and the stage with it


def main(path: str, libraries: Sequence[str]) -> None:
    """Listen, load, and fork for each request until ended."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for name in libraries:
            importlib.import_module(name)
        request = serve(listener)
    # From here on this is a forked process, and its command's own.
    from pipelines.cli import main

    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update({name: value for name, value in request["environment"].items() if name != SOCKET})
    sys.argv = ["sdlora", *request["arguments"]]
    main()


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request; only a forked process returns, with its request and the asker's streams."""
    this = os.getpid()
    while True:
        link, _ = listener.accept()
        with link:
            size, streams, _, _ = socket.recv_fds(link, 8, 3)
            with link.makefile("rb") as file:
                data = file.read(int.from_bytes(size))
            child = os.fork() if len(streams) == 3 and len(data) == int.from_bytes(size) else None
            if child == 0:
                die_with(this)
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
            for stream in streams:
                os.close(stream)
            if child == 0:
                return dict(json.loads(data))
            if child is not None:
                with contextlib.suppress(BrokenPipeError):
                    link.sendall(bytes([wait(child, link)]))


def wait(child: int, link: socket.socket) -> int:
    """Wait for a forked process, or end it when the asker is gone; return its status as a shell has it."""
    handle = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([handle, link.fileno()], [], [])
        if handle not in ready:
            os.kill(child, signal.SIGTERM)
            os.kill(child, signal.SIGCONT)  # one that was stopped takes no other signal
    finally:
        os.close(handle)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
