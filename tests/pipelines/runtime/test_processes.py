"""Processes end with those that started them, and work that is told to stop comes to a good end in time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.runtime.processes import STOP_SECONDS, TERMINATED, end_group, stop_asked, wake_the_ending
from tests.support.repository import REPOSITORY

WORK = """
import sys, time
from pathlib import Path
from pipelines.runtime import processes

processes.GRACE_SECONDS = float(sys.argv[1])
with processes.stop_asked() as stop:
    Path("ready").touch()
    while not stop():
        time.sleep(0.01)
    Path("asked").touch()
    time.sleep(float(sys.argv[2]))
    Path("saved").touch()
    raise SystemExit(processes.TERMINATED)
"""


def start(program: str, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Run a program in a process of its own until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    wait_for(lambda: (folder / "ready").exists())
    return process


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_work_that_is_told_to_stop_comes_to_its_end_however_often_it_is_told(tmp_path: Path) -> None:
    """A group, the kernel and a supervisor all send the signal when something above dies."""
    process = start(WORK, tmp_path, "20", "0.2")
    process.terminate()
    wait_for(lambda: (tmp_path / "asked").exists())
    for _ in range(3):
        process.terminate()
    assert process.wait(timeout=10) == TERMINATED == 143
    assert (tmp_path / "saved").exists()


def test_work_that_does_not_come_to_its_end_is_ended(tmp_path: Path) -> None:
    process = start(WORK, tmp_path, "0.2", "60")
    process.terminate()
    assert process.wait(timeout=10) == TERMINATED
    assert (tmp_path / "asked").exists()
    assert not (tmp_path / "saved").exists()


def test_nothing_stays_behind_of_work_that_was_not_told_to_stop() -> None:
    handler, threads = signal.getsignal(signal.SIGTERM), threading.active_count()
    with stop_asked() as stop:
        assert not stop()
        assert signal.getsignal(signal.SIGTERM) is not handler
    assert signal.getsignal(signal.SIGTERM) is handler
    wait_for(lambda: threading.active_count() == threads)


def test_work_in_another_thread_is_never_told() -> None:
    found = []

    def work() -> None:
        with stop_asked() as stop:
            found.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_process_ends_with_its_starter_though_a_shell_stands_between(tmp_path: Path) -> None:
    """As DVC without SHELL in its environment starts a stage: the shell waits, and survives DVC."""
    (tmp_path / "child.py").write_text(
        """
import os, time
from pathlib import Path
from pipelines.runtime.processes import die_with_starter

die_with_starter()
Path("child").write_text(str(os.getpid()))
Path("ready").touch()
time.sleep(60)
"""
    )
    command = [f"{sys.executable} child.py; true"]  # two commands: no shell makes way for the first
    starter = start(f"import subprocess; subprocess.run({command!r}, shell=True)", tmp_path)
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/status")
    assert child.exists()
    starter.kill()
    starter.wait()
    wait_for(lambda: not child.exists() or "(zombie)" in child.read_text())


def test_a_stopped_process_is_ended_as_gently_as_another(tmp_path: Path) -> None:
    process = start(WORK, tmp_path, "20", "0")
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    end_group(process)
    assert process.returncode == TERMINATED
    assert time.monotonic() - started < STOP_SECONDS
    assert (tmp_path / "saved").exists()


def test_a_stopped_process_that_was_told_to_end_is_woken_and_no_other(tmp_path: Path) -> None:
    """Where all above a stopped fit was killed, the kernel's SIGTERM waits until somebody wakes it."""
    (tmp_path / "mark").touch()
    (tmp_path / "elsewhere").mkdir()
    ending, waiting, other = (
        subprocess.Popen(["sleep", "60"], cwd=folder)
        for folder in (tmp_path, tmp_path, tmp_path / "elsewhere")
    )
    try:
        for process in (ending, waiting, other):
            process.send_signal(signal.SIGSTOP)
            wait_for(lambda pid=process.pid: is_stopped(pid))
        ending.terminate()
        other.terminate()
        wake_the_ending(Path("mark"))
        assert ending.wait(timeout=10) == -signal.SIGTERM
        assert is_stopped(waiting.pid)
        assert is_stopped(other.pid)
    finally:
        for process in (ending, waiting, other):
            process.kill()
            process.wait()


def test_a_stopped_stage_whose_dvc_is_gone_is_ended_though_nothing_told_it_to(tmp_path: Path) -> None:
    """It was stopped before it had asked the kernel to be ended with its DVC."""
    (tmp_path / "mark").touch()
    (tmp_path / "sdlora").write_text("#!/bin/sh\necho $$ > $2\nsleep 60\n")
    (tmp_path / "sdlora").chmod(0o755)
    commands = {"orphan": "fit", "kept": "fit", "run": "run"}
    leaders = [
        subprocess.Popen(["sh", "-c", f"./sdlora {what} {name}; true"], cwd=tmp_path, start_new_session=True)
        for name, what in commands.items()
    ]
    try:
        pids = []
        for name in commands:
            wait_for(lambda name=name: (tmp_path / name).exists() and (tmp_path / name).read_text())
            pids.append(int((tmp_path / name).read_text()))
            os.kill(pids[-1], signal.SIGSTOP)
            wait_for(lambda: is_stopped(pids[-1]))
        for leader in (leaders[0], leaders[2]):
            leader.kill()
            leader.wait()
        wake_the_ending(Path("mark"))
        wait_for(lambda: not is_stopped(pids[0]))
        wait_for(lambda: not Path(f"/proc/{pids[0]}").exists() or "Z" in state_of(pids[0]))
        assert is_stopped(pids[1])
        assert is_stopped(pids[2])
    finally:
        for leader in leaders:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGKILL)
            leader.wait()


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
