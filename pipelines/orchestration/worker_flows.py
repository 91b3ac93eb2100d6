"""The flows that workers run, which `sdlora deploy` gives to a server: the project's chain, chains of a sweep, and one
that looks after the runs of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from prefect import State, flow  # a server finds a flow by its name in a module, so this one loads Prefect
from prefect.input import RunInput
from pydantic import Field

from pipelines.ledger.verdicts import results_of
from pipelines.orchestration.attempts import BEGUN, Attempts, checkpoint_mark, remember_state
from pipelines.orchestration.branch import commit, edit, take
from pipelines.orchestration.deploy import TEND
from pipelines.orchestration.reconcile import forget_tendings, see_to_overlooked
from pipelines.orchestration.run import finish
from pipelines.planning.approvals import approve, evaluation_of
from pipelines.planning.inbox import add_once, arrived
from pipelines.project.environment import PROJECT
from pipelines.project.errors import InputError, PushError
from pipelines.project.params import Params, Workers
from pipelines.runtime.processes import die_with, environment
from pipelines.runtime.stage import Summary, complaint, current_flow_run, first_line, say
from pipelines.sweeps.pool import RESULT
from pipelines.sweeps.results import read_result
from pipelines.sweeps.workspace import make_workspace, read_project, with_code
from pipelines.versioning.repro import StageFailedError, print_line


@flow(name="learn", persist_result=False, on_running=[remember_state])
def learn(folder: str | None = None, record: bool = True) -> State:
    """Bring the chain of tasks up to date on a worker; first append a task where new images are named.

    Args:
        folder: Folder of the inbox whose new classes become the next task, such as zebras; none: no new task.
        record: Put params.yaml, dvc.lock and metrics.json on the branch that workers.branch names, if it names one.
    """
    return state_of(lambda attempts: work(folder, attempts, record=record))


@flow(name="sweep", persist_result=False, on_running=[remember_state])
def sweep(name: str, chain: str, params: str, code: str) -> State:
    """Bring one chain of a sweep up to date, in a workspace of its own in this worker's clone.

    Args:
        name: The sweep, as its folder is called.
        chain: The chain, as its workspace is called.
        params: The whole text of its params.yaml.
        code: Hash of the code and dvc.yaml of the project that sweeps, which this clone must have too.
    """
    return state_of(lambda attempts: sweep_chain(name, chain, params, code, attempts))


@flow(name=TEND, persist_result=False)
def tend() -> State:
    """Have runs go on that nothing is behind any more and that the server's automations have overlooked."""
    from prefect.states import Completed

    die_with(os.getppid())
    os.chdir(project())
    forget_tendings()
    seen_to = see_to_overlooked(Params.load().workers.dead_after_seconds)
    return Completed(message=f"{seen_to} runs seen to" if seen_to else "nothing was overlooked")


def state_of(work: Callable[[Attempts], str]) -> State:
    """Do some work; what came of it in one line is a state's message, and so is what the user can mend."""
    from prefect.states import Completed, Failed

    # What it prints goes through the worker: without it nothing would be told, and the next print would fail.
    die_with(os.getppid())
    attempts = this_attempt()
    try:
        outcome: State = Completed(message=work(attempts))
    except StageFailedError as failure:
        line = str(failure).removeprefix("error: ")
        attempts.give_way()
        return again_later(line, attempts) if failure.cut_off else Failed(message=line)
    except Exception as error:
        told = complaint(error)
        if told is None:
            raise
        outcome = Failed(message=told)
    attempts.give_way()
    return outcome


def this_attempt() -> Attempts:
    """The attempts of the flow run that this code is called in, of which this process is one."""
    run = current_flow_run()
    assert run
    return Attempts(UUID(run), BEGUN.get(UUID(run)))


def again_later(why: str, attempts: Attempts) -> State:
    """Schedule this run again, for any worker, and end the process; where the server is away, return Crashed.

    The run asks for it itself, because a server on SQLite loses an event now and then, and with it what an automation
    would do. It begins only when this process is sure to have ended: earlier, Prefect's worker would fail on it.
    """
    from prefect.exceptions import Pause
    from prefect.states import Crashed

    try:
        later = attempts.schedule(f"starts again: {why}")
    except Exception as trouble:
        say(f"prefect: the run could not be scheduled again ({first_line(trouble)})")
        return Crashed(message=why)
    raise Pause(state=later)


def work(folder: str | None, attempts: Attempts, *, record: bool) -> str:
    """Do what `learn` says in this worker's clone; return what came of it in one line."""
    os.chdir(project())
    workers = Params.load().workers
    begin(attempts, workers)
    branch = workers.branch if record else None
    if branch:
        take(branch, workers.push)
    if folder is not None:
        source = arrived(folder, Path(workers.inbox))
        for line in edit(lambda path: add_once(source, path)):
            print_line(line)
    stages = finish_through_gates(attempts)
    outcome = f"{len(stages)} stages brought up to date" if stages else "all up to date"
    if not branch:
        return outcome
    attempts.give_way()
    said = f"Learn {folder}" if folder else "Bring the chain up to date"
    try:
        made = commit(branch, said, workers.push)
    except PushError as error:  # a remote that is away: begun again, all that was done is there
        raise StageFailedError(f"error: {error}", 1, "push", cut_off=True) from error
    return f"{outcome}; {branch} is at {made[:10]}" if made else f"{outcome}; {branch} is as it was"


class Decision(RunInput):
    """What a person answers when a step has broken a limit of its gate; not to answer leaves it closed."""

    by: str = Field(description="Who decides that the step may go out all the same.", min_length=1)
    why: str = Field(description="The reason, for those who read the ledger later.", min_length=1)


def finish_through_gates(attempts: Attempts) -> Summary:
    """Bring the chain up to date; where a gate is closed the flow run is suspended until a person opens it.

    Suspended, it holds no worker. Resumed with who and why, it starts again from its beginning, on any worker, where
    all that was done is a cache hit; the answer is found under the hash of the results that it is about, so it opens
    the gate for those and for no others.
    """
    from prefect.flow_runs import suspend_flow_run

    while True:
        try:
            return finish(attempts.progressed, before_each=attempts.give_way)
        except StageFailedError as failure:
            step = failure.closed_gate
            if step is None:
                raise
            question = Decision.with_initial_data(description=f"{failure}")
            decision = suspend_flow_run(
                wait_for_input=question,
                key=f"{step}-{results_of(evaluation_of(step))}",
                timeout=PATIENCE_SECONDS,
            )
        for line in let_through(step, decision):
            print_line(line)


def let_through(step: str, decision: Decision) -> list[str]:
    """Write a decision into params.yaml; return lines to print."""
    return edit(lambda path: approve(step, by=decision.by, why=decision.why, path=path))


PATIENCE_SECONDS = 30 * 24 * 3600
"""How long a suspended run waits for a decision before it fails."""


def sweep_chain(name: str, chain: str, params: str, code: str, attempts: Attempts) -> str:
    """Do what `sweep` says; return what came of it in one line, and leave the numbers as an artifact."""
    from prefect.artifacts import create_table_artifact

    os.chdir(project())
    shared = read_project()
    if shared.code != code:
        raise InputError(
            f"{Path.cwd()} has other code, or another dvc.yaml, than the project that sweeps; bring both to the same"
            " commit"
        )
    os.chdir(make_workspace(shared, name, chain, params).folder)
    begin(attempts, Params.load().workers)
    with environment(with_code(shared)):
        stages = finish(attempts.progressed, before_each=attempts.give_way)
    attempts.give_way()
    numbers = read_result(Path.cwd()).numbers
    create_table_artifact(table=[dict(numbers or {})], key=RESULT)
    return f"{len(stages)} stages brought up to date" if stages else "all up to date"


def begin(attempts: Attempts, workers: Workers) -> None:
    """Count this attempt of the flow run, and see to those that were overlooked."""
    attempts.give_way()
    see_to_overlooked(workers.dead_after_seconds)
    attempts.begin(checkpoint_mark(Params.load().training.checkpoint_store), workers.attempts)


def project() -> Path:
    """This worker's clone."""
    named = os.environ.get(PROJECT) or os.environ.get("PWD") or "."
    if not Path(named, "params.yaml").is_file():
        raise InputError(
            f"{named}: no params.yaml there; start the worker in its clone of the project, or set {PROJECT} to it"
        )
    return Path(named)
