"""The flow of one chain of a sweep, which a worker runs in a workspace of its own."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.orchestration.attempts import Attempts
from pipelines.orchestration.deployment_runs import leave_table
from pipelines.orchestration.names import SWEEP
from pipelines.orchestration.run import finish
from pipelines.orchestration.worker_runs import (
    EndState,
    attempt,
    begin_attempt,
    enter_project,
    worker_flow,
)
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from pipelines.runtime.processes import environment
from pipelines.sweeps.results import RESULT, read_result
from pipelines.sweeps.workspace import make_workspace, read_project, with_code


@worker_flow(SWEEP)
def sweep(name: str, chain: str, params: str, code: str) -> EndState:
    """Bring one chain of a sweep up to date, in a workspace of its own in this worker's clone.

    Args:
        name: The sweep, as its folder is called.
        chain: The chain, as its workspace is called.
        params: The whole text of its params.yaml.
        code: Hash of the code and dvc.yaml of the project that sweeps, which this clone must have too.
    """
    return attempt(lambda attempts: run_chain(name, chain, params, code, attempts))


def run_chain(name: str, chain: str, params: str, code: str, attempts: Attempts) -> str:
    """Do what `sweep` says. Return what came of it in one line, and leave the numbers for who sweeps."""
    enter_project()
    shared = read_project()
    if shared.code != code:
        raise InputError(
            f"{Path.cwd()} has other code, or another dvc.yaml, than the project that sweeps; bring both to the same"
            " commit"
        )
    os.chdir(make_workspace(shared, name, chain, params).folder)
    begin_attempt(attempts, Params.load().workers)
    with environment(with_code(shared)):
        stages = finish(attempts.progressed, before_each=attempts.exit_if_superseded)
    attempts.exit_if_superseded()
    leave_table(RESULT, [read_result(Path.cwd()).numbers or {}])
    return f"{len(stages)} stages brought up to date" if stages else "all up to date"
