"""What becomes of a run on a worker whose stage ends badly."""

from __future__ import annotations

from uuid import uuid4

import pytest
from prefect import State

from pipelines.orchestration import worker_flows, worker_runs
from pipelines.orchestration.attempts import Attempts
from pipelines.versioning.repro import StageFailedError


class ServerAway(Attempts):
    """What an attempt can do where no server answers."""

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
