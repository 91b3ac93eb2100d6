"""What makes a plain function a stage: its name, its Prefect flow run where a server is, and how it fails."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import logging
import os
import socket
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.environment import PARENT_FLOW_RUN
from pipelines.project.errors import InputError
from pipelines.project.fingerprints import require_own_code, stage_fingerprint
from pipelines.project.layout import CODE, STAGES, StageName
from pipelines.runtime.processes import die_with_starter

if TYPE_CHECKING:
    from prefect import Flow, State

Summary = list[dict[str, str | int | float]]

STAGE_TAG = "sdlora-stage"
"""Tag of every flow run of a stage, and of the outer flow of `sdlora run`."""

HEALTH_SECONDS = 2.0
"""A server that needs longer than this to say that it is well is not waited for."""

PREFECT_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # DVC is the only cache: a second one would skip writing what DVC has deleted.
    "PREFECT_TASKS_DISABLE_CACHING": "true",
    # A server that goes away must cost finished work seconds, not minutes of retries.
    "PREFECT_CLIENT_MAX_RETRIES": "1",
    "PREFECT_API_REQUEST_TIMEOUT": "10",
    # The terminal belongs to the stage; the server keeps the whole log.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""Settings of every process that talks to Prefect; what the user has set in the environment goes first."""


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: called, it is its plain function."""

    name: str
    fn: Callable[..., Summary]

    def __call__(self, *args: Any, **kwargs: Any) -> Summary:  # noqa: ANN401 - the function's own arguments
        return self.fn(*args, **kwargs)


def stage(fn: Callable[..., Summary]) -> Stage:
    """Make a stage of a function; its module's name is the stage's name."""
    return Stage(fn.__name__, fn)


def launch(stage: Stage, **arguments: str | Path) -> None:
    """Run a stage as the child of DVC that it is: linked to a Prefect server that answers, plainly otherwise.

    The work decides the outcome. A server that is not there, or that goes away in the middle, costs one line.
    """
    die_with_starter()
    require_hashed_code(stage.name)
    task = arguments.get("task", arguments.get("name"))
    label = str(StageName(stage.name, str(task) if task else None))
    from pipelines.ledger.journal import keep
    from pipelines.orchestration.progress_artifact import ProgressArtifact
    from pipelines.runtime.progress import show_progress
    from pipelines.runtime.progress_bar import ProgressBar

    show_progress(functools.partial(ProgressBar, also=ProgressArtifact))
    missing, started = server_missing(), time.monotonic()
    if missing:
        say(f"prefect: no server ({missing}); running {label} plainly")
        summary = stage(**arguments)
    else:
        summary = run_linked(stage, label, arguments)
    if stage.name in STAGES:
        keep(label, arguments, summary, seconds=time.monotonic() - started)


def require_hashed_code(kind: str) -> None:
    """Refuse to run a stage whose code is not the one that DVC has hashed for it."""
    hashed = CODE / kind
    if hashed.is_file() and hashed.read_text(encoding="utf-8") != stage_fingerprint(kind).text:
        require_own_code()
        raise InputError(f"{kind}: its code was edited since {hashed} was written; run the same again")


def say(line: str) -> None:
    """Print one line beside the stage's own output.

    Where whoever read it was killed, a fit must still come to save itself.
    """
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def server_missing() -> str | None:
    """Say why no Prefect server can be used, or nothing if one answers."""
    url = os.environ.get("PREFECT_API_URL")
    return server_trouble(url) if url else "PREFECT_API_URL is not set"


def server_trouble(url: str) -> str | None:
    """Ask a server how it is; say what is wrong, or nothing if it is well."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=HEALTH_SECONDS) as answer:
            return None if answer.status == 200 else f"{url} answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException):
        return f"{url} does not answer"


def place() -> str:
    """Tag of the flow runs of this folder on this machine, where one `sdlora run` works at a time."""
    return f"{socket.gethostname()}:{os.getcwd()}"


def current_flow_run() -> str | None:
    """The id of the flow run that this code is called in, if it is in one."""
    if "prefect" not in sys.modules:
        return None
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else None


@dataclass
class Outcome:
    """What became of the work, whatever became of the server."""

    summary: Summary | None = None
    error: BaseException | None = field(default=None, repr=False)


def run_linked(stage: Stage, label: str, arguments: dict[str, str | Path]) -> Summary:
    """Run a stage as a flow run, a child of the outer flow run if there is one."""
    for name, value in PREFECT_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Prefect's threads would print of every message that a server, once gone, does not take.
    logging.raiseExceptions = False
    outcome = Outcome()
    try:
        _run_flow(_observed(stage, label, outcome), stage.name, label, arguments)
        _flush()
    except Exception as trouble:  # of the server: the work's own error is in the outcome
        say(f"prefect: the server failed ({first_line(trouble)}); {label} does not depend on it")
    if outcome.error is not None:
        raise outcome.error
    if outcome.summary is None:
        say(f"prefect: {label} was not started by the server; running it plainly")
        return stage(**arguments)
    return outcome.summary


def _observed(stage: Stage, label: str, outcome: Outcome) -> Callable[..., State]:
    """Wrap the stage's function so that its outcome is kept here and told to Prefect as a state."""

    @functools.wraps(stage.fn)
    def work(*args: Any, **kwargs: Any) -> State:  # noqa: ANN401 - the function's own arguments
        from prefect.states import Completed, Failed

        try:
            outcome.summary = stage(*args, **kwargs)
        except Exception as error:
            outcome.error = error
            return Failed(message=complaint(error) or f"{type(error).__name__}: {error}")
        except BaseException as end:
            # Told to stop: a server that cannot be told of it is no reason to begin again.
            outcome.error = end
            raise
        _publish(outcome.summary, label)
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
                tags=[STAGE_TAG, place()],
            )
        run_flow(flow, flow_run=run, parameters=dict(arguments), return_type="state")


def _flush() -> None:
    """Send what waits for the server now: it may be stopped before this process ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=5)


def make_flow(fn: Callable[..., Any], name: str) -> Flow[..., Any]:
    """Make a flow without a cache, without stored results and without retries: those are DVC's business."""
    from prefect import Flow

    return Flow(fn, name=name, retries=0, persist_result=False, validate_parameters=False)


def _publish(summary: Summary, label: str) -> None:
    """Show the summary as a table in Prefect; finished work never fails for it."""
    from prefect.artifacts import create_table_artifact

    key = "-".join(part for part in StageName.parse(label) if part)
    try:
        create_table_artifact(table=summary, key=key.replace("_", "-").lower())
    except Exception as trouble:
        say(f"prefect: no table of {label} ({first_line(trouble)})")


def publish_markdown(make: Callable[[], Mapping[str, str]]) -> None:
    """Show texts by their keys in the flow run that this code is called in; outside of one nothing is made.

    Finished work never fails for it: the first thing that goes wrong costs a line, and the rest is not tried.
    """
    if current_flow_run() is None:
        return
    from prefect.artifacts import create_markdown_artifact

    key = "artifacts"
    try:
        for key, text in make().items():
            create_markdown_artifact(text, key=key)
    except Exception as trouble:
        say(f"prefect: no {key} ({first_line(trouble)})")


def complaint(error: BaseException) -> str | None:
    """Put an error that the user can mend into one line, or return nothing if it is a bug of ours.

    Such are bad input, a file that cannot be read or written, a ValueError that this code raised on purpose.
    """
    if isinstance(error, InputError):
        return first_line(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full{where}: nothing half-written was kept; make room and run the same again"
        return f"{error.strerror}{where}"
    if isinstance(error, ValueError) and _raised_here(error):
        return first_line(error)
    return None


def _raised_here(error: BaseException) -> bool:
    """Tell whether a line of this repository raised the error, and not a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).resolve().parents[2]
    ours = (home / "pipelines", home / "sdlora")
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in ours)


def first_line(error: BaseException) -> str:
    """Return the error's text as one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
