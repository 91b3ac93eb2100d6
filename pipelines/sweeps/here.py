"""The chains of a sweep on this machine: each is `sdlora run` in its workspace, some of them at a time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.orchestration.run_notes import local_history
from pipelines.project.layout import RUN_LOG, SWEEPS
from pipelines.runtime.console import echo
from pipelines.runtime.file_lock import held
from pipelines.runtime.processes import die_with, end_group, environment
from pipelines.sweeps.grid import Chain
from pipelines.sweeps.results import Result, read_result
from pipelines.sweeps.workspace import Workspace, make_workspace, read_project, with_code

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Work:
    """A chain that is being computed."""

    process: subprocess.Popen[bytes]
    began: float


def run_here(name: str, chains: Sequence[Chain], *, at_once: int) -> list[Result]:
    """Bring all chains up to date on this machine. One that fails stops no other."""
    with only_sweep(name):
        project = read_project()
        spaces = [make_workspace(project, name, chain.name, chain.params) for chain in chains]
        with local_history(), environment(with_code(project)):
            return _run_all(chains, spaces, at_once=at_once)


def _run_all(chains: Sequence[Chain], spaces: Sequence[Workspace], *, at_once: int) -> list[Result]:
    """Run the chains in their workspaces, `at_once` at a time. Return what came of each, in order."""
    working: dict[int, _Work] = {}
    results: dict[int, Result] = {}
    try:
        while len(results) < len(chains):
            waiting = [i for i in range(len(chains)) if i not in working and i not in results]
            for index in may_begin(waiting, working, spaces)[: at_once - len(working)]:
                echo(f"{chain_label(index, chains)} …")
                working[index] = _Work(_begin(spaces[index].folder), time.monotonic())
            for index, work in list(working.items()):
                if work.process.poll() is not None:
                    results[index] = _result_of(spaces[index].folder, work.process.returncode)
                    seconds = time.monotonic() - work.began
                    echo(f"{chain_label(index, chains)}  {results[index].line}, {seconds:.1f} s")
                    if results[index].error is not None:
                        echo(f"all that it said: {os.path.relpath(spaces[index].folder / RUN_LOG)}")
                    del working[index]
            time.sleep(_POLL_SECONDS)
    finally:
        for work in working.values():
            end_group(work.process)
    return [results[index] for index in range(len(chains))]


def may_begin(
    waiting: Sequence[int], working: Mapping[int, object], spaces: Sequence[Workspace]
) -> list[int]:
    """Return the chains that may start.

    A chain waits while another with the same fits runs, because it can then reuse them from the cache.
    """
    busy = {spaces[index].fits for index in working}
    found = []
    for index in waiting:
        if spaces[index].fits not in busy:
            busy.add(spaces[index].fits)
            found.append(index)
    return found


def chain_label(index: int, chains: Sequence[Chain]) -> str:
    """Return how lines name a chain."""
    return f"[{index + 1:{len(str(len(chains)))}}/{len(chains)}] {chains[index].title}"


def _begin(folder: Path) -> subprocess.Popen[bytes]:
    """Start `sdlora run` in a workspace, in a group of its own that ends with this process."""
    parent = os.getpid()
    with (folder / RUN_LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "pipelines", "run"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )


def _result_of(folder: Path, status: int) -> Result:
    """Return what came of a chain whose process has ended: its metrics, or the last line that it said."""
    if status == 0:
        return read_result(folder)
    lines = (folder / RUN_LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), f"ended with status {status}")
    return Result(error=said.removeprefix("error: "))


@contextlib.contextmanager
def only_sweep(name: str) -> Iterator[None]:
    """Refuse to work while another process works at the same sweep."""
    busy = f"sweep: {name} is at work already; wait for it, or name another with --out"
    with held(SWEEPS / name / ".lock", busy=busy):
        yield
