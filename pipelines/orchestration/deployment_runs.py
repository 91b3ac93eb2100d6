"""Flow runs of a deployment for who asks for them: submit them, look at them, read the tables that they leave."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import UUID

from pipelines.orchestration.names import artifact_key, deployment_name, project_name
from pipelines.orchestration.pages import read_all
from pipelines.orchestration.server import PREFECT_SETTINGS, patience, refusals_in_one_line
from pipelines.runtime.deadline import within
from pipelines.runtime.processes import environment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State


class _RunState(NamedTuple):
    """How a flow run stands."""

    name: str
    """as Prefect shows it, such as Running or AwaitingRetry"""
    message: str
    completed: bool
    failed: bool
    """it ended badly, or was cancelled, and nothing will start it again"""

    @classmethod
    def of(cls, state: State[Any]) -> Self:
        """Read what a server says of a run."""
        return cls(
            state.name or state.type.value,
            state.message or "",
            completed=state.is_completed(),
            failed=state.is_failed() or state.is_cancelled(),
        )


_DELETED = _RunState(
    "Deleted", "its run was deleted on the server; call the same again", completed=False, failed=True
)


class DeploymentRuns:
    """The flow runs of one deployment, which workers take from its pool."""

    def __init__(self, client: SyncPrefectClient, deployment: UUID) -> None:
        self._client, self._deployment = client, deployment

    def submit(self, title: str, parameters: Mapping[str, str], tags: Sequence[str]) -> UUID:
        """Schedule a run for any worker. Return its id."""
        return self._client.create_flow_run_from_deployment(
            self._deployment, name=title, parameters=dict(parameters), tags=list(tags)
        ).id

    def unfinished(self, tags: Sequence[str]) -> UUID | None:
        """Return a run with these tags that has not ended. One that crashed is started again by the server."""
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterDeploymentId,
            FlowRunFilterState,
            FlowRunFilterStateType,
            FlowRunFilterTags,
        )
        from prefect.client.schemas.objects import StateType

        ended = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED]
        found = self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[self._deployment]),
                tags=FlowRunFilterTags(all_=list(tags)),
                state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=ended)),
            ),
            limit=1,
        )
        return found[0].id if found else None

    def states(self, runs: Iterable[UUID]) -> dict[UUID, _RunState | None]:
        """Return how runs stand, asked in one question. None while the server does not know."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        states: dict[UUID, _RunState | None] = dict.fromkeys(runs, _DELETED)
        asked = FlowRunFilter(id=FlowRunFilterId(any_=list(states)))
        for run in read_all(self._client.read_flow_runs, flow_run_filter=asked) if states else []:
            states[run.id] = None if run.state is None else _RunState.of(run.state)
        return states

    def table(self, run: UUID, key: str) -> list[dict[str, Any]] | None:
        """Return the rows that a run has left under a key, or None."""
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

        found = self._client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run]),
                key=ArtifactFilterKey(any_=[artifact_key(project_name(), key)]),
            )
        )
        if not found:
            return None
        rows: list[dict[str, Any]] = json.loads(str(found[0].data))
        return rows


@contextlib.contextmanager
def deployment_runs(flow: str) -> Iterator[DeploymentRuns | None]:
    """Talk to the server of PREFECT_API_URL about the runs of this project of a flow. None if nothing is deployed."""
    settings = {key: value for key, value in PREFECT_SETTINGS.items() if key not in os.environ}
    with environment(settings):
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        with refusals_in_one_line(flow), get_client(sync_client=True) as client:
            try:
                name = deployment_name(flow, project_name())
                with within(patience()):
                    deployment = client.read_deployment_by_name(name).id
            except ObjectNotFound:
                yield None
                return
            yield DeploymentRuns(client, deployment)


def leave_table(key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Leave rows for who asked for the flow run that this code is called in: what a flow returns is not kept."""
    from prefect.artifacts import create_table_artifact

    with refusals_in_one_line(key), within(patience()):
        create_table_artifact(table=[dict(row) for row in rows], key=artifact_key(project_name(), key))
