"""DVC with this project's patches: `python -m pipelines.versioning.patches repro …` is `dvc repro …`."""

from __future__ import annotations

import sys

from dvc.cli import main as run

from pipelines.runtime.stage_outcome import INPUT, StageOutcome, leave_outcome
from pipelines.versioning.dvc_failures import SystemFaults
from pipelines.versioning.patches import apply_patches


def main(arguments: list[str]) -> int:
    """Run a command of DVC. Return its status. Whoever runs a stage is left the reason why DVC could not go on."""
    apply_patches()
    faults = SystemFaults()
    status: int = run(arguments)
    if status and faults.first:
        leave_outcome(StageOutcome(2, INPUT, f"error: dvc: {faults.first}"), keep_failure=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
