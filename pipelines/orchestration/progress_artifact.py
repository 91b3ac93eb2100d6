"""Progress in Prefect: an artifact of the flow run that a stage is in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pipelines.orchestration.names import artifact_key, project_name
from pipelines.orchestration.server import patience
from pipelines.runtime.deadline import within

if TYPE_CHECKING:
    from uuid import UUID


class ProgressArtifact:
    """A progress artifact of the flow run that this process is in. Without one, nothing."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._id: UUID | None = None
        # Prefect is not imported for this: where it is not loaded already, there is no flow run.
        self._lost = "prefect" not in sys.modules

    def __call__(self, percent: float, text: str) -> None:
        """Write the artifact. After the first failure never again, so that a dead server costs no time."""
        if self._lost:
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.context import FlowRunContext

        if FlowRunContext.get() is None:
            self._lost = True
            return
        try:
            with within(patience()):
                if self._id is None:
                    title = "".join(c if c.isalnum() else "-" for c in self._title.lower())
                    key = artifact_key(project_name(), f"progress-{title}")
                    self._id = create_progress_artifact(percent, key=key, description=text)  # type: ignore[assignment]
                else:
                    update_progress_artifact(self._id, percent, description=text)
        except Exception:
            self._lost = True
