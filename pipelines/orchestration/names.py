"""What our deployments, their runs and their events are called on a Prefect server. Users see these names."""

from __future__ import annotations

DEPLOYMENT = "workers"
"""Of the deployments: learn/workers, sweep/workers and tend/workers."""

WORK_TAG = "sdlora"
"""Of the deployments whose runs do the work, and are started again when they crash."""

WATCHDOG = "tend"
"""The flow that looks after the runs of the others."""

ARRIVED = "sdlora.task-data.arrived"
"""The event that says that images of a new task are in the inbox."""
