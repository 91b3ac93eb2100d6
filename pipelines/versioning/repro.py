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

from pipelines.project.environment import DVC_SOCKET, OUTCOME_FILE
from pipelines.project.layout import StageName
from pipelines.runtime.console import echo
from pipelines.runtime.fork_server import ForkedProcess
from pipelines.runtime.processes import die_with, end_group
from pipelines.runtime.stage_outcome import GATE, read_outcome
from pipelines.versioning.patches import plain_dvc
from pipelines.versioning.stage_lock import stage_lock

_CHATTER = (
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
"""What DVC says of itself on stdout. It is left out for the eye's sake alone: nothing is decided by it."""


class StageFailedError(Exception):
    """A stage ended badly. It said why in one line, and `status` is what the whole run ends with.

    One that was `interrupted` said nothing: it, or DVC, was killed, or DVC failed; the same again may go well.
    """

    def __init__(
        self, line: str, status: int, stage: str, *, interrupted: bool = False, gate_closed: bool = False
    ) -> None:
        super().__init__(line)
        self.status, self.stage = status, stage
        self.interrupted = interrupted
        self._gate_closed = gate_closed

    @property
    def closed_gate(self) -> str | None:
        """Return the step whose gate is closed, which a person may open. None if something else went wrong."""
        return StageName.parse(self.stage).item if self._gate_closed else None


Process = ForkedProcess | subprocess.Popen[bytes]


@dataclass(frozen=True)
class ConcurrentOptions:
    """Options for running DVC beside other work: stdout and stderr are passed to `show` line by line."""

    show: Callable[[str], None]
    begun: Callable[[Process], None]
    """called with the process, which leads a group, as soon as there is one"""
    settings: Mapping[str, str]
    """further environment variables"""


def reproduce_stage(name: str, *, pull: bool, concurrent: ConcurrentOptions | None = None) -> bool:
    """Bring one stage up to date through DVC. Return whether its outputs came from the cache.

    They did, or were there, where DVC ends well and the stage has left no outcome. With `pull` the remote's cache is
    asked too.
    """
    with stage_lock(name), TemporaryDirectory(prefix="sdlora-") as folder:
        outcome = Path(folder) / "outcome.json"
        command = ["repro", "--single-item", name, *(["--pull"] if pull else [])]
        status = run_dvc(command, {OUTCOME_FILE: str(outcome)}, concurrent)
        if status:
            raise _failure_of(name, status, outcome)
        return read_outcome(outcome) is None


def run_dvc(
    arguments: list[str],
    settings: Mapping[str, str] = MappingProxyType({}),
    concurrent: ConcurrentOptions | None = None,
) -> int:
    """Run DVC in a group of its own. Return its exit status."""
    settings = {**settings, **concurrent.settings} if concurrent else settings
    process, output = _start_dvc(["--wait-for-lock", *arguments], settings, errors_too=concurrent is not None)
    show = concurrent.show if concurrent else echo
    try:
        if concurrent:
            concurrent.begun(process)
        with output:
            for line in output:
                if line.strip() and not line.startswith(_CHATTER):
                    show(line.rstrip())
        return process.wait()
    except BaseException:
        end_group(process)
        raise


def _failure_of(name: str, status: int, path: Path) -> StageFailedError:
    """Make an error of what a stage wrote about its end, or of DVC's own failure."""
    outcome = read_outcome(path)
    if outcome is not None and outcome.status:
        return StageFailedError(outcome.line, outcome.status, name, gate_closed=outcome.kind == GATE)
    return StageFailedError(
        f"error: {name} did not finish (dvc: status {status}, reason above); run the same again",
        1,
        name,
        interrupted=True,
    )


def _start_dvc(
    arguments: list[str], settings: Mapping[str, str], *, errors_too: bool
) -> tuple[Process, TextIO]:
    """Start DVC, forked from its fork server where there is one. Also return what it prints."""
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
