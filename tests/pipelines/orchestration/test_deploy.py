"""What `sdlora deploy` refuses before it makes anything, and the form that it gives to the Prefect UI."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.orchestration.deploy import automations
from pipelines.orchestration.deployment_runs import deployment_runs
from pipelines.orchestration.server import patience, server_trouble
from pipelines.project.environment import PREFECT_SECONDS
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from tests.support.bad_server import bad_server
from tests.support.deployments import deploy
from tests.support.repository import REPOSITORY


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project of the shipped parameters."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)


def test_without_a_server_nothing_is_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no Prefect server \(PREFECT_API_URL is not set\)"):
        deploy()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with pytest.raises(InputError, match="does not answer"):
        deploy()


def test_every_parameter_of_the_form_is_typed_described_and_optional() -> None:
    from pipelines.orchestration.worker_flows import learn

    schema = learn.parameters.model_dump()
    assert set(schema["properties"]) == {"folder", "record"}
    assert schema["required"] == []
    for field in schema["properties"].values():
        assert field["description"]
        assert field.get("type") or field["anyOf"]


@pytest.mark.slow
def test_deploying_twice_leaves_one_of_everything(prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    text = Path("params.yaml").read_text()
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        deploy()
        Path("params.yaml").write_text(text.replace("schedule:  ", 'schedule: "0 3 * * *"'))
        lines = deploy()
        assert "by the schedule 0 3 * * * (UTC)" in lines[0]
        # Tests of other files share the server: one of them deploys a project called wrens.
        found = {made.flow_id: made for made in client.read_deployments() if made.name != "wrens"}
        flows = {client.read_flow(flow).name: made for flow, made in found.items()}
        assert set(flows) == {"learn", "sweep", "tend"}
        assert [schedule.schedule.interval.total_seconds() for schedule in flows["tend"].schedules] == [180]
        assert flows["sweep"].global_concurrency_limit is None
        deployment = flows["learn"]
        assert [schedule.schedule.cron for schedule in deployment.schedules] == ["0 3 * * *"]
        assert deployment.global_concurrency_limit
        assert deployment.global_concurrency_limit.limit == 1
        names = [automation.name for automation in client.read_automations()]
        assert (
            len(names)
            == len(set(names))
            == 1 + len(automations("birds", Params.load().workers, [deployment.id]))
        )

        Path("params.yaml").write_text(text.replace("schedule:  ", 'schedule: "99 3 * * *"'))
        with pytest.raises(InputError, match=r"workers\.schedule: 99 3 "):
            deploy()
        Path("params.yaml").write_text(text)
        deploy()
        assert client.read_deployment(deployment.id).schedules == []


@pytest.mark.slow
def test_two_projects_on_one_server_keep_apart(
    prefect_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    text = Path("params.yaml").read_text()
    monkeypatch.setenv("PREFECT_API_URL", prefect_url)
    with temporary_settings({PREFECT_API_URL: prefect_url}), get_client(sync_client=True) as client:
        for project in ("birds", "cats"):
            named = text.replace("  project:", f"  project: {project}")
            cats = named.replace("pool: gpu ", f"pool: {project} ")
            Path("params.yaml").write_text(cats)
            lines = deploy()
            assert f"sdlora.inbox.{project} names a folder of data/inbox" in lines[0]
        Path("params.yaml").write_text(named.replace("pool: gpu ", "pool: birds "))
        with pytest.raises(InputError, match=r"^workers\.pool: birds is the pool of learn/birds, "):
            deploy()
        made = {
            flow: {
                client.read_deployment_by_name(f"{flow}/{name}").work_pool_name for name in ("birds", "cats")
            }
            for flow in ("learn", "sweep", "tend")
        }
        assert set(map(frozenset, made.values())) == {frozenset({"birds", "cats"})}
        for worker in ("one", "two"):
            client.send_worker_heartbeat("cats", worker, heartbeat_interval_seconds=30)
        Path("params.yaml").write_text(cats)
        with pytest.raises(InputError, match=r"^workers\.branch: found null, but 2 workers take runs"):
            deploy()
        Path("params.yaml").write_text(cats.replace("  branch:", "  branch: learned"))
        deploy()
        mine = [automation for automation in client.read_automations() if "birds:" in automation.name]
        other = str(client.read_deployment_by_name("learn/cats").id)
        assert len(mine) == 3
        assert not [automation.name for automation in mine if other in automation.model_dump_json()]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("401", r"answers 401 Unauthorized; set PREFECT_API_AUTH_STRING to the server's"),
        ("500", r"answers 500 Internal Server Error; look at its log"),
        ("strange", r"is no Prefect server of a version that is known; correct PREFECT_API_URL"),
        ("slow", r"failed \(no answer within 1 s\); run the same again when it is well"),
    ],
)
def test_what_a_server_refuses_is_one_line(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv(PREFECT_SECONDS, "1")
    with bad_server(how) as url, temporary_settings({PREFECT_API_URL: url}):
        monkeypatch.setenv("PREFECT_API_URL", url)
        for ask in (deploy, sweep_runs):
            with pytest.raises(InputError, match=said) as caught:
                ask()
            assert len(str(caught.value)) <= 300
            assert "\n" not in str(caught.value)


def sweep_runs() -> None:
    with deployment_runs("sweep"):
        pass


def test_a_server_whose_health_takes_for_ever_does_not_answer() -> None:
    with bad_server("slow", healthy=False) as url:
        assert server_trouble(url) == f"{url} does not answer"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFECT_SECONDS, text)
    with pytest.raises(
        InputError, match=rf"^SDLORA_PREFECT_SECONDS: '{text}' is no number of seconds; set one"
    ):
        patience()
