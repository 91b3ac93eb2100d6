"""What a server answers in pages is read to the end: nothing is overlooked for being one of many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipelines.orchestration.deployment_runs import DeploymentRuns
from pipelines.orchestration.names import LEARN, WATCHDOG, WORK_TAG
from pipelines.orchestration.one_clone import require_one_clone
from pipelines.orchestration.owners import deployed_projects
from pipelines.orchestration.pages import read_all
from pipelines.orchestration.reconcile import (
    close_dead_runs,
    delete_old_watchdog_runs,
    reschedule_crashed_runs,
    reschedule_orphaned_runs,
)
from pipelines.orchestration.server import prefect_server
from pipelines.orchestration.stage_runs import STAGE_TAG, make_flow, run_tag
from pipelines.project.environment import WORKERS_PROJECT
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from tests.support.forked_python import forking
from tests.support.parameters import settings
from tests.support.prefect_home import copy_home

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

pytestmark = pytest.mark.slow

PAGE, MANY = 2, 5


@pytest.fixture(scope="module")
def url(
    prefect_home: Path, prefect_preloaded: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A real server that tells at most `PAGE` things at a time, and refuses to be asked for more."""
    home = copy_home(prefect_home, tmp_path_factory.mktemp("pages") / "prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_API_DEFAULT_LIMIT", str(PAGE))
        with forking(prefect_preloaded), prefect_server(home) as wait:
            wait()
            yield os.environ.pop("PREFECT_API_URL")


@pytest.fixture
def client(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """A client of it, which the code under test finds too."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv(WORKERS_PROJECT, "birds")
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as found:
        yield found


def test_an_answer_of_several_pages_is_read_once_and_whole(client: SyncPrefectClient) -> None:
    from prefect import Flow

    assert read_all(client.read_flow_runs) == []
    made = {client.create_flow_run(Flow(lambda: None, name="counted")).id for _ in range(MANY)}
    assert len(client.read_flow_runs()) == PAGE
    found = [run.id for run in read_all(client.read_flow_runs)]
    assert len(found) == MANY
    assert set(found) == made


def test_of_many_lost_runs_each_is_started_again(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import Flow
    from prefect.states import Crashed, Pending

    monkeypatch.setattr("pipelines.orchestration.reconcile.OVERLOOKED", timedelta(0))
    flow = client.create_flow(Flow(lambda: None, name=LEARN))
    deployment = client.create_deployment(flow, name="birds", tags=[WORK_TAG])
    for _ in range(MANY):
        client.create_flow_run_from_deployment(deployment, state=Crashed())
    assert reschedule_crashed_runs() == MANY
    for _ in range(MANY):
        client.create_flow_run_from_deployment(deployment, state=Pending())
    assert reschedule_orphaned_runs(0) == MANY
    client.delete_deployment(deployment)


def test_of_many_runs_that_a_kill_left_open_each_is_closed(client: SyncPrefectClient) -> None:
    from prefect import Flow
    from prefect.states import Running

    for _ in range(MANY):
        client.create_flow_run(Flow(lambda: None, name="dead"), tags=[STAGE_TAG, run_tag()], state=Running())
    assert close_dead_runs() == MANY


def test_of_many_late_runs_of_the_one_that_tends_none_is_left(client: SyncPrefectClient) -> None:
    from prefect import Flow
    from prefect.states import Scheduled

    tend = client.create_flow(Flow(lambda: None, name=WATCHDOG))
    deployment = client.create_deployment(tend, name="birds")
    late = datetime.now(UTC) - timedelta(minutes=1)
    made = [
        client.create_flow_run_from_deployment(deployment, state=Scheduled(scheduled_time=late)).id
        for _ in range(MANY)
    ]
    delete_old_watchdog_runs()
    assert not set(made) & {run.id for run in read_all(client.read_flow_runs)}
    client.delete_deployment(deployment)


def test_of_many_projects_on_a_server_each_is_known(client: SyncPrefectClient) -> None:
    from prefect import Flow

    flow = client.create_flow(Flow(lambda: None, name=LEARN))
    made = {
        f"birds-{index}": client.create_deployment(flow, name=f"birds-{index}", tags=[WORK_TAG])
        for index in range(MANY)
    }
    assert {project.name for project in deployed_projects(client)} == set(made)
    for deployment in made.values():
        client.delete_deployment(deployment)


def test_of_many_workers_of_a_pool_each_is_seen(client: SyncPrefectClient) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate

    client.create_work_pool(WorkPoolCreate(name="crowded", type="process"))
    for index in range(MANY):
        client.request(
            "POST",
            "/work_pools/{work_pool_name}/workers/heartbeat",
            path_params={"work_pool_name": "crowded"},
            json={"name": f"worker {index}"},
        )
    found = read_all(client.read_workers_for_work_pool, "crowded")
    assert {worker.name for worker in found} == {f"worker {index}" for index in range(MANY)}


def test_a_run_in_another_clone_is_known_however_many_came_after_it(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.flow_engine import run_flow
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )
    from prefect.states import Running

    monkeypatch.chdir(tmp_path)
    refusals: list[str] = []

    def learn() -> None:
        try:
            require_one_clone(Params.parse(settings(), origin="params.yaml").workers)
        except InputError as refusal:
            refusals.append(str(refusal))

    flow = make_flow(learn, "learn-once")
    deployment = client.create_deployment(client.create_flow(flow), name="birds", version="v1")
    runs = [client.create_flow_run_from_deployment(deployment, state=Running()) for _ in range(MANY)]
    client.update_flow_run_labels(runs[0].id, {"sdlora.clone": "elsewhere:/clone"})
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}):
        run_flow(flow, flow_run=client.create_flow_run_from_deployment(deployment))
    assert [refusal for refusal in refusals if "elsewhere:/clone" in refusal]
    client.delete_deployment(deployment)


def test_how_many_runs_stand_is_one_question_and_a_deleted_run_has_failed(client: SyncPrefectClient) -> None:
    from prefect import Flow
    from prefect.states import Completed, Running

    deployment = client.create_deployment(client.create_flow(Flow(lambda: None, name="asked")), name="birds")
    runs = DeploymentRuns(client, deployment)
    assert runs.states([]) == {}
    given = [Running(), Completed(), Running(), Running(), Completed()]
    made = [client.create_flow_run_from_deployment(deployment, state=state).id for state in given]
    client.delete_flow_run(made[2])
    found = [state for state in runs.states(made).values() if state]
    assert [state.name for state in found] == ["Running", "Completed", "Deleted", "Running", "Completed"]
    assert [state.completed for state in found] == [False, True, False, False, True]
    assert [state.failed for state in found] == [False, False, True, False, False]
    client.delete_deployment(deployment)
