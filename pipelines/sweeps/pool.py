"""The chains of a sweep on the workers of a Prefect server: each is a flow run of the deployment sweep/workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from pipelines.orchestration.reconcile import reschedule_crashed_runs
from pipelines.orchestration.server import PREFECT_SETTINGS
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.runtime.console import echo, log_line
from pipelines.runtime.processes import environment
from pipelines.sweeps.grid import Chain, short_hash
from pipelines.sweeps.here import may_begin, only_sweep, place_of
from pipelines.sweeps.results import Result
from pipelines.sweeps.workspace import Project, Workspace, make_workspace, read_project

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEPLOYMENT = "sweep/workers"
TAG = "sdlora-sweep"
RESULT = "sweep-result"
"""Key of the artifact in which a worker leaves the numbers of a chain: what a flow returns is not kept."""
POLL_SECONDS = 2.0


def run_on_pool(name: str, chains: Sequence[Chain]) -> list[Result]:
    """Have the workers bring all chains up to date; return what came of each, in order.

    Where this process ends the runs go on. Called again, it waits for those that are at work, and has the others
    begin again, which costs little: what is done comes from the DVC remote. An `InputError` where nothing is
    deployed.
    """
    settings = {key: value for key, value in PREFECT_SETTINGS.items() if key not in os.environ}
    with only_sweep(name), environment(settings):
        from prefect.client.orchestration import get_client

        project = read_project()
        spaces = [make_workspace(project, name, chain.name, chain.params) for chain in chains]
        with get_client(sync_client=True) as client:
            return Pool(client, name, project, chains, spaces).wait()


class Pool:
    """The flow runs of a sweep: those that are scheduled or at work, and the results of those that ended."""

    def __init__(
        self,
        client: SyncPrefectClient,
        name: str,
        project: Project,
        chains: Sequence[Chain],
        spaces: Sequence[Workspace],
    ) -> None:
        self._client, self._name, self._project = client, name, project
        self._chains, self._spaces = chains, spaces
        self._deployment = find_deployment(client)
        self._working = {
            index: run for index, chain in enumerate(chains) if (run := self._at_work(self._tag(chain)))
        }
        self._told: dict[int, str] = {}
        self._results: dict[int, Result] = {}

    def wait(self) -> list[Result]:
        """Schedule what may begin and look at what is at work, until all have ended; a server may be gone meanwhile."""
        import httpx

        well = True
        while len(self._results) < len(self._chains):
            try:
                self._begin()
                self._look()
                self._see_to_crashed()
                well = True
            except (httpx.TransportError, httpx.HTTPStatusError) as trouble:
                if isinstance(trouble, httpx.HTTPStatusError) and trouble.response.status_code < 500:
                    raise
                if well:
                    log_line(
                        f"prefect: the server failed ({one_line(trouble)}); waiting for it, the workers go on"
                    )
                well = False
            time.sleep(POLL_SECONDS)
        return [self._results[index] for index in range(len(self._chains))]

    def _begin(self) -> None:
        waiting = [i for i in range(len(self._chains)) if i not in self._working and i not in self._results]
        for index in may_begin(waiting, self._working, self._spaces):
            chain = self._chains[index]
            self._working[index] = self._client.create_flow_run_from_deployment(
                self._deployment,
                name=chain.title,
                parameters={
                    "name": self._name,
                    "chain": chain.name,
                    "params": chain.params,
                    "code": self._project.code,
                },
                tags=[TAG, self._tag(chain)],
            ).id

    def _look(self) -> None:
        for index, run in list(self._working.items()):
            state = self._client.read_flow_run(run).state
            if state is None:
                continue
            result = None
            if state.is_completed():
                result = self._numbers(run)
            elif state.is_failed() or state.is_cancelled():
                result = Result(error=one_line(Exception(state.message or state.name)))
            line = result.line if result else (state.name or state.type.value).lower()
            if self._told.get(index) != line:
                echo(f"{place_of(index, self._chains)}  {line}")
                self._told[index] = line
            if result is not None:
                self._results[index] = result
                del self._working[index]

    def _see_to_crashed(self) -> None:
        """Schedule what the server has overlooked, as nobody else may until another run begins."""
        if "crashed" in self._told.values():
            reschedule_crashed_runs()

    def _numbers(self, run: UUID) -> Result:
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey

        found = self._client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[RESULT])
            )
        )
        if not found:
            return Result(error="completed without a result on the server; call the sweep again")
        (row,) = json.loads(str(found[0].data))
        return Result(numbers=row)

    def _at_work(self, tag: str) -> UUID | None:
        """A run of the same chain that has not ended; one that crashed is started again by the server."""
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterState,
            FlowRunFilterStateType,
            FlowRunFilterTags,
        )
        from prefect.client.schemas.objects import StateType

        ended = [StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED]
        found = self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[TAG, tag]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=ended)),
            ),
            limit=1,
        )
        return found[0].id if found else None

    def _tag(self, chain: Chain) -> str:
        """The same for runs that do the same."""
        return f"{chain.name}-{short_hash([self._name, self._project.code, chain.params])}"


def find_deployment(client: SyncPrefectClient) -> UUID:
    """The deployment that `sdlora deploy` makes; an `InputError` where it has not been called."""
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(DEPLOYMENT).id
    except ObjectNotFound:
        raise InputError(
            f"sweep: the server has no deployment {DEPLOYMENT}; call sdlora deploy, or add --local 1 to compute here"
        ) from None
