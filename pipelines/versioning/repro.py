"""One stage brought up to date through DVC, in a process of its own, and how it failed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TextIO

from pipelines.project.environment import DVC_SOCKET, ERROR_FILE, PARENT_FLOW_RUN
from pipelines.project.layout import StageName
from pipelines.runtime.fork_server import ForkedProcess
from pipelines.runtime.processes import die_with, end_group
from pipelines.runtime.stage import current_flow_run
from pipelines.versioning.patches import plain_dvc
from pipelines.versioning.stage_lock import turn

CHATTER = (
    "Running stage ",
    "> ",
    "Generating lock file ",
    "Updating lock file ",
    "To track the changes with git, run:",
    "\tgit add ",
    "To enable auto staging, run:",
    "\tdvc config core.autostage true",
    "Use `dvc push` ",
    "Stage '",
    "Data and pipelines are up to date.",
)
"""What DVC says of itself on stdout; the rest is the stage's."""

BROKEN = "error: gate: "
"""How the line of a gate begins that a person may open."""

FROM_CACHE = "is cached - skipping run, checking out outputs"


class StageFailedError(Exception):
    """A stage ended badly; it said why in one line, and `status` is what the whole run ends with.

    One that was `cut_off` said nothing: it, or DVC, was killed, or DVC failed; the same again may go well.
    """

    def __init__(self, line: str, status: int, stage: str, *, cut_off: bool = False) -> None:
        super().__init__(line)
        self.status, self.stage = status, stage
        self.cut_off = cut_off

    @property
    def closed_gate(self) -> str | None:
        """The step that broke a limit of its gate, if that is what happened."""
        kind, step = StageName.parse(self.stage)
        return step if kind == "gate" and self.status == 2 and str(self).startswith(BROKEN) else None


Process = ForkedProcess | subprocess.Popen[bytes]


@dataclass(frozen=True)
class Apart:
    """How DVC is run beside another: what it and its stage print, errors too, goes line by line to `show`."""

    show: Callable[[str], None]
    begun: Callable[[Process], None]
    """Called with the process, which leads a group, as soon as there is one."""
    settings: Mapping[str, str]
    """What its environment has more."""


def bring(name: str, *, pull: bool, apart: Apart | None = None) -> bool:
    """Bring one stage up to date through DVC; return whether its outputs came from the cache.

    With `pull` the remote's cache is asked too.
    """
    with turn(name), TemporaryDirectory(prefix="sdlora-") as folder:
        error_file = Path(folder) / "error"
        command = ["repro", "--single-item", name, *(["--pull"] if pull else [])]
        status, cached = dvc(
            command, {ERROR_FILE: str(error_file), PARENT_FLOW_RUN: current_flow_run() or ""}, apart
        )
        if status:
            raise failure_of(name, status, error_file)
    return cached


def failure_of(name: str, status: int, error_file: Path) -> StageFailedError:
    """Make an error of what a stage wrote about its end, or of DVC's own failure."""
    if error_file.is_file():
        code, _, line = error_file.read_text(encoding="utf-8").strip().partition(" ")
        return StageFailedError(line, int(code), name)
    return StageFailedError(
        f"error: {name} did not finish (dvc: status {status}, reason above); run the same again",
        1,
        name,
        cut_off=True,
    )


def dvc(
    arguments: list[str], settings: Mapping[str, str] = MappingProxyType({}), apart: Apart | None = None
) -> tuple[int, bool]:
    """Run DVC in a group of its own; return its status, and whether outputs came from the cache."""
    settings = {**settings, **apart.settings} if apart else settings
    process, output = start_dvc(["--wait-for-lock", *arguments], settings, errors_too=apart is not None)
    show = apart.show if apart else print_line
    cached = False
    try:
        if apart:
            apart.begun(process)
        with output:
            for line in output:
                cached |= FROM_CACHE in line
                if line.strip() and not line.startswith(CHATTER):
                    show(line.rstrip())
        return process.wait(), cached
    except BaseException:
        end_group(process)
        raise


def start_dvc(
    arguments: list[str], settings: Mapping[str, str], *, errors_too: bool
) -> tuple[Process, TextIO]:
    """Start DVC, forked from its fork server where there is one; also return what it prints."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", **settings}
    reading, writing = os.pipe()
    output = open(reading, encoding="utf-8", errors="replace")  # noqa: SIM115 - who called closes it
    try:
        streams = (writing, writing if errors_too else 2)
        return _forked_or_new(arguments, environment, *streams), output
    except BaseException:
        output.close()
        raise
    finally:
        os.close(writing)


def _forked_or_new(arguments: list[str], environment: Mapping[str, str], stdout: int, stderr: int) -> Process:
    """Start DVC in a session of its own, to end when this process does."""
    with open(os.devnull, "rb") as nothing:
        if DVC_SOCKET in os.environ:
            with contextlib.suppress(OSError):
                streams = (nothing.fileno(), stdout, stderr)
                forked = ForkedProcess(os.environ[DVC_SOCKET], arguments, environment, streams)
                if forked.pid:
                    return forked
        parent = os.getpid()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", _module(), *arguments],
            stdin=nothing,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )


def _module() -> str:
    return "dvc" if plain_dvc() else "pipelines.versioning.patches"


def print_line(text: str) -> None:
    """Print a line at once, so that it stands in order with what stages write."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
