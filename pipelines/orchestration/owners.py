"""Whose the deployments on a Prefect server are: several projects may share one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Self

from pipelines.orchestration.names import LEARN, SWEEP, WATCHDOG, WORK_TAG, deployment_name
from pipelines.orchestration.pages import read_all
from pipelines.project.environment import WORKERS_PROJECT, WORKERS_REPOSITORY
from pipelines.project.errors import InputError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse


class Deployed(NamedTuple):
    """A deployment of the flow `learn`, as `sdlora deploy` has made it."""

    name: str
    """the project's, or what an older version wrote"""
    pool: str | None
    named: bool
    """whether it was made with a project's name"""
    repository: str
    """the first commit of the project's repository; empty if not known"""

    @classmethod
    def of(cls, found: DeploymentResponse) -> Self:
        """Read what a server says of a deployment."""
        environment = (found.job_variables or {}).get("env") or {}
        return cls(
            found.name,
            found.work_pool_name,
            WORKERS_PROJECT in environment,
            environment.get(WORKERS_REPOSITORY, ""),
        )


def deployed_projects(client: SyncPrefectClient) -> list[Deployed]:
    """Return the deployment of the chain of each project that a server knows."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterTags,
        FlowFilter,
        FlowFilterName,
    )

    found = read_all(
        client.read_deployments,
        flow_filter=FlowFilter(name=FlowFilterName(any_=[LEARN])),
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=[WORK_TAG])),
    )
    return [Deployed.of(deployment) for deployment in found]


def require_own(found: Iterable[Deployed], ours: Deployed) -> None:
    """Refuse a name that another project has, and a pool whose workers stand in another project's clones.

    What an older version has deployed under this name is adopted.
    """
    for other in found:
        same = bool(ours.repository) and ours.repository == other.repository
        name = deployment_name(LEARN, other.name)
        if other.name == ours.name:
            if other.repository and ours.repository and not same:
                raise InputError(
                    f"workers.project: {name} is another project's, whose first commit is {other.repository}, "
                    f"and not {ours.repository}; write another name"
                )
        elif other.pool == ours.pool and (same or not other.named):
            others = " ".join(deployment_name(flow, other.name) for flow in (LEARN, SWEEP, WATCHDOG))
            raise InputError(
                f"workers.project: {name} runs on the pool {ours.pool} too, so that all would be learned twice; "
                f"delete it (prefect deployment delete NAME, for {others}), or write {other.name} to keep that name"
            )
        elif other.pool == ours.pool:
            raise InputError(
                f"workers.pool: {ours.pool} is the pool of {name}, whose workers are in clones of that project; "
                "name another pool"
            )
