"""DVC with what this project mends in it: `python -m pipelines.versioning.patches repro …` is `dvc repro …`."""

from __future__ import annotations

import sys

from dvc.cli import main as run


def mend() -> None:
    """Change DVC in this process: how it reads, writes and shares; what it does and prints stays DVC's own."""
    from pipelines.versioning.patches import hashing, lockfile, runcache
    from pipelines.versioning.patches.lookup import use_direct_lookup

    hashing.use()
    lockfile.use()
    runcache.use()
    use_direct_lookup()


def main(arguments: list[str]) -> int:
    """Run a command of DVC; return its status."""
    mend()
    status: int = run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
