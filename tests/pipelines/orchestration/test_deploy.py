"""What `sdlora deploy` refuses before it makes anything, and the form that it gives to the Prefect UI."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.orchestration.deploy import automations
from pipelines.project.errors import InputError
from pipelines.project.params import Params
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
        found = {made.flow_id: made for made in client.read_deployments()}
        flows = {client.read_flow(flow).name: made for flow, made in found.items()}
        assert set(flows) == {"learn", "sweep", "tend"}
        assert [schedule.schedule.interval.total_seconds() for schedule in flows["tend"].schedules] == [180]
        assert flows["sweep"].global_concurrency_limit is None
        deployment = flows["learn"]
        assert [schedule.schedule.cron for schedule in deployment.schedules] == ["0 3 * * *"]
        assert deployment.global_concurrency_limit
        assert deployment.global_concurrency_limit.limit == 1
        names = [automation.name for automation in client.read_automations()]
        assert len(names) == len(set(names)) == 1 + len(automations(Params.load().workers, [deployment.id]))

        Path("params.yaml").write_text(text.replace("schedule:  ", 'schedule: "99 3 * * *"'))
        with pytest.raises(InputError, match=r"workers\.schedule: 99 3 "):
            deploy()
        Path("params.yaml").write_text(text)
        deploy()
        assert client.read_deployment(deployment.id).schedules == []
