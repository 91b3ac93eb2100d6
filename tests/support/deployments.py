"""Deploy what `sdlora deploy` deploys."""

from __future__ import annotations

from pipelines.orchestration import deploy as deployment


def deploy() -> list[str]:
    """Deploy the flows of this program, as the command does."""
    from pipelines.orchestration.worker_flows import learn, watchdog
    from pipelines.sweeps.flow import sweep

    return deployment.deploy(learn, sweep, watchdog)
