"""The flows of a project that workers run: the chain, and a watchdog that looks after runs."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import flow
from prefect.input import RunInput
from pydantic import Field

from pipelines.ledger.verdicts import results_of
from pipelines.orchestration.attempts import Attempts
from pipelines.orchestration.branch import commit, edit, take
from pipelines.orchestration.names import LEARN, WATCHDOG
from pipelines.orchestration.one_clone import require_one_clone
from pipelines.orchestration.reconcile import delete_old_watchdog_runs, reschedule_orphaned_runs
from pipelines.orchestration.run import finish
from pipelines.orchestration.server import refusals_in_one_line
from pipelines.orchestration.unrecorded import put_back, unrecorded
from pipelines.orchestration.worker_runs import (
    EndState,
    attempt,
    begin_attempt,
    enter_project,
    worker_flow,
)
from pipelines.planning.approvals import approve, evaluation_of, keep_other_gates
from pipelines.planning.inbox import add_once, arrived
from pipelines.project.errors import PushError
from pipelines.project.params import Params
from pipelines.project.settings import Workers
from pipelines.runtime.console import echo
from pipelines.runtime.processes import die_with
from pipelines.runtime.stage import Rows
from pipelines.versioning.repro import StageFailedError

_DECISION_SECONDS = 30 * 24 * 3600
"""How long a suspended run waits for a decision before it fails."""


@worker_flow(LEARN)
def learn(folder: str | None = None, record: bool = True) -> EndState:
    """Bring the chain of tasks up to date on a worker. First append a task where new images are named.

    Args:
        folder: Folder of the inbox whose new classes become the next task, such as zebras; none: no new task.
        record: Keep what the run makes of params.yaml, dvc.lock, metrics.json and ledger/: on the branch that
            workers.branch names, or in the clone. Without, they are put back; what was computed stays in the cache.
    """
    return attempt(lambda attempts: _learn(folder, attempts, record=record))


@flow(name=WATCHDOG, persist_result=False)
def watchdog() -> EndState:
    """Reschedule orphaned runs that the server's automations missed."""
    from prefect.states import Completed

    die_with(os.getppid())
    enter_project()
    delete_old_watchdog_runs()
    seen_to = reschedule_orphaned_runs(Params.load().workers.dead_after_seconds)
    return Completed(message=f"{seen_to} runs seen to" if seen_to else "nothing was overlooked")


class _Decision(RunInput):
    """What a person answers when a step has broken a limit of its gate. Not to answer leaves it closed."""

    by: str = Field(description="Who decides that the step may go out all the same.", min_length=1)
    why: str = Field(description="The reason, for those who read the ledger later.", min_length=1)


def _learn(folder: str | None, attempts: Attempts, *, record: bool) -> str:
    """Do what `learn` says in this worker's clone. Return what came of it in one line."""
    enter_project()
    workers = Params.load().workers
    begin_attempt(attempts, workers)
    require_one_clone(workers)
    put_back()
    if workers.branch:
        take(workers.branch, workers.push)
    if not record:
        with unrecorded():
            return f"{_bring_up_to_date(folder, workers, attempts)}; nothing was recorded"
    outcome = _bring_up_to_date(folder, workers, attempts)
    if not workers.branch:
        return outcome
    attempts.exit_if_superseded()
    message = f"Learn {folder}" if folder else "Bring the chain up to date"
    try:
        made = commit(workers.branch, message, workers.push)
    except PushError as error:  # a remote that is away: begun again, all that was done is there
        raise StageFailedError(f"error: {error}", 1, "push", interrupted=True) from error
    return f"{outcome}; {workers.branch} is {f'at {made[:10]}' if made else 'as it was'}"


def _bring_up_to_date(folder: str | None, workers: Workers, attempts: Attempts) -> str:
    """Append the task of a folder of the inbox, if one is named, and bring the chain up to date. Return a line."""
    if folder is not None:
        source = arrived(folder, Path(workers.inbox))
        for line in edit(lambda path: add_once(source, path)):
            echo(line)
    stages = _finish_through_gates(attempts)
    return f"{len(stages)} stages brought up to date" if stages else "all up to date"


def _finish_through_gates(attempts: Attempts) -> Rows:
    """Bring the chain up to date. Where a gate is closed the flow run is suspended until a person opens it.

    Suspended, it holds no worker. Resumed with who and why, it starts again from its beginning, on any worker, where
    all that was done is a cache hit; the answer is found under the hash of the results that it is about, so it opens
    the gate for those and for no others.
    """
    from prefect.flow_runs import suspend_flow_run

    answered: set[str] = set()
    while True:
        try:
            return finish(attempts.progressed, before_each=attempts.exit_if_superseded)
        except StageFailedError as failure:
            step = failure.closed_gate
            if step is None:
                raise
            key = f"{step}-{results_of(evaluation_of(step))}"
            if key in answered:  # an answer that does not open the gate is not asked for again
                raise
            question = _Decision.with_initial_data(description=f"{failure}")
            with refusals_in_one_line(LEARN):
                decision = suspend_flow_run(
                    wait_for_input=question,
                    key=key,
                    timeout=_DECISION_SECONDS,
                )
        answered.add(key)
        for line in _let_through(step, decision):
            echo(line)


def _let_through(step: str, decision: _Decision) -> list[str]:
    """Write a decision into params.yaml. Return lines to print."""
    lines = edit(lambda path: approve(step, by=decision.by, why=decision.why, path=path))
    keep_other_gates()
    return lines
