"""How often an unattended run may start again: as long as it gets on, for ever; without progress, a few times.

The count is kept as labels of the flow run, which stays the same run when it is started again.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from uuid import UUID

from pipelines.checkpoints import DEFAULT_STORE, KEY, NAME
from pipelines.errors import InputError
from pipelines.stage import first_line, say

IDLE = "sdlora.attempts-without-progress"
CHECKPOINTS = "sdlora.checkpoints"
PAUSE = timedelta(seconds=10)


class Attempts:
    """The attempts of one flow run; what the server does not take is said, and stops nothing."""

    def __init__(self, run: str, limit: int) -> None:
        self._run, self._limit = UUID(run), limit

    def begin(self, checkpoints: str) -> None:
        """Count this attempt; an `InputError` if as many as allowed have ended without any progress.

        Progress is a stage that was finished, or a fit that saved itself: other checkpoints than at the start of the
        attempt before.
        """
        labels = self._labels()
        idle = int(labels.get(IDLE, 0)) if labels.get(CHECKPOINTS, checkpoints) == checkpoints else 0
        if idle >= self._limit:
            raise InputError(
                f"ended {idle} times in a row without any progress; the logs of the earlier attempts say more."
                " It is not started again by itself: mend the cause, then run it anew"
            )
        self._write({IDLE: idle + 1, CHECKPOINTS: checkpoints})

    def progressed(self) -> None:
        """Note that a stage has been finished: the attempts before count no more."""
        self._write({IDLE: 0})

    def pause(self) -> timedelta:
        """How long to wait before the next attempt: longer each time that nothing came of one."""
        return PAUSE * 4 ** max(0, int(self._labels().get(IDLE, 0)) - 1)

    def _labels(self) -> dict[str, str]:
        from prefect.client.orchestration import get_client

        try:
            with get_client(sync_client=True) as client:
                labels = client.read_flow_run(self._run).labels
            return {name: str(value) for name, value in labels.items()}
        except Exception as trouble:
            say(f"prefect: attempts could not be counted ({first_line(trouble)})")
            return {}

    def _write(self, labels: dict[str, str | int]) -> None:
        from prefect.client.orchestration import get_client

        try:
            with get_client(sync_client=True) as client:
                client.update_flow_run_labels(self._run, dict(labels))
        except Exception as trouble:
            say(f"prefect: progress could not be noted ({first_line(trouble)})")


def checkpoint_mark(store: str | None) -> str:
    """A hash of the names of all checkpoints in a store: another one whenever any fit has saved itself.

    Other files do not count. A checkpoint is known by its form, KEY/NAME, and not by its chain: the key is the hash of
    inputs that a fit knows only when it runs. So a fit of another project in the same store counts as progress too;
    where that matters, give each project a store of its own.
    """
    import fsspec

    fs, root = fsspec.core.url_to_fs(store or DEFAULT_STORE)
    found = (path.split("/")[-2:] for path in (fs.find(root) if fs.isdir(root) else []))
    names = sorted(f"{key}/{name}" for key, name in found if KEY.fullmatch(key) and NAME.fullmatch(name))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
