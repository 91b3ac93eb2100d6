"""Machines of one fit: calls of torchrun that meet on a port of the loopback interface, two processes each."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.commands import environment
from tests.support.forked_python import PYTHON
from tests.support.repository import REPOSITORY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_machines(
    folders: Sequence[Path], *command: str, servers: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start a command of `sdlora` by torchrun in each of these folders, as if each were a machine.

    `servers` names fork servers that run torchrun and its processes. By themselves each loads torch.
    """
    port = free_port()
    options = [f"--nnodes={len(folders)}", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=fit"]
    options += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", "-m", "pipelines"]
    settings = {
        **environment(),
        **(servers or {}),
        "PYTHONPATH": str(REPOSITORY),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "FATAL",
    }
    return [
        subprocess.Popen(
            [settings.get(PYTHON, sys.executable), "-m", "torch.distributed.run", *options, *command],
            cwd=folder,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for folder in folders
    ]


def said_by(machines: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for the end of all; return what each has printed."""
    return [machine.communicate(timeout=300)[0] for machine in machines]
