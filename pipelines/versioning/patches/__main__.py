"""DVC with this project's patches: `python -m pipelines.versioning.patches repro …` is `dvc repro …`."""

from __future__ import annotations

import sys

from dvc.cli import main as run

from pipelines.versioning.patches import apply_patches


def main(arguments: list[str]) -> int:
    """Run a command of DVC. Return its status."""
    apply_patches()
    status: int = run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
