"""A Python that has the fork servers of tests run what would load their libraries anew.

Programs that start others by `sys.executable` are given it in place of the real one. Whatever no server of theirs is
named for, the real one runs.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.runtime.fork_server import ForkedProcess
from pipelines.runtime.processes import die_with_starter, environment

PYTHON = "SDLORA_TEST_PYTHON"
"""The environment variable that says where it is, for a forked process that is to use it."""
COMMAND_SOCKET = "SDLORA_TEST_COMMANDS"
"""The environment variable that says where the fork server of `sdlora` and torchrun listens."""
PREFECT_SOCKET = "SDLORA_TEST_PREFECT"
"""The environment variable that says where the fork server of Prefect listens."""


def write_python(path: Path) -> Path:
    """Write the program."""
    path.write_text(f"#!{sys.executable}\nfrom tests.support.forked_python import run\nrun()\n")
    path.chmod(0o755)
    return path


def run() -> None:
    """Run what the arguments of this process say, as Python would."""
    commands, prefect = os.environ.get(COMMAND_SOCKET), os.environ.get(PREFECT_SOCKET)
    match [word for word in sys.argv[1:] if word not in ("-P", "-u")]:
        case ["-m", "pipelines", *words] if commands:
            _have_run(commands, words)
        case ["-m", "torch.distributed.run", *_] as words if commands:
            _have_run(commands, ["python", *words])
        case ["-m", "prefect", *words] if prefect:
            _have_run(prefect, ["prefect", *words])
        case ["-m", module, *_] as words if module.startswith("prefect.") and prefect:
            _have_run(prefect, ["python", *words])
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


def _have_run(socket: str, words: Sequence[str]) -> None:
    """Have a fork server run a command, and end as it ends, also when told to."""
    die_with_starter()
    forked = ForkedProcess(socket, words, os.environ, [0, 1, 2])
    signal.signal(signal.SIGTERM, lambda *_: os.kill(forked.pid, signal.SIGTERM))
    status = forked.wait()
    raise SystemExit(status if status >= 0 else 128 - status)


def run_python(words: Sequence[str]) -> None:
    """Run what follows `python` on a command line, in this process, which was forked for it."""
    match words:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.modules.pop(module, None)  # as in a new process
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")


@contextmanager
def forking(servers: Mapping[str, str]) -> Iterator[None]:
    """Have servers fork what this process, and what it starts, start with Python meanwhile."""
    python = sys.executable
    names = {PYTHON, COMMAND_SOCKET, PREFECT_SOCKET} & {*servers}
    with environment({name: servers[name] for name in names}):
        sys.executable = servers[PYTHON]
        try:
            yield
        finally:
            sys.executable = python
