"""How often a run on a worker may start again: as long as it gets on, for ever. Without progress, a few times.

The count is kept as labels of the flow run, which stays the same run when it is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pipelines.orchestration.server import PREFECT_SETTINGS, prefect_client
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.runtime.checkpoints import KEY, NAME
from pipelines.runtime.console import log_line

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun

_IDLE = "sdlora.attempts-without-progress"
_CHECKPOINTS = "sdlora.checkpoints"
_PAUSE = timedelta(seconds=10)


BEGUN: dict[UUID, UUID] = {}
"""Flow run → the Running state that this process has given it, as `remember_state` was told."""


def remember_state(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Note in which state this process began a run. The run itself may be read anew, with another's state, after it."""
    BEGUN[flow_run.id] = state.id


class Attempts:
    """The attempts of one flow run. What the server does not take is said, and stops nothing."""

    def __init__(self, run: UUID, state: UUID | None = None) -> None:
        """`state` is the one in which this process began the run. If that is not known, it never gives way."""
        self._run, self._state = run, state

    def exit_if_superseded(self) -> None:
        """Exit if another process owns this attempt.

        A server on SQLite may give one run to two workers in the same moment: the one that was Running second gives
        way. So does a process that was taken for dead, and wakes when its run has been started again or has ended.
        """
        from prefect.exceptions import Abort

        try:
            with short_retries(), prefect_client() as client:
                states = client.read_flow_run_states(self._run)
        except Exception as trouble:  # a server that is away stops nothing
            log_line(f"prefect: whether this run has begun elsewhere is not known ({one_line(trouble)})")
            return
        owner = _begun_first(states)
        if owner != self._state and self._state in [state.id for state in states]:
            log_line("prefect: this run is at work elsewhere, or has ended: giving way")
            raise Abort

    def begin(self, checkpoints: str, limit: int) -> None:
        """Count this attempt. An `InputError` if `limit` of them have ended without any progress.

        Progress is a stage that was finished, or a fit that saved itself: other checkpoints than at the start of the
        attempt before.
        """
        labels = self._labels()
        idle = int(labels.get(_IDLE, 0)) if labels.get(_CHECKPOINTS, checkpoints) == checkpoints else 0
        if idle >= limit:
            raise InputError(
                f"ended {idle} times in a row without any progress; the logs of the earlier attempts say more."
                " It is not started again by itself: mend the cause, then run it anew"
            )
        self._write({_IDLE: idle + 1, _CHECKPOINTS: checkpoints})

    def progressed(self) -> None:
        """Note that a stage has been finished: the attempts before count no more."""
        with short_retries():
            self._write({_IDLE: 0})

    def schedule(self, message: str) -> State:
        """Schedule the next attempt, for any worker. Return the state that the run is then in."""
        from prefect.states import AwaitingRetry

        with prefect_client() as client:
            later: State = AwaitingRetry(scheduled_time=datetime.now(UTC) + self.pause(), message=message)
            client.set_flow_run_state(self._run, later)
        return later

    def pause(self) -> timedelta:
        """Return how long to wait before the next attempt: longer each time that nothing came of one."""
        return _PAUSE * 4 ** max(0, int(self._labels().get(_IDLE, 0)) - 1)

    def _labels(self) -> dict[str, str]:
        try:
            with prefect_client() as client:
                labels = client.read_flow_run(self._run).labels
            return {name: str(value) for name, value in labels.items()}
        except Exception as trouble:
            log_line(f"prefect: attempts could not be counted ({one_line(trouble)})")
            return {}

    def _write(self, labels: dict[str, str | int]) -> None:
        try:
            with prefect_client() as client:
                client.update_flow_run_labels(self._run, dict(labels))
        except Exception as trouble:
            log_line(f"prefect: progress could not be noted ({one_line(trouble)})")


@contextlib.contextmanager
def short_retries() -> Iterator[None]:
    """Ask a server that is away no more often, within this block, than a stage asks it.

    By Prefect's own rule a process of a worker tries for a minute and more, between any two stages.
    """
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    few = min(PREFECT_CLIENT_MAX_RETRIES.value(), int(PREFECT_SETTINGS["PREFECT_CLIENT_MAX_RETRIES"]))
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: few}):
        yield


def _begun_first(states: list[State]) -> UUID | None:
    """Return the Running state whose process owns a run, the first of the newest attempt. None if no process does.

    An attempt is what follows the last state in which nothing is at work on a run.
    """
    owner = None
    for state in sorted(states, key=lambda state: (state.timestamp, state.id)):
        if state.is_running():
            owner = owner or state.id
        elif not (state.is_pending() or state.is_cancelling()):  # Prefect's worker ends what is cancelled
            owner = None
    return owner


def checkpoint_mark(store: str | None) -> str:
    """Return a hash of the names of all checkpoints in a store: another one whenever any fit has saved itself.

    Other files do not count. A checkpoint is known by its form, KEY/NAME, and not by its chain: the key is the hash of
    inputs that a fit knows only when it runs. So a fit of another project in the same store counts as progress too;
    where that matters, give each project a store of its own.
    """
    import fsspec

    fs, root = fsspec.core.url_to_fs(store or _CHECKPOINTS)
    found = (path.split("/")[-2:] for path in (fs.find(root) if fs.isdir(root) else []))
    names = sorted(f"{key}/{name}" for key, name in found if KEY.fullmatch(key) and NAME.fullmatch(name))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
