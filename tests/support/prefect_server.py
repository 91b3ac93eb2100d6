"""The fork server of tests for what runs with Prefect: its server and its workers, their flow runs, and `sdlora`.

What is forked leads a session, as what `Popen` starts for these tests does, and has the settings of its environment.
A worker has its flow runs forked here too, by way of `forked_python`: each would load all this by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.runtime.fork_server import end_as, receive
from pipelines.versioning.dvc_server import _LIBRARIES as DVC_LIBRARIES
from tests.support.forked_python import PYTHON, run_python

_LIBRARIES = (
    "prefect.cli.deployment",
    "prefect.cli.events",
    "prefect.cli.server",
    "prefect.cli.worker",
    "prefect.flow_engine",
    "prefect.runner._workspace_starter",
    "prefect.server.api.server",
    "prefect.workers.process",
    "uvicorn",
    *DVC_LIBRARIES,
    "pipelines.cli.app",
    "pipelines.orchestration.deploy",
    "pipelines.orchestration.worker_flows",
    "pipelines.sweeps.flow",
    "pipelines.sweeps.pool",
)


def _serve(arguments: Sequence[str]) -> None:
    request = receive(arguments, _LIBRARIES)
    os.setsid()
    from prefect.context import refresh_global_settings_context
    from prefect.logging.configuration import PROCESS_LOGGING_CONFIG, setup_logging

    refresh_global_settings_context()
    PROCESS_LOGGING_CONFIG.clear()
    setup_logging()
    program, *words = request["arguments"]
    sys.argv = [str(Path(sys.executable).with_name(program)), *words]
    sys.executable = os.environ.get(PYTHON, sys.executable)
    if program == "python":
        end_as(lambda: run_python(words))
    if program == "sdlora":
        from pipelines.cli.app import main

        end_as(main)
    from prefect.cli import app

    end_as(app)


if __name__ == "__main__":
    _serve(sys.argv[1:])
