"""The further processes of a fit that several devices share: they take part until it ends, and end with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from pipelines.runtime.console import log_line
from pipelines.runtime.processes import TERMINATED, die_with, end_group

if TYPE_CHECKING:
    from torch.distributed import Store


class Member(NamedTuple):
    """The place of a process among those that share a fit."""

    rank: int = 0
    size: int = 1
    device: int = 0
    """Which of the devices of its machine is its own."""
    devices: int = 1
    """How many devices of its machine take part."""
    store: Store | None = None
    """Where all meet; none for a fit by itself."""


def local_member(number: int, devices: int, folder: Path) -> Member:
    """Return the place of one of the processes of this machine, which meet in a folder."""
    from torch.distributed import FileStore

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    return Member(number, devices, number, devices, FileStore(str(folder / "meeting"), devices))


@contextlib.contextmanager
def other_ranks(count: int, command: Sequence[str]) -> Iterator[Member]:
    """Start `count` − 1 processes beside this one, and end them. Give this one's place among them.

    Each is called with `command`, its number and the folder. Where one of them ends badly this process is sent SIGTERM:
    it would wait for ever, and the same again may go well.
    """
    with TemporaryDirectory(prefix="sdlora-") as folder:
        parent = os.getpid()
        started = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "pipelines", *command, str(number), folder],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )
            for number in range(1, count)
        ]
        over = threading.Event()
        for number, process in enumerate(started, start=1):
            threading.Thread(target=_watch, args=(number, process, over), daemon=True).start()
        try:
            yield local_member(0, count, Path(folder))
            for process in started:
                process.wait()
        except RuntimeError:
            if any(_has_failed(process) for process in started):  # that is what torch complains of
                raise SystemExit(TERMINATED) from None
            raise
        finally:
            over.set()
            for process in started:
                end_group(process)


def _has_failed(process: subprocess.Popen[bytes]) -> bool:
    """Return whether it has ended badly. Its connections are closed a moment before it has."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=2) != 0
    return False


def _watch(number: int, process: subprocess.Popen[bytes], over: threading.Event) -> None:
    status = process.wait()
    if status and not over.is_set():
        log_line(
            f"device {number} of the fit has ended with status {status}; the others cannot go on without it"
        )
        os.kill(os.getpid(), signal.SIGTERM)
