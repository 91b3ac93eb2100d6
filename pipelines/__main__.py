"""The command line `sdlora`, also `python -m pipelines`."""

import os

from pipelines.project.environment import STAGE_SOCKET
from pipelines.runtime.surroundings import settle

SPIN = "3000"
"""How often a thread of torch's looks for work before it sleeps. By GNU OpenMP's own rule it hardly ever sleeps, and
where another program has a core a fit then stands still: measured on 2 cores with one of them taken, 13 to 190
images a second, with this 330; with both free 790 and 710."""


def main() -> None:
    """Hand a stage's command to a fork server if there is one, else run it here."""
    settle()
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # read when torch is loaded
    if STAGE_SOCKET in os.environ or "DVC_STAGE" in os.environ:
        import sys

        from pipelines.cli.preloaded import delegate_stage

        status = delegate_stage(sys.argv[1:])
        if status is not None:
            raise SystemExit(status)
    from pipelines.cli.app import main

    main()


if __name__ == "__main__":
    main()
