"""What a server remembers of runs that were cut off: their attempts, and those that nothing is behind any more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from pipelines.orchestration.attempts import Attempts, checkpoint_mark, short_retries
from pipelines.orchestration.names import WATCHDOG, WORK_TAG
from pipelines.orchestration.one_clone import require_one_clone
from pipelines.orchestration.reconcile import (
    close_dead_runs,
    delete_old_watchdog_runs,
    reschedule_orphaned_runs,
)
from pipelines.orchestration.stage_runs import STAGE_TAG, make_flow, run_tag
from pipelines.project.environment import WORKERS_PROJECT
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from tests.support.parameters import settings

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

pytestmark = pytest.mark.slow


@pytest.fixture
def client(prefect_url: str) -> Iterator[SyncPrefectClient]:
    """A client of the real server, which the code under test finds too."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as found:
        yield found


def running(client: SyncPrefectClient, *tags: str, parent: FlowRun | None = None) -> FlowRun:
    """A flow run that is Running, and that no process is behind."""
    from prefect import Flow, Task
    from prefect.states import Running

    task = None
    if parent:
        task = client.create_task_run(
            Task(fn=lambda: None, name="child"), flow_run_id=parent.id, dynamic_key="1", state=Running()
        ).id
    return client.create_flow_run(
        Flow(lambda: None, name="dead"), tags=tags, parent_task_run_id=task, state=Running()
    )


def state(client: SyncPrefectClient, run: FlowRun) -> str:
    found = client.read_flow_run(run.id).state
    assert found
    return found.type.value


def test_attempts_without_progress_are_few_and_with_progress_without_end(client: SyncPrefectClient) -> None:
    attempts = Attempts(running(client).id)
    attempts.begin("none", 2)
    attempts.begin("none", 2)
    with pytest.raises(InputError, match="ended 2 times in a row without any progress"):
        attempts.begin("none", 2)
    attempts.begin("a fit saved itself", 2)
    attempts.begin("a fit saved itself", 2)
    attempts.progressed()
    for _ in range(2):
        attempts.begin("a fit saved itself", 2)
    with pytest.raises(InputError):
        attempts.begin("a fit saved itself", 2)


def test_the_pause_before_an_attempt_grows_with_those_that_came_to_nothing(client: SyncPrefectClient) -> None:
    attempts = Attempts(running(client).id)
    pauses = []
    for _ in range(3):
        attempts.begin("none", 9)
        pauses.append(attempts.pause().total_seconds())
    attempts.progressed()
    assert [*pauses, attempts.pause().total_seconds()] == [10, 40, 160, 10]


def test_of_two_processes_that_were_given_one_run_the_second_gives_way(client: SyncPrefectClient) -> None:
    from prefect import Flow
    from prefect.exceptions import Abort
    from prefect.states import AwaitingRetry, Cancelling, Completed, Crashed, Pending, Running, Scheduled

    run = client.create_flow_run(Flow(lambda: None, name="twice"), state=Scheduled())

    def set_(state: State) -> Attempts:
        made = client.set_flow_run_state(run.id, state, force=True).state
        assert made
        return Attempts(run.id, made.id)

    def gives_way(attempts: Attempts) -> bool:
        try:
            attempts.exit_if_superseded()
        except Abort:
            return True
        return False

    set_(Pending())
    set_(Pending())
    first = set_(Running())
    assert not gives_way(first)
    second = set_(Running())
    assert [gives_way(each) for each in (first, second, Attempts(run.id))] == [False, True, False]
    set_(Cancelling())  # Prefect's worker will end it
    assert not gives_way(first)
    set_(Crashed())  # the first was taken for dead
    assert gives_way(first)
    set_(AwaitingRetry())
    set_(Pending())
    third = set_(Running())
    assert [gives_way(each) for each in (first, second, third)] == [True, True, False]
    set_(Completed())
    assert gives_way(third)


def test_what_the_server_overlooked_is_seen_to_and_what_is_fresh_alive_or_strange_is_not(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import Flow
    from prefect.states import Cancelled, Completed, Crashed, Pending, Running

    flow = client.create_flow(Flow(lambda: None, name="overlooked"))
    monkeypatch.setenv(WORKERS_PROJECT, "birds")
    ours = client.create_deployment(flow, name="birds", tags=[WORK_TAG])
    others = client.create_deployment(flow, name="cats", tags=[WORK_TAG])
    given = {"crashed": Crashed(), "taken": Pending(), "silent": Running(), "done": Completed()}
    given |= {"cancelled": Cancelled(message="by Ana")}
    given |= {"slot": Cancelled(message="Deployment concurrency slot lost during provisioning")}
    runs = {name: client.create_flow_run_from_deployment(ours, state=state) for name, state in given.items()}
    runs["alive"] = client.create_flow_run_from_deployment(ours, state=Running())
    runs["strange"] = client.create_flow_run_from_deployment(others, state=Crashed())

    assert reschedule_orphaned_runs(60) == 0
    monkeypatch.setattr("pipelines.orchestration.reconcile.OVERLOOKED", timedelta(0))
    monkeypatch.setattr(
        "pipelines.orchestration.reconcile.has_shown_life",
        lambda client, resource, within: resource == f"prefect.flow-run.{runs['alive'].id}",
    )
    assert reschedule_orphaned_runs(0) == 4

    assert {name: state(client, run) for name, run in runs.items()} == {
        "crashed": "SCHEDULED",
        "taken": "CRASHED",
        "silent": "CRASHED",
        "done": "COMPLETED",
        "cancelled": "CANCELLED",
        "slot": "SCHEDULED",
        "alive": "RUNNING",
        "strange": "CRASHED",
    }
    for deployment in (ours, others):
        client.delete_deployment(deployment)


def test_late_and_old_runs_of_the_one_that_tends_are_forgotten_and_no_others(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import Flow
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Completed, Pending, Scheduled

    monkeypatch.setenv(WORKERS_PROJECT, "birds")
    minute = timedelta(minutes=1)
    tend, flow = (client.create_flow(Flow(lambda: None, name=name)) for name in (WATCHDOG, "others"))
    ours, others = (client.create_deployment(each, name="birds") for each in (tend, flow))
    cats = client.create_deployment(tend, name="cats")

    def planned(deployment: UUID, late: timedelta) -> FlowRun:
        state: State[None] = Scheduled(scheduled_time=datetime.now(UTC) - late)
        return client.create_flow_run_from_deployment(deployment, state=state)

    runs = {
        "late": planned(ours, minute),
        "to come": planned(ours, -60 * minute),
        "others'": planned(others, 60 * minute),
        "another project's": planned(cats, 60 * minute),
        "begun": planned(ours, minute),
        "dead": planned(ours, 90 * minute),
        "just done": planned(ours, minute),
        "done": planned(ours, 20 * minute),
    }
    for name, now in {
        "begun": Pending(),
        "dead": Pending(),
        "just done": Completed(),
        "done": Completed(),
    }.items():
        client.set_flow_run_state(runs[name].id, now, force=True)
    delete_old_watchdog_runs()
    left = set()
    for name, run in runs.items():
        with contextlib.suppress(ObjectNotFound):
            client.read_flow_run(run.id)
            left.add(name)
    assert left == {"to come", "others'", "another project's", "begun", "just done"}
    for deployment in (ours, others, cats):
        client.delete_deployment(deployment)


def test_a_server_that_does_not_answer_stops_no_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        Attempts(UUID("507763b4-cd5d-498b-8294-8fffe5b7c2be")).begin("none", 1)
    assert "attempts could not be counted" in capsys.readouterr().err


def test_the_mark_of_a_store_changes_with_every_checkpoint_and_with_nothing_else(tmp_path: Path) -> None:
    store, one, two = tmp_path / "store", "1" * 32, "2" * 32

    def mark_with(name: str) -> str:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
        return checkpoint_mark(str(store))

    marks = [checkpoint_mark(str(store))]
    for key, step in ((one, 10), (one, 20), (two, 10)):
        marks.append(mark_with(f"{key}/{step:09d}-{key}.safetensors"))
    assert len(set(marks)) == 4
    for name in ("notes.txt", f"{one}/log", f"other/{10:09d}-{one}.safetensors", f"{two}/half.partial"):
        assert mark_with(name) == marks[-1]


def test_runs_of_this_folder_and_children_of_ended_runs_are_closed_and_no_others(
    client: SyncPrefectClient,
) -> None:
    from prefect.states import Crashed

    mine = running(client, STAGE_TAG, run_tag())
    ended, alive = running(client), running(client)
    client.set_flow_run_state(ended.id, Crashed(), force=True)
    orphan = running(client, STAGE_TAG, "elsewhere:/clone", parent=ended)
    at_work = running(client, STAGE_TAG, "elsewhere:/clone", parent=alive)
    somebodys = running(client, "other")

    assert close_dead_runs() == 2

    assert [state(client, run) for run in (mine, orphan)] == ["CRASHED", "CRASHED"]
    assert orphan.parent_task_run_id
    placeholder = client.read_task_run(orphan.parent_task_run_id).state
    assert placeholder
    assert placeholder.is_crashed()
    assert [state(client, run) for run in (at_work, somebodys, alive)] == ["RUNNING"] * 3
    assert close_dead_runs() == 0


@pytest.mark.parametrize(("before", "within"), [(5, 1), (0, 0)])
def test_between_two_stages_a_server_is_not_asked_for_a_minute(before: int, within: int) -> None:
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: before}):
        with short_retries():
            assert PREFECT_CLIENT_MAX_RETRIES.value() == within
        assert PREFECT_CLIENT_MAX_RETRIES.value() == before


def test_a_run_in_a_second_clone_is_refused_unless_it_was_deployed_anew_or_a_remote_carries_on(
    client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.flow_engine import run_flow
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    workers = Params.parse(settings(), origin="params.yaml").workers
    said: list[str | None] = []

    def learn() -> None:
        try:
            require_one_clone(workers)
            said.append(None)
        except InputError as refusal:
            said.append(str(refusal))

    flow = make_flow(learn, "learn-once")
    identity = client.create_flow(flow)
    monkeypatch.setenv(WORKERS_PROJECT, "wrens")

    def run_in(place: str, version: str) -> str | None:
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        deployment = client.create_deployment(identity, name="wrens", version=version)
        run_flow(flow, flow_run=client.create_flow_run_from_deployment(deployment))
        return said.pop()

    quiet = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(quiet):
        assert [run_in("one", "v1"), run_in("one", "v1")] == [None, None]
        refused = run_in("two", "v1")
        assert refused is not None
        assert refused.startswith("workers.branch: found null, but earlier runs of wrens were in ")
        assert (
            f"{tmp_path / 'one'}, and this clone knows nothing of them; name a branch and a remote" in refused
        )
        assert run_in("one", "v1") is None  # what was refused counts for nothing
        assert run_in("two", "v2") is None
        workers = workers.model_copy(update={"branch": "learned", "push": "origin"})
        assert run_in("one", "v2") is None
