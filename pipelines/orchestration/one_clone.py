"""Runs that hand nothing on through Git stay in one clone: a second would go on from other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from pipelines.orchestration.names import project_name
from pipelines.orchestration.pages import read_all
from pipelines.orchestration.repository import clone_place
from pipelines.orchestration.server import prefect_client
from pipelines.orchestration.stage_runs import current_flow_run
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.project.settings import Workers
from pipelines.runtime.console import log_line

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

_CLONE = "sdlora.clone"
"""Label of a flow run: the clone that it worked in."""


class PastRun(NamedTuple):
    """A run of the chain that has begun."""

    deployed: str | None
    """the version of the deployment that it is of: another one after each `sdlora deploy`"""
    labels: Mapping[str, object]


def require_one_clone(workers: Workers) -> None:
    """Refuse to learn in a second clone where no remote carries the parameters from one to the other.

    A server that fails costs a line.
    """
    run = current_flow_run()
    if run is None or (workers.branch and workers.push):
        return
    here = clone_place(branches=workers.branch is not None)
    try:
        with prefect_client() as client:
            this = client.read_flow_run(UUID(run))
            other = other_clone(here, this.deployment_version, _past_runs(client, this))
            if other is None:
                client.update_flow_run_labels(this.id, {_CLONE: here})
    except Exception as trouble:
        log_line(f"prefect: whether there are runs in other clones is not known ({one_line(trouble)})")
        return
    if other is not None:
        raise InputError(
            f"workers.{'push' if workers.branch else 'branch'}: found null, but earlier runs of {project_name()} were "
            f"in {other}, and this clone knows nothing of them; name a branch and a remote, or call sdlora deploy if "
            "that clone is gone"
        )


def other_clone(here: str, deployed: str | None, past: Sequence[PastRun]) -> str | None:
    """Return a clone that runs of the same deployment have worked in, if it is another one."""
    clones = (str(run.labels[_CLONE]) for run in past if run.deployed == deployed and _CLONE in run.labels)
    return next((clone for clone in clones if clone != here), None)


def _past_runs(client: SyncPrefectClient, run: FlowRun) -> list[PastRun]:
    """Return the runs of a run's deployment that have begun."""
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterDeploymentId,
        FlowRunFilterStartTime,
    )

    if run.deployment_id is None:
        return []
    begun = read_all(
        client.read_flow_runs,
        flow_run_filter=FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[run.deployment_id]),
            start_time=FlowRunFilterStartTime(is_null_=False),
        ),
    )
    return [PastRun(past.deployment_version, past.labels) for past in begun]
