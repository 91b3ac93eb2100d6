"""Commands of the environment, run in the folder of a project."""

from __future__ import annotations

import contextvars
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from pipelines.cli.app import main
from pipelines.project.environment import DVC_SOCKET, STAGE_SOCKET

NO_SERVER = "http://127.0.0.1:1/api"
"""The API of a Prefect server that does not answer."""


def environment() -> dict[str, str]:
    """A server is named that does not answer, so everything runs plainly and fast; no fork server is named."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {key: value for key, value in os.environ.items() if key not in (STAGE_SOCKET, DVC_SOCKET)}
    return {**own, "PATH": path, "PREFECT_API_URL": NO_SERVER}


def call(folder: Path, *command: str) -> str:
    """Run a command of the environment; return what it printed."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500)
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
