"""What `sdlora deploy` leaves on a Prefect server: the pool, the deployments, and the automations that mend them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pipelines.orchestration.names import ARRIVED, DEPLOYMENT, WATCHDOG, WORK_TAG
from pipelines.orchestration.server import PREFECT_SETTINGS, server_missing
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
        InputError: no server answers, or it refuses what params.yaml says.
    """
    workers = Params.load().workers
    require_server()
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _make_pool(client, workers.pool)
        # The deployment of the watchdog is made last, and no automation starts its runs again.
        deployments = [_apply(_learn_deployment(learn, workers)), _apply(_sweep_deployment(sweep, workers))]
        _apply(_watchdog_deployment(watchdog, workers))
        for automation in automations(workers, deployments):
            _replace_automation(client, automation)
    return _description(workers)


def automations(workers: Workers, deployments: Sequence[UUID]) -> list[AutomationCore]:
    """Return the rules by which the server notices that a machine has died, and has another one go on.

    A crashed run is scheduled again, not replaced by a new one: it keeps its parameters and its count of attempts.
    """
    return [_silent_runs_crash(workers, deployments), _crashed_runs_start_again(deployments)]


def _description(workers: Workers) -> list[str]:
    when = f"by the schedule {workers.schedule} (UTC), and " if workers.schedule else ""
    return [
        f"deployment learn/{DEPLOYMENT} on the work pool {workers.pool}: runs on request, {when}"
        f"when the event {ARRIVED} names a folder of {workers.inbox}",
        f"deployment sweep/{DEPLOYMENT}: runs that sdlora sweep asks for",
        f"a run without a sign of life for {workers.dead_after_seconds} s is marked crashed;"
        f" a crashed one starts again, {workers.attempts} times without progress",
        f"deployment {WATCHDOG}/{DEPLOYMENT}: every {_WATCHDOG_PERIODS * workers.dead_after_seconds} s, sees to"
        " runs that were overlooked",
        f"in each clone, for GPU 0: CUDA_VISIBLE_DEVICES=0 prefect worker start --pool {workers.pool} --limit 1",
    ]


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


def _learn_deployment(flow: _WorkerFlow, workers: Workers) -> RunnerDeployment:
    """Make the deployment of the project's chain.

    Its runs wait for each other, because each goes on where the one before ended.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.events import DeploymentEventTrigger

    try:
        return _deployment(
            flow,
            workers,
            cron=workers.schedule,
            tags=[WORK_TAG],
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
            ),
            triggers=[
                DeploymentEventTrigger(
                    name="sdlora: new images are learned",
                    expect={ARRIVED},
                    parameters={"folder": "{{ event.payload.folder | default('') }}"},
                )
            ],
        )
    except ValueError as error:
        raise InputError(f"workers.schedule: {workers.schedule} is not a cron line ({error})") from None


def _sweep_deployment(flow: _WorkerFlow, workers: Workers) -> RunnerDeployment:
    """Make the deployment for chains of sweeps. As many run at a time as there are workers."""
    return _deployment(flow, workers, tags=[WORK_TAG])


def _watchdog_deployment(flow: _WorkerFlow, workers: Workers) -> RunnerDeployment:
    """Make the deployment of what the clock starts on some worker, so that nothing depends on an event alone."""
    return _deployment(
        flow, workers, interval=timedelta(seconds=_WATCHDOG_PERIODS * workers.dead_after_seconds)
    )


def _deployment(flow: _WorkerFlow, workers: Workers, **options: Any) -> RunnerDeployment:  # noqa: ANN401 - Prefect's
    """Make a deployment of a flow on the workers' pool, described by the first line of its docstring."""
    from prefect.types.entrypoint import EntrypointType

    made: Any = flow.to_deployment(
        name=DEPLOYMENT,
        description=(flow.fn.__doc__ or "").partition("\n")[0],
        work_pool_name=workers.pool,
        job_variables={"env": _environment(workers)},
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


def _environment(workers: Workers) -> dict[str, str]:
    """Return the environment variables of the process that a flow runs in."""
    settings = {
        name: value
        for name, value in PREFECT_SETTINGS.items()
        if name.startswith(("DO_NOT", "PREFECT_TASKS"))
    }
    return {**settings, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(workers.heartbeat_seconds)}


def _silent_runs_crash(workers: Workers, deployments: Sequence[UUID]) -> AutomationCore:
    """Return the rule that marks a run crashed that has given no sign of life for a while."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name="sdlora: a run without a sign of life has crashed",
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


def _crashed_runs_start_again(deployments: Sequence[UUID]) -> AutomationCore:
    """Return the rule that schedules a crashed run again."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name="sdlora: a crashed run starts again",
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


def _replace_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make an automation, or bring the one of its name to what it should be."""
    same = client.read_automations_by_name(automation.name)
    for old in same[1:]:
        client.delete_automation(old.id)
    if same:
        client.update_automation(same[0].id, automation)
    else:
        client.create_automation(automation)
