"""Processes that end with those that started them, and their environment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from pipelines.project.layout import CODE_STAGE, STAGES

STOP_SECONDS = 5.0
GRACE_SECONDS = 20.0
"""How long work may take to come to a good end after SIGTERM; a spot machine is gone after 30 seconds."""
TERMINATED = 128 + signal.SIGTERM
"""The exit status of a process that was ended by SIGTERM, as a shell has it."""

# Looked up here, because it is called between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent dies: a killed DVC leaves no stage running on."""
    if _LIBC is None:
        return
    pr_set_pdeathsig = 1
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)


def die_with_starter() -> None:
    """End when what started this process dies, also where a shell stands between the two.

    DVC starts a stage through a shell. Bash makes way for a command that is its only one; dash, which DVC takes
    where SHELL is not set, as in most containers and services, waits for it, and outlives DVC.
    """
    die_with(os.getppid())
    before = starter()
    if before not in (None, os.getppid()):
        with contextlib.suppress(OSError, AttributeError):  # none of this system's, or nobody to outlive
            _end_with(os.pidfd_open(before))


def starter() -> int | None:
    """Return the process that started this one, also behind a shell between the two. None where it is not known."""
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        if b"-c" not in words:
            return parent
        return int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _end_with(handle: int) -> None:
    def watch() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Let work come to a good end on SIGTERM: what is yielded says whether to.

    `GRACE_SECONDS` after the signal the process ends with status 143 whatever it is at, so that a store that hangs
    keeps no process alive. Outside of the main thread, where Python takes no signals, nobody asks.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked
        return
    # Of what wakes a thread, this alone may be called in a signal handler.
    wake: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def watch() -> None:
        if wake.get():
            time.sleep(GRACE_SECONDS)
            os._exit(TERMINATED)

    def note(number: int, frame: object) -> None:
        nonlocal asked
        if not asked:
            asked = True
            wake.put(True)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: asked
    finally:
        if not asked:  # once asked, the signal comes again from all that die above
            signal.signal(signal.SIGTERM, before)
            wake.put(False)


class _Leader(Protocol):
    """A process that leads a group: a `Popen`, or what stands for one."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int: ...


def end_group(process: _Leader) -> None:
    """End a process that leads a group, and all that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        signal_group(process, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            return


def signal_group(process: _Leader, sign: signal.Signals) -> None:
    """Signal a process that leads a group, and all that it started. Those that were stopped are woken for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)
        os.killpg(process.pid, signal.SIGCONT)


def wake_the_ending(mark: Path) -> None:
    """Resume stopped processes with a pending SIGTERM so that they exit, and terminate orphaned stages.

    When all above a stopped fit is killed, the kernel's SIGTERM waits for it to be woken, and the GPU with it. One that
    was stopped before it had asked the kernel for that is known by its session, whose leader, a DVC, is gone. Such are
    the user's processes in this state in any folder that holds a file named as `mark` is, a project's; none else is
    touched.
    """
    for place in Path("/proc").glob("[0-9]*"):
        # Others' processes, and those that have ended meanwhile.
        with contextlib.suppress(OSError):
            facts = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines())
            if not facts["State"].startswith("T") or not (place / "cwd").readlink().joinpath(mark).is_file():
                continue
            pending = int(facts["SigPnd"], 16) | int(facts["ShdPnd"], 16)
            if not pending >> (signal.SIGTERM - 1) & 1:
                words = [
                    Path(os.fsdecode(word)).name for word in (place / "cmdline").read_bytes().split(b"\0")[:3]
                ]
                if not any(pair in _COMMANDS for pair in pairwise(words)) or _leader_lives(int(place.name)):
                    continue
                os.kill(int(place.name), signal.SIGTERM)
            os.kill(int(place.name), signal.SIGCONT)


_COMMANDS = {("sdlora", stage) for stage in (CODE_STAGE, *STAGES)}
"""How the commands of stages begin, as DVC calls them."""


def _leader_lives(process: int) -> bool:
    """Return whether the leader of a process's session is at work. One of another namespace is not known, so it is."""
    leader = os.getsid(process)
    if not leader:
        return True
    try:
        return Path(f"/proc/{leader}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while. What was there before comes back."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
