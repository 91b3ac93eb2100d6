"""The flow that workers run: new images, the chain, a commit. `sdlora deploy` gives it to a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prefect import State, flow  # a server finds a flow by its name in a module, so this one loads Prefect

from pipelines.attempts import Attempts, checkpoint_mark
from pipelines.branch import commit, mark, push, take
from pipelines.errors import InputError
from pipelines.inbox import add_once, arrived
from pipelines.params import Params, Workers
from pipelines.processes import die_with
from pipelines.run import StageFailedError, finish, print_line
from pipelines.stage import complaint, current_flow_run

PROJECT = "SDLORA_PROJECT"
"""Environment variable: a worker's clone of the project; the folder that it was started in if not set."""


@flow(name="learn", persist_result=False)
def learn(folder: str | None = None, record: bool = True) -> State:
    """Bring the chain of tasks up to date on a worker; first append a task where new images are named.

    Args:
        folder: Folder of the inbox whose new classes become the next task, such as zebras; none: no new task.
        record: Put params.yaml, dvc.lock and metrics.json on the branch that workers.branch names, if it names one.
    """
    from prefect.states import Completed, Crashed, Failed

    # What it prints goes through the worker: without it nothing would be told, and the next print would fail.
    die_with(os.getppid())
    try:
        return Completed(message=work(folder, record=record))
    except StageFailedError as failure:
        # What was cut off is started again by itself, as often as attempts are allowed.
        return (Crashed if failure.cut_off else Failed)(message=str(failure))
    except Exception as error:
        line = complaint(error)
        if line is None:
            raise
        return Failed(message=line)


def work(folder: str | None, *, record: bool) -> str:
    """Do what `learn` says in this worker's clone; return what came of it in one line."""
    os.chdir(project())
    workers = Params.load().workers
    progressed = begin(workers)
    branch = workers.branch if record else None
    if branch:
        take(branch, workers.push)
    if folder is not None:
        for line in add_once(arrived(folder, Path(workers.inbox))):
            print_line(line)
        mark()
    stages = finish(progressed)
    outcome = f"{len(stages)} stages brought up to date" if stages else "all up to date"
    if not branch:
        return outcome
    made = commit(branch, f"Learn {folder}" if folder else "Bring the chain up to date")
    if workers.push:
        try:
            push(branch, workers.push)
        except (
            InputError
        ) as error:  # a remote that is away, or a run that was given up and has ended all the same
            raise StageFailedError(str(error), 1, cut_off=True) from error
    return f"{outcome}; {branch} is at {made[:10]}" if made else f"{outcome}; {branch} is as it was"


def begin(workers: Workers) -> Callable[[], None]:
    """Count this attempt of the flow run; return what notes progress."""
    run = current_flow_run()
    assert run
    attempts = Attempts(run, workers.attempts)
    attempts.begin(checkpoint_mark(Params.load().training.checkpoint_store))
    return attempts.progressed


def project() -> Path:
    """This worker's clone."""
    named = os.environ.get(PROJECT) or os.environ.get("PWD") or "."
    if not Path(named, "params.yaml").is_file():
        raise InputError(
            f"{named}: no params.yaml there; start the worker in its clone of the project, or set {PROJECT} to it"
        )
    return Path(named)
