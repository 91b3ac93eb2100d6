"""Commands of the environment, run in the folder of a project."""

from __future__ import annotations

import contextvars
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import pytest

from pipelines.cli.app import main
from pipelines.project.environment import DVC_SOCKET, STAGE_SOCKET
from pipelines.runtime.fork_server import ForkedProcess
from tests.support.forked_python import COMMAND_SOCKET, PREFECT_SOCKET, PYTHON

NO_SERVER = "http://127.0.0.1:1/api"
"""The API of a Prefect server that does not answer."""
COMMAND_ENTRY = "tests.support.command_server"
"""The module that is the fork server of tests."""
DVC_ENTRY = "pipelines.versioning.dvc_server"
"""The module that is the fork server of DVC."""
_SECONDS = 500


def environment() -> dict[str, str]:
    """A server is named that does not answer, so everything runs plainly and fast; no fork server is named."""
    named = (STAGE_SOCKET, DVC_SOCKET, COMMAND_SOCKET, PREFECT_SOCKET, PYTHON)
    own = {key: value for key, value in os.environ.items() if key not in named}
    return {**own, "PATH": _path(), "PREFECT_API_URL": NO_SERVER}


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def finish(folder: Path, *command: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in a folder, with further settings, to its end, whatever that is.

    Where `preloaded` keeps a server, `sdlora` and `dvc` are forked from it, which takes a second less and more.
    """
    if STAGE_SOCKET in os.environ and command[0] in ("sdlora", "dvc"):
        return _forked(folder, command, settings)
    return subprocess.run(
        command,
        cwd=folder,
        env={**environment(), **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )


def _forked(
    folder: Path, command: tuple[str, ...], changes: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    words = command if command[0] == "dvc" else command[1:]
    settings = {**os.environ, "PATH": _path(), "PREFECT_API_URL": NO_SERVER, "PWD": str(folder), **changes}
    return finish_forked(os.environ[STAGE_SOCKET], folder, words, settings)


def fork(
    server: str, folder: Path, words: Sequence[str], settings: Mapping[str, str], *files: IO[bytes]
) -> ForkedProcess:
    """Have a fork server run a command in a folder, with files for its stdout and its stderr."""
    with chdir(folder), open(os.devnull, "rb") as nothing:
        return ForkedProcess(server, words, settings, [file.fileno() for file in (nothing, *files)])


def finish_forked(
    server: str, folder: Path, words: Sequence[str], settings: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Have a fork server run a command in a folder to its end, whatever that is."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        status = fork(server, folder, words, settings, out, error).wait(_SECONDS)
        said = []
        for file in (out, error):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(list(words), status, *said)


def call(folder: Path, *command: str) -> str:
    """Run a command of the environment; return what it printed."""
    done = finish(folder, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def said_here(folder: Path, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Call `sdlora` as a process would, in this one, which has its libraries already.

    Return what it printed on stdout and on stderr.
    """
    files = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(files[0]), redirect_stderr(files[1]):
        patch.chdir(folder)
        patch.setenv("PREFECT_API_URL", NO_SERVER)
        patch.setattr(sys, "argv", ["sdlora", *arguments])
        with pytest.raises(SystemExit) as end:
            contextvars.copy_context().run(main)
    out, error = (file.buffer.getvalue().decode() for file in files)
    assert (end.value.code or 0) == status, out + error
    return out, error


def call_here(folder: Path, *arguments: str, status: int = 0) -> str:
    """Call `sdlora` in this process; return what it printed on stdout."""
    return said_here(folder, *arguments, status=status)[0]
