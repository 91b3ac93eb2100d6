"""The fork server of tests for Prefect's command line: its server, its workers, its questions.

What is forked leads a session, as what `Popen` starts for these tests does, and has the settings of its environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.runtime.fork_server import end_as, receive

_LIBRARIES = (
    "prefect.cli.deployment",
    "prefect.cli.events",
    "prefect.cli.server",
    "prefect.cli.worker",
    "prefect.flow_engine",
    "prefect.server.api.server",
    "prefect.workers.process",
    "uvicorn",
)


def _serve(arguments: Sequence[str]) -> None:
    request = receive(arguments, _LIBRARIES)
    os.setsid()
    from prefect.cli import app
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    sys.argv = [str(Path(sys.executable).with_name("prefect")), *request["arguments"]]
    end_as(app)


if __name__ == "__main__":
    _serve(sys.argv[1:])
