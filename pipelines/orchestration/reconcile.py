"""Orphaned flow runs: the next run that starts marks them crashed, or reschedules them."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from pipelines.orchestration.names import WATCHDOG, WORK_TAG, project_name
from pipelines.orchestration.pages import read_all
from pipelines.orchestration.server import prefect_client
from pipelines.orchestration.stage_runs import STAGE_TAG, current_flow_run, run_tag
from pipelines.project.error_text import one_line
from pipelines.runtime.console import log_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State


OVERLOOKED = timedelta(seconds=30)
"""A run that has been Crashed for so long will not be started again by the automation for that."""


def reschedule_orphaned_runs(dead_after_seconds: int) -> int:
    """Reschedule the orphaned runs of our deployments that the server's automations missed.

    A server on SQLite loses events when its database is busy, and one that was started anew holds them back for up to
    15 minutes; automations live on them. Here only states are looked at, and heartbeats for what should be at work. A
    run that was taken, or has begun, and gives no sign of life is marked crashed; one that has been crashed for a
    while is scheduled again. Returns how many there were; a server that fails costs a line.
    """
    from prefect.states import Crashed

    seen_to = reschedule_crashed_runs()
    patience = timedelta(seconds=dead_after_seconds)
    try:
        with prefect_client() as client:
            silent = [
                run
                for run in _deployed_runs(client, _SILENCES * patience, "RUNNING")
                if str(run.id) != current_flow_run()
                and not has_shown_life(client, f"prefect.flow-run.{run.id}", _SILENCES * patience)
            ]
            for run in (*_deployed_runs(client, patience, "PENDING"), *silent):
                state: State[None] = Crashed(message="no sign of life, and overlooked until now")
                client.set_flow_run_state(run.id, state)
                seen_to += 1
    except Exception as trouble:
        log_line(f"prefect: runs without a sign of life could not be closed ({one_line(trouble)})")
    return seen_to


def reschedule_crashed_runs() -> int:
    """Reschedule the runs of our deployments that have been crashed for a while. Return how many."""
    from prefect.states import AwaitingRetry

    found = 0
    try:
        with prefect_client() as client:
            lost = [run for run in _deployed_runs(client, OVERLOOKED, "CANCELLED") if _has_lost_its_slot(run)]
            for run in (*_deployed_runs(client, OVERLOOKED, "CRASHED"), *lost):
                again: State[None] = AwaitingRetry(message="starts again; its end was overlooked")
                client.set_flow_run_state(run.id, again, force=True)
                found += 1
    except Exception as trouble:
        log_line(f"prefect: crashed runs could not be started again ({one_line(trouble)})")
    return found


def _has_lost_its_slot(run: FlowRun) -> bool:
    """Return whether the server has cancelled a run by itself: its start took longer than its lease of the one slot."""
    return run.state is not None and "slot lost" in (run.state.message or "")


_SILENCES = 3
"""How many times as long as for an automation a run must have been silent: its heartbeats may be lost too."""


def _deployed_runs(client: SyncPrefectClient, since: timedelta, kind: str) -> list[FlowRun]:
    """Return the runs of what `sdlora deploy` makes that have been in a state for so long."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        DeploymentFilterTags,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    runs = read_all(
        client.read_flow_runs,
        deployment_filter=DeploymentFilter(
            name=DeploymentFilterName(any_=[project_name()]), tags=DeploymentFilterTags(all_=[WORK_TAG])
        ),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType(kind)]))
        ),
    )
    before = datetime.now(UTC) - since
    return [run for run in runs if run.state is not None and run.state.timestamp < before]


def has_shown_life(client: SyncPrefectClient, resource: str, within: timedelta) -> bool:
    """Return whether a heartbeat of a run, as events name it, was heard lately."""
    from prefect.events.filters import (
        EventFilter,
        EventNameFilter,
        EventOccurredFilter,
        EventResourceFilter,
    )

    heard = client.read_events(
        EventFilter(
            occurred=EventOccurredFilter.model_validate({"since": datetime.now(UTC) - within}),
            event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
            resource=EventResourceFilter(id=[resource]),
        ),
        limit=1,
    )
    return bool(heard.events)


def delete_old_watchdog_runs() -> None:
    """Delete the watchdog's runs that nobody needs: those that are late, or ended ten minutes ago, or died at work.

    A worker that was busy would have all late ones before the run that waits for it.
    """
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )
    from prefect.exceptions import ObjectNotFound

    now = datetime.now(UTC)
    try:
        with prefect_client() as client:
            due = FlowRunFilterExpectedStartTime.model_validate({"before_": now})
            for run in read_all(
                client.read_flow_runs,
                flow_filter=FlowFilter(name=FlowFilterName(any_=[WATCHDOG])),
                deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[project_name()])),
                flow_run_filter=FlowRunFilter(expected_start_time=due),
            ):
                state = run.state
                waits = state is not None and state.is_scheduled()
                at_work = state is not None and (state.is_pending() or state.is_running())
                kept = timedelta(seconds=0 if waits else 3600 if at_work else 600)
                started = run.expected_start_time
                if str(run.id) != current_flow_run() and started is not None and started < now - kept:
                    with contextlib.suppress(ObjectNotFound):  # another worker's has been here
                        client.delete_flow_run(run.id)
    except Exception as trouble:
        log_line(f"prefect: old runs of {WATCHDOG} could not be deleted ({one_line(trouble)})")


def close_dead_runs() -> int:
    """Mark orphaned runs crashed: runs of this folder, and children of ended parents.

    To be called where no other `sdlora run` of this folder can be at work. Returns how many there were; a server
    that fails costs a line.
    """
    try:
        with prefect_client() as client:
            dead = [run for run in _running(client) if _is_dead(client, run)]
            for run in dead:
                _close(client, run)
    except Exception as trouble:
        log_line(f"prefect: runs that were cut off could not be closed ({one_line(trouble)})")
        return 0
    return len(dead)


def _running(client: SyncPrefectClient) -> list[FlowRun]:
    """Return all runs with our tag that have not ended."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        FlowRunFilterTags,
    )
    from prefect.client.schemas.objects import StateType

    open_states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
    return read_all(
        client.read_flow_runs,
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[STAGE_TAG]), state=open_states),
    )


def _is_dead(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Return whether it belongs to this folder, where nothing else is at work, or to a run that has ended."""
    if run_tag() in run.tags:
        return True
    parent = client.read_task_run(run.parent_task_run_id).flow_run_id if run.parent_task_run_id else None
    if parent is None:
        return False
    if str(parent) == current_flow_run():  # which has just begun, again
        return True
    state = client.read_flow_run(parent).state
    return state is not None and (state.is_final() or state.is_scheduled())


def _close(client: SyncPrefectClient, run: FlowRun) -> None:
    """Mark a run crashed, and the task run that stands for it in its parent."""
    from prefect.states import Crashed

    state: State[None] = Crashed(message="what it ran in was killed; closed by the next run")
    client.set_flow_run_state(run.id, state, force=True)
    if run.parent_task_run_id is not None:
        client.set_task_run_state(run.parent_task_run_id, state, force=True)
