"""What becomes of a run on a worker that is refused, or whose stage ends badly."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from prefect import State

from pipelines.orchestration import worker_flows, worker_runs
from pipelines.orchestration.attempts import Attempts
from pipelines.versioning.repro import StageFailedError
from tests.support.commands import NO_SERVER
from tests.support.parameters import settings


class ServerAway(Attempts):
    """What an attempt can do where no server answers."""

    def begin(self, checkpoints: str, limit: int) -> None:
        """Count nothing."""

    def exit_if_superseded(self) -> None:
        """Stop nothing."""

    def schedule(self, message: str) -> State:
        raise OSError(message)


@pytest.mark.parametrize(("interrupted", "name"), [(True, "Crashed"), (False, "Failed")])
def test_a_stage_that_was_killed_is_begun_again_and_one_that_refused_is_not(
    monkeypatch: pytest.MonkeyPatch, interrupted: bool, name: str
) -> None:
    """The server starts crashed runs again, and leaves failed ones."""

    def work(folder: str | None, attempts: Attempts, *, record: bool) -> str:
        raise StageFailedError("error: fit@t01 ended badly", 1, "fit@t01", interrupted=interrupted)

    monkeypatch.setattr(worker_flows, "_learn", work)
    monkeypatch.setattr(worker_runs, "die_with", lambda parent: None)
    monkeypatch.setattr(worker_runs, "_this_attempt", lambda: ServerAway(uuid4()))
    state = worker_flows.learn.fn()
    assert (state.name, state.message) == (name, "fit@t01 ended badly")


@pytest.mark.parametrize(
    ("folder", "said"),
    [("/etc", "not the name of a folder"), ("link", "leads out"), ("lions", "no such folder")],
)
def test_a_folder_that_is_none_of_the_inbox_fails_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, said: str
) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    project = tmp_path / "project"
    (project / "data/inbox").mkdir(parents=True)
    (tmp_path / "outside/cat").mkdir(parents=True)
    (project / "data/inbox/link").symlink_to(tmp_path / "outside")
    (project / "params.yaml").write_text(settings(), encoding="utf-8")
    monkeypatch.chdir(project)
    monkeypatch.setenv("SDLORA_PROJECT", str(project))
    monkeypatch.setattr(worker_runs, "die_with", lambda parent: None)
    monkeypatch.setattr(worker_runs, "_this_attempt", lambda: ServerAway(uuid4()))
    with temporary_settings({PREFECT_API_URL: NO_SERVER, PREFECT_CLIENT_MAX_RETRIES: 0}):
        state = worker_flows.learn.fn(folder=folder)
    assert state.is_failed()
    assert state.message
    assert said in state.message
    assert "\n" not in state.message
