"""What `sdlora deploy` leaves on a Prefect server: the pool, the deployments, and the automations that mend them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pipelines.project.errors import InputError
from pipelines.project.params import Params, Workers
from pipelines.runtime.stage import PREFECT_SETTINGS, server_missing

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

NAME = "workers"
"""Of the deployments: learn/workers, sweep/workers and tend/workers."""

TAG = "sdlora"
"""Of the deployments whose runs do the work, and are started again when they crash."""

TEND = "tend"
"""The flow that looks after the runs of the others."""

ARRIVED = "sdlora.task-data.arrived"
"""The event that says that images of a new task are in the inbox."""


def deploy() -> list[str]:
    """Make the work pool, the deployments and their automations, or bring them to what params.yaml says; return lines.

    An `InputError` where no server answers: what is deployed must outlive this command.
    """
    workers = Params.load().workers
    missing = server_missing()
    if missing:
        raise InputError(
            f"deploy: no Prefect server ({missing}); start one and set PREFECT_API_URL: docs/how-to/workers.md"
        )
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        make_pool(client, workers.pool)
        deployments = [make_deployment(workers), make_sweep_deployment(workers)]
        make_tend_deployment(workers)
        for automation in automations(workers, deployments):
            replace_automation(client, automation)
    when = f"by the schedule {workers.schedule} (UTC), and " if workers.schedule else ""
    return [
        f"deployment learn/{NAME} on the work pool {workers.pool}: runs on request, {when}"
        f"when the event {ARRIVED} names a folder of {workers.inbox}",
        f"deployment sweep/{NAME}: runs that sdlora sweep asks for",
        f"a run without a sign of life for {workers.dead_after_seconds} s is marked crashed;"
        f" a crashed one starts again, {workers.attempts} times without progress",
        f"deployment {TEND}/{NAME}: every {TENDINGS * workers.dead_after_seconds} s, sees to runs that were overlooked",
        f"in each clone, for GPU 0: CUDA_VISIBLE_DEVICES=0 prefect worker start --pool {workers.pool} --limit 1",
    ]


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """Make a pool of process workers, if it is not there; one of another type is refused."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
        return
    if pool.type != "process":
        raise InputError(f"workers.pool: {name} is of the type {pool.type}, not process; name another pool")


def make_deployment(workers: Workers) -> UUID:
    """Make the deployment; its runs wait for each other, because each goes on where the one before ended."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.events import DeploymentEventTrigger
    from prefect.types.entrypoint import EntrypointType

    from pipelines.orchestration.worker_flows import learn

    try:
        made: Any = learn.to_deployment(
            name=NAME,
            cron=workers.schedule,
            description=(learn.fn.__doc__ or "").partition("\n")[0],
            tags=[TAG],
            work_pool_name=workers.pool,
            job_variables={"env": environment(workers)},
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
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        raise InputError(f"workers.schedule: {workers.schedule} is not a cron line ({error})") from None
    identity: UUID = made.apply()
    return identity


def make_sweep_deployment(workers: Workers) -> UUID:
    """Make the deployment for chains of sweeps; as many run at a time as there are workers."""
    from prefect.types.entrypoint import EntrypointType

    from pipelines.orchestration.worker_flows import sweep

    made: Any = sweep.to_deployment(
        name=NAME,
        description=(sweep.fn.__doc__ or "").partition("\n")[0],
        tags=[TAG],
        work_pool_name=workers.pool,
        job_variables={"env": environment(workers)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    identity: UUID = made.apply()
    return identity


def make_tend_deployment(workers: Workers) -> UUID:
    """Make the deployment of what the clock starts on some worker, so that nothing depends on an event alone."""
    from prefect.types.entrypoint import EntrypointType

    from pipelines.orchestration.worker_flows import tend

    made: Any = tend.to_deployment(
        name=NAME,
        interval=timedelta(seconds=TENDINGS * workers.dead_after_seconds),
        description=(tend.fn.__doc__ or "").partition("\n")[0],
        work_pool_name=workers.pool,
        job_variables={"env": environment(workers)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    identity: UUID = made.apply()
    return identity


TENDINGS = 2
"""How many times `dead_after_seconds` lie between two runs of `tend`: the automations come first."""


def environment(workers: Workers) -> dict[str, str]:
    """Environment variables of the process that a flow runs in."""
    settings = {
        name: value
        for name, value in PREFECT_SETTINGS.items()
        if name.startswith(("DO_NOT", "PREFECT_TASKS"))
    }
    return {**settings, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(workers.heartbeat_seconds)}


def automations(workers: Workers, deployments: Sequence[UUID]) -> list[AutomationCore]:
    """The rules by which the server notices that a machine has died, and has another one go on.

    A crashed run is scheduled again, not replaced by a new one: it keeps its parameters and its count of attempts.
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    ours = ResourceSpecification(
        {
            "prefect.resource.id": [f"prefect.deployment.{deployment}" for deployment in deployments],
            "prefect.resource.role": "deployment",
        }
    )
    runs = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
    return [
        AutomationCore(
            name="sdlora: a run without a sign of life has crashed",
            trigger=EventTrigger(
                match=runs,
                match_related=ours,
                for_each={"prefect.resource.id"},
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
        ),
        AutomationCore(
            name="sdlora: a crashed run starts again",
            trigger=EventTrigger(
                match=runs,
                match_related=ours,
                for_each={"prefect.resource.id"},
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
        ),
    ]


def replace_automation(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make an automation, or bring the one of its name to what it should be."""
    same = client.read_automations_by_name(automation.name)
    for old in same[1:]:
        client.delete_automation(old.id)
    if same:
        client.update_automation(same[0].id, automation)
    else:
        client.create_automation(automation)
