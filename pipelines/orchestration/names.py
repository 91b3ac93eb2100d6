"""What our deployments, their runs and their events are called on a Prefect server. Users see these names."""

from __future__ import annotations

import os
import re

from pipelines.orchestration.repository import repository_name
from pipelines.project.environment import WORKERS_PROJECT
from pipelines.project.layout import PARAMS, StageName
from pipelines.project.params import Params

WORK_TAG = "sdlora"
"""Of the deployments whose runs do the work, and are started again when they crash."""

LEARN, SWEEP, WATCHDOG = "learn", "sweep", "tend"
"""The flows of workers: the chain, one chain of a sweep, and what looks after the runs of the others."""

ARRIVED = "sdlora.task-data.arrived"
"""The event that says that images of a new task are in the inbox."""


def deployment_name(flow: str, project: str) -> str:
    """Return the name of a flow's deployment. There is one for each project that a server knows."""
    return f"{flow}/{project}"


def inbox_resource(project: str) -> str:
    """Return the resource of `ARRIVED`: the inbox of a project."""
    return f"sdlora.inbox.{project}"


def artifact_key(project: str, name: str) -> str:
    """Return the key of an artifact of a project. Prefect takes lower case, digits and dashes."""
    return f"{project}-{name}"


def stage_artifact(label: str) -> str:
    """Return what the table of a stage is called in its project's artifacts, such as `fit-t03`."""
    return "-".join(part for part in StageName.parse(label) if part).replace("_", "-").lower()


def project_name() -> str:
    """Return what this project is called on a Prefect server, where there may be others.

    A run on a worker is told by its deployment. Elsewhere it is `workers.project`, or the name of the Git repository.
    """
    told = os.environ.get(WORKERS_PROJECT)
    named = told or (Params.load().workers.project if PARAMS.is_file() else None)
    return named or _slug(repository_name()) or "project"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
