"""Runs of stages: plain where no Prefect server answers, and flow runs where one does."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.ledger import journal
from pipelines.orchestration.names import artifact_key, project_name, stage_artifact
from pipelines.orchestration.progress_artifact import ProgressArtifact
from pipelines.orchestration.run_notes import noted
from pipelines.orchestration.server import PREFECT_SETTINGS, patience, server_missing
from pipelines.project.environment import HISTORY_FILE, PARENT_FLOW_RUN
from pipelines.project.error_text import failure_message, one_line
from pipelines.project.errors import InputError
from pipelines.project.fingerprints import require_own_code, stage_fingerprint
from pipelines.project.layout import CODE, STAGES, StageName
from pipelines.runtime.console import log_line
from pipelines.runtime.deadline import Deadline, give_up, within
from pipelines.runtime.processes import die_with_starter
from pipelines.runtime.progress import show_progress
from pipelines.runtime.progress_bar import ProgressBar
from pipelines.runtime.stage import Stage, StageResult
from pipelines.runtime.stage_outcome import DONE, StageOutcome, leave_outcome

if TYPE_CHECKING:
    from prefect import Flow, State

STAGE_TAG = "sdlora-stage"
"""Tag of every flow run of a stage, and of the outer flow of `sdlora run`."""
_FLUSH_SECONDS = 5
"""How long what waits for the server may take at the end of a run."""


def launch(stage: Stage, **arguments: str | Path) -> None:
    """Run a stage as the child of DVC that it is: as a flow run if a Prefect server answers, else plainly.

    Where no server is named `sdlora run` has what it runs noted, for `sdlora history`.
    The work decides the outcome. A server that is not there, or that goes away in the middle, costs one line.
    """
    die_with_starter()
    _require_hashed_code(stage.name)
    task = arguments.get("task", arguments.get("name"))
    label = str(StageName(stage.name, str(task) if task else None))
    show_progress(functools.partial(ProgressBar, also=ProgressArtifact))
    missing, started = server_missing(), time.monotonic()
    if missing is None:
        result = run_linked(stage, label, arguments)
    else:
        if HISTORY_FILE not in os.environ:
            log_line(f"prefect: no server ({missing}); running {label} plainly")
        result = noted(stage, label, arguments)
    if stage.name in STAGES:
        journal.keep_cost(label, arguments, result, seconds=time.monotonic() - started)
    leave_outcome(StageOutcome(0, DONE))


def run_linked(stage: Stage, label: str, arguments: dict[str, str | Path]) -> StageResult:
    """Run a stage as a flow run, a child of the outer flow run if there is one."""
    for name, value in PREFECT_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Prefect's threads would print of every message that a server, once gone, does not take.
    logging.raiseExceptions = False
    importlib.import_module("prefect.flow_engine")  # takes seconds that are not the server's
    work, seconds = _Work(), patience()
    try:
        with within(seconds) as deadline:
            _run_flow(_observed(stage, label, work, deadline), stage.name, label, arguments)
            _flush()
    except Exception as trouble:  # of the server: the work's own error is kept in `work`
        give_up()  # what still waits to be told to the server
        log_line(f"prefect: the server failed ({one_line(trouble)}); {label} does not depend on it")
    if work.error is not None:
        raise work.error
    if work.result is None:
        log_line(f"prefect: {label} was not started by the server; running it plainly")
        return stage(**arguments)
    return work.result


def run_tag() -> str:
    """Return the tag of the flow runs of this folder on this machine, where one `sdlora run` works at a time."""
    return f"{socket.gethostname()}:{os.getcwd()}"


def current_flow_run() -> str | None:
    """Return the id of the flow run that this code is called in, if it is in one."""
    if "prefect" not in sys.modules:
        return None
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else None


def make_flow(fn: Callable[..., Any], name: str) -> Flow[..., Any]:
    """Make a flow without a cache, without stored results and without retries: those are DVC's business."""
    from prefect import Flow

    return Flow(fn, name=name, retries=0, persist_result=False, validate_parameters=False)


def _require_hashed_code(kind: str) -> None:
    """Refuse to run a stage whose code is not the one that DVC has hashed for it."""
    hashed = CODE / kind
    if hashed.is_file() and hashed.read_text(encoding="utf-8") != stage_fingerprint(kind).text:
        require_own_code()
        raise InputError(f"{kind}: its code was edited since {hashed} was written; run the same again")


@dataclass
class _Work:
    """What became of the work, whatever became of the server."""

    result: StageResult | None = None
    error: BaseException | None = field(default=None, repr=False)


def _observed(stage: Stage, label: str, kept: _Work, deadline: Deadline) -> Callable[..., State]:
    """Wrap the stage's function so that its outcome is kept here and told to Prefect as a state."""

    @functools.wraps(stage.fn)
    def work(*args: Any, **kwargs: Any) -> State:  # noqa: ANN401 - the function's own arguments
        from prefect.states import Completed, Failed

        with deadline.paused():
            try:
                kept.result = stage(*args, **kwargs)
            except Exception as error:
                kept.error = error
                return Failed(message=failure_message(error))
            except BaseException as end:
                # Told to stop: a server that cannot be told of it is no reason to begin again.
                kept.error = end
                raise
        _publish(kept.result, label)
        return Completed(message=f"{label} is done")

    return work


def _run_flow(fn: Callable[..., State], flow_name: str, label: str, arguments: dict[str, str | Path]) -> None:
    from uuid import UUID, uuid4

    from prefect import Task
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.states import Pending

    parent = os.environ.get(PARENT_FLOW_RUN)
    flow = make_flow(fn, flow_name)
    shown = {key: str(value) for key, value in arguments.items()}
    # The heartbeat's thread is joined in steps of a second, and the outer flow has one of its own.
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        with get_client(sync_client=True) as client:
            placeholder = None
            if parent:
                placeholder = client.create_task_run(
                    Task(fn=fn, name=label),
                    flow_run_id=UUID(parent),
                    dynamic_key=f"{label}-{uuid4()}",
                    name=label,
                    state=Pending(),
                ).id
            run = client.create_flow_run(
                flow,
                name=label,
                parameters=shown,
                parent_task_run_id=placeholder,
                state=Pending(),
                tags=[STAGE_TAG, run_tag()],
            )
        run_flow(flow, flow_run=run, parameters=dict(arguments), return_type="state")


def _flush() -> None:
    """Send what waits for the server: it may be stopped before this process ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        drained: Any = worker.drain_all(timeout=_FLUSH_SECONDS)
        if drained.not_done:
            give_up()


def _publish(result: StageResult, label: str) -> None:
    """Show in Prefect what a stage has to tell: its rows as a table, its documents as texts.

    Finished work never fails for it: the first thing that goes wrong costs a line, and the rest is not tried.
    """
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    name = stage_artifact(label)
    try:
        project = project_name()
        create_table_artifact(table=result.rows, key=artifact_key(project, name))
        name = "documents"
        for name, text in result.documents().items():
            create_markdown_artifact(text, key=artifact_key(project, name))
    except Exception as trouble:
        log_line(f"prefect: no {name} of {label} ({one_line(trouble)})")
