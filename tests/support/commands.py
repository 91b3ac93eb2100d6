"""Commands of the environment, run in the folder of a project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """A server is named that does not answer, so everything runs plainly and fast."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PREFECT_API_URL": "http://127.0.0.1:1/api"}


def call(folder: Path, *command: str) -> str:
    """Run a command of the environment; return what it printed."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
