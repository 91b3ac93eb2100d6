"""What every flow run on a worker does: one attempt of it, how it ends, and when it begins again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, State, flow  # a server finds a flow by its name in a module that it loads

from pipelines.orchestration.attempts import BEGUN, Attempts, checkpoint_mark, remember_state
from pipelines.orchestration.names import project_name
from pipelines.orchestration.reconcile import reschedule_orphaned_runs
from pipelines.orchestration.repository import repository_id
from pipelines.orchestration.stage_runs import current_flow_run
from pipelines.project.environment import PROJECT, WORKERS_REPOSITORY
from pipelines.project.error_text import one_line, user_message
from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS
from pipelines.project.params import Params
from pipelines.project.settings import Workers
from pipelines.runtime.console import log_line
from pipelines.runtime.processes import die_with
from pipelines.versioning.repro import StageFailedError

EndState = State
"""What a flow of workers returns: how it ended."""


def worker_flow(name: str) -> Callable[[Callable[..., EndState]], Flow[..., Any]]:
    """Make a flow for workers of a function. Prefect keeps no result of it and never retries it by itself."""
    return flow(name=name, persist_result=False, on_running=[remember_state])


def attempt(work: Callable[[Attempts], str]) -> EndState:
    """Do some work as one attempt of the flow run that this code is called in. Return how it ended.

    What came of it in one line is the state's message, and so is an error that the user can mend.
    """
    from prefect.states import Completed, Failed

    # What it prints goes through the worker: without it nothing would be told, and the next print would fail.
    die_with(os.getppid())
    attempts = _this_attempt()
    try:
        outcome: State = Completed(message=work(attempts))
    except StageFailedError as failure:
        line = str(failure).removeprefix("error: ")
        attempts.exit_if_superseded()
        return _again_later(line, attempts) if failure.interrupted else Failed(message=line)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        outcome = Failed(message=message)
    attempts.exit_if_superseded()
    return outcome


def begin_attempt(attempts: Attempts, workers: Workers) -> None:
    """Count this attempt of the flow run, and reschedule orphaned ones."""
    attempts.exit_if_superseded()
    reschedule_orphaned_runs(workers.dead_after_seconds)
    attempts.begin(checkpoint_mark(Params.load().training.checkpoint_store), workers.attempts)


def enter_project() -> None:
    """Go to this worker's clone of the project.

    Raises:
        InputError: there is no project where it should be, or another one.
    """
    os.chdir(_project_folder())
    told, here = os.environ.get(WORKERS_REPOSITORY), repository_id()
    if told and here and told != here:
        raise InputError(
            f"{Path.cwd()}: a clone of another repository (its first commit is {here}) than the one "
            f"whose {project_name()} was deployed ({told}); start the worker in a clone of that, or call"
            " sdlora deploy here"
        )


def _project_folder() -> Path:
    named = os.environ.get(PROJECT) or os.environ.get("PWD") or "."
    if not Path(named, PARAMS).is_file():
        raise InputError(
            f"{named}: no params.yaml there; start the worker in its clone of the project, or set {PROJECT} to it"
        )
    return Path(named)


def _this_attempt() -> Attempts:
    """Return the attempts of the flow run that this code is called in, of which this process is one."""
    run = current_flow_run()
    assert run
    return Attempts(UUID(run), BEGUN.get(UUID(run)))


def _again_later(why: str, attempts: Attempts) -> EndState:
    """Schedule this run again, for any worker, and end the process. Where the server is away, return Crashed.

    The run asks for it itself, because a server on SQLite loses an event now and then, and with it what an automation
    would do. It begins only when this process is sure to have ended: earlier, Prefect's worker would fail on it.
    """
    from prefect.exceptions import Pause
    from prefect.states import Crashed

    try:
        later = attempts.schedule(f"starts again: {why}")
    except Exception as trouble:
        log_line(f"prefect: the run could not be scheduled again ({one_line(trouble)})")
        return Crashed(message=why)
    raise Pause(state=later)
