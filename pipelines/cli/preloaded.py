"""The fork server of stages: what it preloads, and how a stage comes to it.

`sdlora run` keeps one while it works. A `dvc repro` by itself gets one from its second stage, or from the first of a
chain that has no dvc.lock yet, and it ends with that DVC. A stage that is called by hand, or is the only one that its
DVC runs, runs by itself.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.project.environment import STAGE_SOCKET
from pipelines.project.layout import CODE_STAGE, LOCK, SCRATCH
from pipelines.runtime.fork_server import (
    STAGE_ENTRY,
    delegate,
    end_as,
    forget,
    has_loaded,
    listening,
    receive,
    start_server,
)
from pipelines.runtime.processes import starter
from pipelines.runtime.surroundings import prepare_libraries

_LIBRARIES = (
    "prefect.flow_engine",
    "prefect.artifacts",
    "typer",
    "pydantic.type_adapter",
    "pydantic.types",
    "ruamel.yaml",
    "pyarrow",
    "PIL.Image",
    "torch",
    "timm",
    "safetensors.torch",
)
"""What a stage loads of others' packages; none of this project's own, which is read as it is when a stage runs."""
_LATER = ("imagehash", "scipy.fftpack", "matplotlib.figure", "matplotlib.backends.backend_svg", "jinja2")
"""What no fit loads, but `split` or the report."""
_WITHOUT_TORCH = {CODE_STAGE, "fetch", "start", "split", "gate", "report"}
"""The stages that load no torch. By itself each begins within a second, and a new server loads torch for some five."""


def delegate_stage(arguments: Sequence[str]) -> int | None:
    """Have a fork server run this command, if it is a stage's. Return its status, None if it has to run by itself."""
    if STAGE_SOCKET in os.environ:
        with contextlib.suppress(OSError):
            return _delegate(os.environ[STAGE_SOCKET], arguments)
        return None
    dvc = starter() if "DVC_STAGE" in os.environ else None
    if dvc is None or not hasattr(os, "pidfd_open"):
        return None
    path = SCRATCH / f"server-{dvc}"
    try:
        return _delegate(str(path), arguments)
    except FileNotFoundError:
        if _has_ended_a_stage(dvc) or _begins_a_chain(dvc):
            with contextlib.suppress(OSError):
                _start_for_dvc(path, dvc)
    except OSError:  # of a server that was killed
        forget(str(path))
    return None


def _delegate(path: str, arguments: Sequence[str]) -> int | None:
    """Have the server at a path run a command. Return None for one that is sooner done than the server has loaded."""
    if _WITHOUT_TORCH & {*arguments[:1]} and Path(path).exists() and not has_loaded(path):
        return None
    return delegate(path, arguments)


def _has_ended_a_stage(dvc: int) -> bool:
    """Return whether dvc.lock was written since a process began."""
    try:
        ticks = int(Path(f"/proc/{dvc}/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return LOCK.stat().st_mtime > time.time() - age
    except (OSError, AttributeError):
        return False


def _begins_a_chain(dvc: int) -> bool:
    """Return whether nothing has been run yet, and a DVC is not about to run a single stage."""
    try:
        words = Path(f"/proc/{dvc}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return not LOCK.exists() and not {b"-s", b"--single-item"} & set(words)


def _start_for_dvc(path: Path, dvc: int) -> None:
    """Start a fork server that listens at `path` until the process `dvc` has ended."""
    path.parent.mkdir(exist_ok=True)
    handle = os.pidfd_open(dvc)
    try:
        with listening(str(path)) as listener:
            # Whoever reads what DVC prints waits for the end of DVC alone.
            start_server(STAGE_ENTRY, listener, until=handle, stderr=subprocess.DEVNULL)
    finally:
        os.close(handle)


def _serve(arguments: Sequence[str]) -> None:
    """Preload the libraries of stages, or those that are named, and run commands of `sdlora`."""
    libraries = arguments[2:] or [
        name for name in _LIBRARIES if "prefect" not in name or "PREFECT_API_URL" in os.environ
    ]
    prepare_libraries()
    request = receive(arguments, libraries, later=() if arguments[2:] else _LATER)
    os.environ.pop(STAGE_SOCKET, None)
    sys.argv = ["sdlora", *request["arguments"]]
    from pipelines.cli.app import main

    end_as(main)


if __name__ == "__main__":
    _serve(sys.argv[1:])
