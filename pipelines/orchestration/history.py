"""`sdlora history`: the runs that were noted, in the pages of a Prefect server.

They are entered into the database of a server of this project, with the times of their notes: a server takes no times
of runs through its API.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

from pipelines.orchestration.names import artifact_key, project_name, stage_artifact
from pipelines.orchestration.server import PREFECT_SETTINGS, prefect_server, server_missing
from pipelines.orchestration.stage_runs import STAGE_TAG
from pipelines.project.errors import InputError
from pipelines.project.layout import HISTORY, PREFECT
from pipelines.reports.format import count
from pipelines.runtime.console import echo
from pipelines.runtime.processes import environment
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_POLL_SECONDS = 2.0


@dataclass
class _Run:
    """A run as it was noted."""

    began: Mapping[str, Any]
    ended: Mapping[str, Any] | None = None
    parts: list[_Run] = field(default_factory=list)

    @property
    def id(self) -> UUID:
        """Return the id of the run, here and on the server."""
        return UUID(self.began["run"])

    def is_at_work(self) -> bool:
        """Return whether it may still end by itself. Of a process of another machine nothing is known."""
        if self.ended is not None:
            return False
        if self.began["host"] != socket.gethostname():
            return True
        try:
            os.kill(self.began["process"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def end(self) -> Mapping[str, Any]:
        """Return how it ended. One that was killed ended when it gave the last sign of life."""
        return self.ended or {"at": max(self._times()), "state": "Crashed", "message": "it was killed"}

    def _times(self) -> Iterator[str]:
        yield (self.ended or self.began)["at"]
        for part in self.parts:
            yield from part._times()


def show_history(port: int) -> None:
    """Start a Prefect server with the runs that were noted, and keep it until it is told to end.

    Raises:
        InputError: there is nothing to show, or the server does not come up.
    """
    runs = read_runs(HISTORY)
    if not runs:
        raise InputError(
            f"{HISTORY}: no run was noted here; `sdlora run` does, where PREFECT_API_URL is not set"
        )
    with environment({**PREFECT_SETTINGS, "PREFECT_HOME": str(PREFECT.resolve())}):
        ended = [run for run in runs if not run.is_at_work()]
        told = asyncio.run(_enter(ended))
        at_work = f", {len(runs) - len(ended)} at work" if len(ended) < len(runs) else ""
        echo(f"{count(len(runs), 'run')} noted: {told} new here, {len(ended) - told} known{at_work}")
        with prefect_server(PREFECT, port=port, pages=True) as wait:
            wait()
            if missing := server_missing():
                raise InputError(f"history: no server at port {port} ({missing}); name another --port")
            echo(f"look at them at http://127.0.0.1:{port}/runs; Ctrl-C ends the server")
            with contextlib.suppress(KeyboardInterrupt):
                while server_missing() is None:
                    time.sleep(_POLL_SECONDS)


def read_runs(path: Path) -> list[_Run]:
    """Return the outermost runs that were noted, in the order in which they began. Damaged lines are left out."""
    runs: dict[str, _Run] = {}
    roots: list[_Run] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            note = json.loads(line)
            if "state" in note:
                runs[note["run"]].ended = note
                continue
            run = runs[note["run"]] = _Run(note)
        except (ValueError, LookupError, TypeError):
            continue
        whole = runs.get(note["part_of"])
        (whole.parts if whole else roots).append(run)
    return roots


def _models() -> Any:  # noqa: ANN401 - Prefect's decorators hide from type checkers what is awaited
    """Return Prefect's access to its database."""
    from prefect.server import models

    return models


async def _enter(runs: list[_Run]) -> int:
    """Enter runs into the database, each with its parts at once. Return how many were not there."""
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    await db.create_db()
    entered = 0
    with progress("history", total=len(runs), unit="runs") as bar:
        for done, run in enumerate(runs, start=1):
            async with db.session_context(begin_transaction=True) as session:
                if await _models().flow_runs.read_flow_run(session, run.id) is None:
                    await _enter_run(session, run, None)
                    entered += 1
            bar.update(done)
    return entered


async def _enter_run(session: AsyncSession, run: _Run, whole: UUID | None) -> None:
    """Enter a run, and what stands for it in the run that it is a part of."""
    from prefect.server.schemas.core import Flow, FlowRun, TaskRun

    name = run.began["name"]
    flow = await _models().flows.create_flow(session, Flow(name=run.began["flow"]))
    step = None
    if whole is not None:
        key = str(run.id)
        task = TaskRun(id=uuid5(run.id, "step"), flow_run_id=whole, name=name, task_key=name, dynamic_key=key)
        step = (await _models().task_runs.create_task_run(session, task)).id
    await _models().flow_runs.create_flow_run(
        session,
        FlowRun(
            id=run.id,
            flow_id=flow.id,
            name=name,
            parameters=run.began["parameters"],
            tags=[STAGE_TAG],
            parent_task_run_id=step,
        ),
    )
    await _set_state(session, run.id, step, "Running", run.began["at"])
    for part in run.parts:
        await _enter_run(session, part, run.id)
    end = run.end()
    await _set_state(session, run.id, step, end["state"], end["at"], end["message"])
    await _show(session, name, run.id, end)


async def _set_state(
    session: AsyncSession, run: UUID, step: UUID | None, name: str, at: str, message: str | None = None
) -> None:
    from prefect.server.schemas.states import State, StateType
    from prefect.types import DateTime

    def state() -> State:
        return State(
            type=StateType(name.upper()), name=name, timestamp=DateTime.fromisoformat(at), message=message
        )

    await _models().flow_runs.set_flow_run_state(session, run, state(), force=True)
    if step is not None:
        await _models().task_runs.set_task_run_state(session, step, state(), force=True)


async def _show(session: AsyncSession, label: str, run: UUID, end: Mapping[str, Any]) -> None:
    """Enter the artifacts of a run: its rows as a table, its documents as texts."""
    from prefect.server.schemas.core import Artifact

    project = project_name()
    made = [(stage_artifact(label), "table", json.dumps(end["rows"]))] if end.get("rows") else []
    made += [(key, "markdown", text) for key, text in end.get("documents", {}).items()]
    for key, kind, data in made:
        artifact = Artifact(key=artifact_key(project, key), type=kind, data=data, flow_run_id=run)
        await _models().artifacts.create_artifact(session, artifact)
