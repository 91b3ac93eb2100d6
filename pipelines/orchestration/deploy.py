"""What `sdlora deploy` leaves on a Prefect server: the pool, the deployments, and the automations that mend them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from pipelines.orchestration.names import (
    ARRIVED,
    LEARN,
    SWEEP,
    WATCHDOG,
    WORK_TAG,
    deployment_name,
    inbox_resource,
    project_name,
)
from pipelines.orchestration.owners import Deployed, deployed_projects, require_own
from pipelines.orchestration.pages import read_all
from pipelines.orchestration.repository import repository_id
from pipelines.orchestration.server import (
    PREFECT_SETTINGS,
    prefect_client,
    refusals_in_one_line,
    server_missing,
)
from pipelines.project.environment import WORKERS_PROJECT, WORKERS_REPOSITORY
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from pipelines.project.settings import Workers

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.deployments.runner import RunnerDeployment
    from prefect.events.schemas.automations import AutomationCore

    _WorkerFlow = Flow[..., Any]

_WATCHDOG_PERIODS = 2
"""How many times `dead_after_seconds` lie between two runs of the watchdog: the automations come first."""
_SILENT, _CRASHED = "a run without a sign of life has crashed", "a crashed run starts again"
"""What the automations are for: the second half of their names."""


def require_server() -> None:
    """Refuse to deploy where no server answers: what is deployed must outlive this command."""
    missing = server_missing()
    if missing:
        raise InputError(
            f"deploy: no Prefect server ({missing}); start one and set PREFECT_API_URL: docs/how-to/workers.md"
        )


def deploy(learn: _WorkerFlow, sweep: _WorkerFlow, watchdog: _WorkerFlow) -> list[str]:
    """Make the work pool, the deployments and their automations, or bring them to what params.yaml says.

    Returns:
        Lines to print.

    Raises:
        InputError: no server answers, it refuses what params.yaml says, or has another project of this name.
    """
    workers = Params.load().workers
    require_server()
    site = _Site(workers, project_name(), repository_id())
    with refusals_in_one_line("deploy"), prefect_client() as client:
        require_own(deployed_projects(client), Deployed(site.project, workers.pool, True, site.repository))
        _make_pool(client, workers.pool)
        _require_one_worker(client, workers)
        # The deployment of the watchdog is made last, and no automation starts its runs again.
        deployments = [_apply(_learn_deployment(learn, site)), _apply(_sweep_deployment(sweep, site))]
        _apply(_watchdog_deployment(watchdog, site))
        for automation in automations(site.project, workers, deployments):
            _replace_automation(client, automation)
        _delete_unnamed_automations(client, deployments)
    return _description(site)


class _Site(NamedTuple):
    """What is deployed for whom."""

    workers: Workers
    project: str
    repository: str


def automations(project: str, workers: Workers, deployments: Sequence[UUID]) -> list[AutomationCore]:
    """Return the rules by which the server notices that a machine has died, and has another one go on.

    A crashed run is scheduled again, not replaced by a new one: it keeps its parameters and its count of attempts.
    """
    return [
        _silent_runs_crash(project, workers, deployments),
        _crashed_runs_start_again(project, deployments),
    ]


def _description(site: _Site) -> list[str]:
    workers, project = site.workers, site.project
    when = f"by the schedule {workers.schedule} (UTC), and " if workers.schedule else ""
    learn, sweep, watchdog = (deployment_name(flow, project) for flow in (LEARN, SWEEP, WATCHDOG))
    return [
        f"deployment {learn} on the work pool {workers.pool}: runs on request, {when}"
        f"when the event {ARRIVED} of {inbox_resource(project)} names a folder of {workers.inbox}",
        f"deployment {sweep}: runs that sdlora sweep asks for",
        f"a run without a sign of life for {workers.dead_after_seconds} s is marked crashed;"
        f" a crashed one starts again, {workers.attempts} times without progress",
        f"deployment {watchdog}: every {_WATCHDOG_PERIODS * workers.dead_after_seconds} s, sees to"
        " runs that were overlooked",
        f"in each clone, for GPU 0: CUDA_VISIBLE_DEVICES=0 prefect worker start --pool {workers.pool} --limit 1",
    ]


def _require_one_worker(client: SyncPrefectClient, workers: Workers) -> None:
    """Refuse several workers where no branch carries the parameters from one clone to the next.

    How many will be started nobody knows. Those that are at work are seen here, and others when a run begins.
    """
    from prefect.client.schemas.objects import WorkerStatus

    if workers.branch:
        return
    found = read_all(client.read_workers_for_work_pool, workers.pool)
    online = [worker.name for worker in found if worker.status == WorkerStatus.ONLINE]
    if len(online) > 1:
        raise InputError(
            f"workers.branch: found null, but {len(online)} workers take runs from the pool {workers.pool}, and each "
            "would learn on from its own clone; name a branch (and a remote as workers.push), or stop all but one and "
            "wait for two minutes"
        )


def _make_pool(client: SyncPrefectClient, name: str) -> None:
    """Make a pool of process workers, if it is not there. One of another type is refused."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        return
    if pool.type != "process":
        raise InputError(f"workers.pool: {name} is of the type {pool.type}, not process; name another pool")


def _learn_deployment(flow: _WorkerFlow, site: _Site) -> RunnerDeployment:
    """Make the deployment of the project's chain.

    Its runs wait for each other, because each goes on where the one before ended.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.events import DeploymentEventTrigger
    from prefect.events.schemas.events import ResourceSpecification

    try:
        return _deployment(
            flow,
            site,
            cron=site.workers.schedule,
            tags=[WORK_TAG],
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
            triggers=[
                DeploymentEventTrigger(
                    name=_automation_name(site.project, "new images are learned"),
                    expect={ARRIVED},
                    match=ResourceSpecification({"prefect.resource.id": inbox_resource(site.project)}),
                    parameters={"folder": "{{ event.payload.folder | default('') }}"},
                )
            ],
        )
    except ValueError as error:
        raise InputError(f"workers.schedule: {site.workers.schedule} is not a cron line ({error})") from None


def _sweep_deployment(flow: _WorkerFlow, site: _Site) -> RunnerDeployment:
    """Make the deployment for chains of sweeps. As many run at a time as there are workers."""
    return _deployment(flow, site, tags=[WORK_TAG])


def _watchdog_deployment(flow: _WorkerFlow, site: _Site) -> RunnerDeployment:
    """Make the deployment of what the clock starts on some worker, so that nothing depends on an event alone."""
    period = timedelta(seconds=_WATCHDOG_PERIODS * site.workers.dead_after_seconds)
    return _deployment(flow, site, interval=period)


def _deployment(flow: _WorkerFlow, site: _Site, **options: Any) -> RunnerDeployment:  # noqa: ANN401 - Prefect's
    """Make a deployment of a flow on the workers' pool, described by the first line of its docstring."""
    from prefect.types.entrypoint import EntrypointType

    made: Any = flow.to_deployment(
        name=site.project,
        # Runs know it as that of their deployment, and another `sdlora deploy` makes another.
        version=datetime.now(UTC).isoformat(timespec="seconds"),
        description=(flow.fn.__doc__ or "").partition("\n")[0],
        work_pool_name=site.workers.pool,
        job_variables={"env": _environment(site)},
        entrypoint_type=EntrypointType.MODULE_PATH,
        **options,
    )
    deployment: RunnerDeployment = made
    return deployment


def _apply(deployment: RunnerDeployment) -> UUID:
    """Make a deployment on the server, or bring the one of its name to what it should be. Return its id."""
    made: Any = deployment.apply()
    identity: UUID = made
    return identity


def _environment(site: _Site) -> dict[str, str]:
    """Return the environment variables of the process that a flow runs in."""
    settings = {
        name: value
        for name, value in PREFECT_SETTINGS.items()
        if name.startswith(("DO_NOT", "PREFECT_TASKS"))
    }
    return {
        **settings,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(site.workers.heartbeat_seconds),
        WORKERS_PROJECT: site.project,
        WORKERS_REPOSITORY: site.repository,
    }


def _silent_runs_crash(project: str, workers: Workers, deployments: Sequence[UUID]) -> AutomationCore:
    """Return the rule that marks a run crashed that has given no sign of life for a while."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=_automation_name(project, _SILENT),
        trigger=EventTrigger(
            **_each_run_of(deployments),
            # A machine may die before the first heartbeat, with the run in its hands.
            after={f"prefect.flow-run.{sign}" for sign in ("Pending", "Running", "heartbeat")},
            expect={"prefect.flow-run.*"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=workers.dead_after_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                force=False,
                message=f"no sign of life for {workers.dead_after_seconds} s: its machine or worker has died",
            )
        ],
    )


def _crashed_runs_start_again(project: str, deployments: Sequence[UUID]) -> AutomationCore:
    """Return the rule that schedules a crashed run again."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=_automation_name(project, _CRASHED),
        trigger=EventTrigger(
            **_each_run_of(deployments),
            expect={"prefect.flow-run.Crashed"},
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message="starts again where it ended",
                force=True,
            )
        ],
    )


def _each_run_of(deployments: Sequence[UUID]) -> dict[str, Any]:
    """Return what makes a trigger look at each flow run of our deployments by itself."""
    from prefect.events.schemas.events import ResourceSpecification

    ours = ResourceSpecification(
        {
            "prefect.resource.id": [f"prefect.deployment.{deployment}" for deployment in deployments],
            "prefect.resource.role": "deployment",
        }
    )
    return {
        "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        "match_related": ours,
        "for_each": {"prefect.resource.id"},
    }


def _automation_name(project: str, what: str) -> str:
    return f"sdlora {project}: {what}"


def _replace_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make an automation, or bring the one of its name to what it should be."""
    same = client.read_automations_by_name(automation.name)
    for old in same[1:]:
        client.delete_automation(old.id)
    if same:
        client.update_automation(same[0].id, automation)
    else:
        client.create_automation(automation)


def _delete_unnamed_automations(client: SyncPrefectClient, deployments: Sequence[UUID]) -> None:
    """Delete what an older version made for these deployments, without a project's name."""
    for what in (_SILENT, _CRASHED):
        for old in client.read_automations_by_name(f"sdlora: {what}"):
            text = old.model_dump_json()
            if any(str(deployment) in text for deployment in deployments):
                client.delete_automation(old.id)
