"""A warm process for `dvc repro` alone, which starts every stage anew: begun by its second stage, ended with it.

It forks for the stages that follow as the one of `sdlora run` does. A stage that is called by hand, or is the only one
that its DVC runs, runs by itself. Where there is no dvc.lock yet, the first stage of a chain begins it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.runtime.fork_server import LIBRARIES, Forked, forked_for, listening, run_as_forked, status_of
from pipelines.runtime.processes import die_with_starter, starter

PLACE = Path(".sdlora")


def ask(arguments: list[str]) -> int | None:
    """Have the warm process of this stage's DVC run it; return its status, None if it has to run by itself."""
    dvc = starter()
    if dvc is None or not hasattr(os, "pidfd_open"):
        return None
    path = PLACE / f"warm-{dvc}"
    try:
        die_with_starter()
        forked = Forked(str(path), arguments, os.environ, [0, 1, 2])
    except FileNotFoundError:
        if has_ended_a_stage(dvc) or begins_a_chain(dvc):
            with contextlib.suppress(OSError):
                begin(path, dvc)
        return None
    except OSError:  # of a process that was killed
        path.unlink(missing_ok=True)
        return None
    return status_of(forked)


def has_ended_a_stage(dvc: int) -> bool:
    """Whether dvc.lock was written since a process began."""
    try:
        ticks = int(Path(f"/proc/{dvc}/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return Path("dvc.lock").stat().st_mtime > time.time() - age
    except (OSError, AttributeError):
        return False


def begins_a_chain(dvc: int) -> bool:
    """Whether nothing has been run yet, and a DVC is not about to run a single stage."""
    try:
        words = Path(f"/proc/{dvc}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return not Path("dvc.lock").exists() and not {b"-s", b"--single-item"} & set(words)


def begin(path: Path, dvc: int) -> None:
    """Start a warm process that listens at `path` until the process `dvc` has ended."""
    path.parent.mkdir(exist_ok=True)
    libraries = [name for name in LIBRARIES if "prefect" not in name or "PREFECT_API_URL" in os.environ]
    handle = os.pidfd_open(dvc)
    try:
        with listening(str(path)) as listener:
            numbers = [listener.fileno(), handle]
            subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "pipelines.cli.preloaded_for_dvc",
                    str(path),
                    *map(str, numbers),
                    *libraries,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # whoever reads what DVC prints waits for the end of DVC alone
                start_new_session=True,
                pass_fds=numbers,
            )
    finally:
        os.close(handle)


def main(path: str, socket: int, handle: int, libraries: Sequence[str]) -> None:
    """Load, and fork for each request that comes to a socket, until the process of a handle has ended."""
    try:
        request = forked_for(socket, libraries, until=handle)
    except SystemExit:
        Path(path).unlink(missing_ok=True)
        raise
    run_as_forked(request)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
